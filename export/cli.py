"""The commands ``export`` and ``inspect``."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def export(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="Run folder or checkpoint file.")],
    format: Annotated[str, typer.Option(help="Artifact format: torchscript or onnx.")] = "torchscript",
    precision: Annotated[str, typer.Option(help="Number format of the weights: fp32.")] = "fp32",
    method: Annotated[str, typer.Option(help="How TorchScript is made: trace or script.")] = "trace",
    name: Annotated[str | None, typer.Option(help="Model name.", show_default="the run's folder name")] = None,
    version: Annotated[str, typer.Option(help="Model version.")] = "1.0",
    out: Annotated[Path, typer.Option(help="Model store to write the archive to.")] = Path("model_store"),
    eval: Annotated[
        Path | None,
        typer.Option(
            metavar="DATA",
            help="Evaluation images, one sub-folder a label.",
            show_default="the held-out split that the checkpoint names",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(metavar="PACKAGE.MODULE:FACTORY", help="What builds the module, for a plain state_dict."),
    ] = None,
    signature: Annotated[Path | None, typer.Option(metavar="FILE", help="Signature, for a plain state_dict.")] = None,
) -> dict[str, Any]:
    """Convert a checkpoint, compare the artifact with it, and pack an archive only if they agree."""
    from export.pipeline import ExportOptions, export_archive  # noqa: PLC0415  # torch takes seconds to import

    if model is not None and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # as `python -m` does: the user's package often lies where they stand
    options = ExportOptions(
        source=source,
        format=format,
        precision=precision,
        method=method,
        name=name or (source.resolve().name if source.is_dir() else source.stem),
        version=version,
        out=out,
        factory=model,
        signature_file=signature,
        evaluation=eval,
    )
    progress = Console(stderr=True)
    with progress.status("starting") as status:
        report = export_archive(options, step=status.update)
    table = Table("gate", "result", "what was found", title=f"{options.name} {version}: {format} {precision}")
    for gate in report.gates:
        table.add_row(gate.gate, "[green]passed" if gate.passed else "[red]failed", escape(gate.detail))
    console = Console()
    console.print(table)
    if not report.evaluated:
        console.print(
            "No evaluation data: only random inputs were compared. Give --eval DATA to check the task itself."
        )
    console.print(f"wrote {escape(str(report.archive))} ({report.bytes / 1e6:.2f} MB)", soft_wrap=True)
    return {"ok": True, **report.to_document()}


def inspect(
    archive: Annotated[Path, typer.Argument(help="The .mar file.")],
    verify: Annotated[
        bool, typer.Option("--verify", help="Load the model in this process and replay the golden samples.")
    ] = False,
) -> dict[str, Any]:
    """Show what an archive holds, after checking every byte of it."""
    from export.inspection import inspect_archive  # noqa: PLC0415  # torch takes seconds to import

    inspection = inspect_archive(archive, verify=verify)
    console = Console()
    table = Table(show_header=False, title=f"{inspection.archive.name} {inspection.archive.version}")
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in _rows(inspection.to_document()):
        table.add_row(escape(key), escape(value))  # labels such as [/INST] are not markup
    console.print(table)
    return {"ok": True, **inspection.to_document()}


def _rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    signature = document["signature"]
    provenance = document["provenance"]
    checkpoint = provenance["checkpoint"]

    def tensors(key: str) -> str:
        return ", ".join(f"{spec['name']} {spec['dtype']} {spec['shape']}" for spec in signature[key])

    replayed = document["golden_difference"]
    return [
        ("digests", f"{len(document['digests'])} files, all as exported"),
        ("sha256", document["sha256"]),
        ("task", signature["task"]),
        ("inputs", tensors("inputs")),
        ("outputs", tensors("outputs")),
        ("labels", ", ".join(signature["labels"])),
        ("artifact", "{format} {precision} ({file})".format(**signature["artifact"])),
        ("checkpoint", f"sha256 {checkpoint['sha256']}, git {checkpoint.get('git_revision') or 'unknown'}"),
        ("metrics", ", ".join(f"{key} {value:.4g}" for key, value in checkpoint["metrics"].items())),
        *((f"gate: {gate['gate']}", gate["detail"]) for gate in provenance["gates"]),
        ("versions", ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())),
        (
            "golden samples",
            f"{document['golden_samples']}"
            + (
                ", not replayed (use --verify)"
                if replayed is None
                else f", replayed: largest difference {replayed:.2g}"
            ),
        ),
    ]
