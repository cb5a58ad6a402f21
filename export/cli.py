"""The commands ``export`` and ``inspect``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from export.gates import GateResult
    from export.pipeline import ExportReport


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Run folder, checkpoint or weights.")],
    format: Annotated[
        str | None,
        typer.Option(
            help="Artifact format: torchscript, onnx, pt2 (AOTInductor) or eager.",
            show_default="torchscript; all with --matrix",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Number format: fp32, bf16, fp16 (GPUs) or int8.", show_default="fp32; all with --matrix"),
    ] = None,
    method: Annotated[str, typer.Option(help="How TorchScript is made: trace or script.")] = "trace",
    device: Annotated[str, typer.Option(help="Where the model is checked and served: cpu or cuda.")] = "cpu",
    name: Annotated[str | None, typer.Option(help="Model name.", show_default="the run's folder name")] = None,
    version: Annotated[str, typer.Option(help="Model version.")] = "1.0",
    out: Annotated[Path, typer.Option(help="Model store to write the archive to.")] = Path("model_store"),
    eval: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Evaluation data: a folder of images, one sub-folder a label; a .csv, .tsv or .jsonl file of texts "
            "and labels; or an .npz file of tensors.",
            show_default="the held-out split that the checkpoint names",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Data that int8 measures value ranges on, in the same forms; labels are not needed. The first 256 "
            "samples are used.",
            show_default="the training split that the checkpoint names",
        ),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT,LABEL",
            help="Columns of a table of texts, as names or as positions from 0; TITLE+BODY,LABEL joins two.",
            show_default="text,label",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE.MODULE:FACTORY", help="What builds the module, for bare weights."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="YAML or JSON file with the factory's keyword arguments."),
    ] = None,
    signature: Annotated[Path | None, typer.Option(metavar="FILE", help="Signature, for bare weights.")] = None,
    thresholds: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="YAML or JSON file with bounds of the gates.", show_default="those of the precision"
        ),
    ] = None,
    allow_slower: Annotated[
        bool, typer.Option("--allow-slower", help="Pack a lower precision even if it is slower than fp32 here.")
    ] = False,
    model_card: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Model card for the archive.", show_default="the run folder's own"),
    ] = None,
    licence: Annotated[Path | None, typer.Option(metavar="FILE", help="Licence text for the archive.")] = None,
    staging_only: Annotated[
        bool,
        typer.Option("--staging-only", help="Leave a folder and the torch-model-archiver command that packs it."),
    ] = False,
    sign: Annotated[Path | None, typer.Option(metavar="KEY", help="Private key (PEM) that signs the archive.")] = None,
    matrix: Annotated[
        bool,
        typer.Option("--matrix", help="Make every combination of format and precision, side by side; pack nothing."),
    ] = False,
    best: Annotated[
        bool, typer.Option("--best", help="Make the matrix, and pack the fastest combination that passes.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the matrix's report.", show_default="reports/NAME-matrix"),
    ] = None,
) -> dict[str, Any]:
    """Convert a checkpoint, compare the artifact with it, and pack an archive only if they agree."""
    from export.errors import ExportError, GateError  # noqa: PLC0415
    from export.options import resolve_thresholds  # noqa: PLC0415
    from export.pipeline import ExportOptions, export_archive  # noqa: PLC0415  # torch takes seconds to import
    from export.table import Columns  # noqa: PLC0415
    from export.yaml_file import read_arguments  # noqa: PLC0415

    if model is not None and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` does: the user's package often lies where they stand
    options = ExportOptions(
        source=source,
        format=format or "torchscript",
        precision=precision or "fp32",
        method=method,
        device=device,
        name=(source.resolve().name if source.is_dir() else source.stem) if name is None else name,
        version=version,
        out=out,
        factory=model,
        factory_config=None if config is None else read_arguments(config),
        signature_file=signature,
        evaluation=eval,
        calibration=calibration,
        columns=None if columns is None else Columns.parse(columns),
        thresholds=thresholds,
        allow_slower=allow_slower,
        model_card=model_card,
        licence=licence,
        staging_only=staging_only,
        signing_key=sign,
    )
    if matrix or best:
        from export.matrix_cli import export_matrix  # noqa: PLC0415  # matplotlib takes half a second to import

        return export_matrix(
            replace(options, format="torchscript", precision="fp32"),
            formats=() if format is None else (format,),
            precisions=() if precision is None else (precision,),
            best=best,
            report=report,
            say=_say_what_was_written,
        )
    if report is not None:
        raise ExportError("--report is where --matrix and --best put their page; give one of them, or leave it")
    title = f"{options.name} {version}: {options.combination}"
    try:
        with Console(stderr=True).status("starting") as status:
            written = export_archive(options, step=status.update)
    except GateError as error:
        if error.gates:
            Console(stderr=True).print(_gate_table(error.gates, title))
        raise
    console = Console()
    console.print(_gate_table(written.gates, title))
    if looser := resolve_thresholds(options, options.precision).looser_than_defaults(options.precision):
        console.print(looser, soft_wrap=True)
    _say_what_was_written(console, written)
    return {"ok": True, **written.to_document()}


def _gate_table(gates: Sequence[GateResult], title: str) -> Table:
    table = Table("gate", "result", "what was found", title=escape(title))
    for gate in gates:
        table.add_row(escape(gate.gate), "[green]passed" if gate.passed else "[red]failed", escape(gate.detail))
    return table


def _say_what_was_written(console: Console, report: ExportReport) -> None:
    from export.archive import signature_path  # noqa: PLC0415

    if not report.evaluated:
        console.print(
            "No evaluation data: only random inputs were compared. Give --eval DATA to check the task itself."
        )
    size = f"{report.bytes / 1e6:.2f} MB"
    if report.staged is None:
        signed = report.archive is not None and signature_path(report.archive).exists()
        console.print(f"wrote {escape(str(report.archive))} ({size}{', signed' if signed else ''})", soft_wrap=True)
    else:
        console.print(
            f"wrote {escape(str(report.staged.path))} ({size}); its pack.sh packs it, or inside of it", soft_wrap=True
        )
        console.print(escape(report.staged.command), soft_wrap=True)


def inspect(
    archive: Annotated[Path, typer.Argument(help="The .mar file.")],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Load the model in this process (code of eager archives runs) and replay its golden samples.",
        ),
    ] = False,
    public_key: Annotated[
        Path | None, typer.Option(metavar="KEY", help="Public key (PEM) that must have signed the archive.")
    ] = None,
) -> dict[str, Any]:
    """Show what an archive holds, after checking every byte of it."""
    from export.description import describe  # noqa: PLC0415
    from export.inspection import inspect_archive  # noqa: PLC0415  # torch takes seconds to import

    inspection = inspect_archive(archive, verify=verify, public_key=public_key)
    table = Table(show_header=False, title=f"{inspection.archive.name} {inspection.archive.version}")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in describe(inspection):
        table.add_row(escape(key), escape(value))  # labels such as [/INST] are not markup
    Console().print(table)
    return {"ok": True, **inspection.to_document()}
