"""``export --matrix`` and ``export --best``: what the command does with these two."""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from export.archive import check_name
from export.errors import ExportError
from export.matrix import Matrix, pack_best, run_matrix
from export.matrix_report import check_folder, write_report
from export.matrix_table import print_matrix
from export.options import ExportOptions, check_options
from export.pipeline import ExportReport

Say = Callable[[Console, ExportReport], None]


def export_matrix(
    options: ExportOptions,
    *,
    formats: Sequence[str],
    precisions: Sequence[str],
    best: bool,
    report: Path | None,
    say: Say,
) -> dict[str, Any]:
    """Make the matrix, write its report, and pack the best combination if that was asked for.

    Args:
        options: Its format and precision do not count.
        formats: Only these; empty for all.
        precisions: Only these; empty for all.
        best: Whether to pack.
        report: Folder of the report; None for ``reports/NAME-matrix``.
        say: Tells what was packed.

    Raises:
        ExportError: If an option cannot be used, or the archive or the report cannot be written.
    """
    report = report or Path("reports") / f"{options.name}-matrix"
    _check(options, best=best)
    check_folder(report)
    with tempfile.TemporaryDirectory(prefix="torchport-matrix-") as folder:
        with Console(stderr=True).status("starting") as status:
            matrix = run_matrix(
                options, Path(folder), formats=formats, precisions=precisions, step=_escaped(status.update)
            )
        files = write_report(matrix, report, command=shlex.join(["torchport", *sys.argv[1:]]))
        console = Console()
        print_matrix(matrix, console)
        console.print(f"report {escape(str(files.page))}", soft_wrap=True)
        packed = _pack(options, matrix) if best and matrix.ok else None
    if packed is not None:
        say(console, packed)
    return {
        "ok": matrix.ok,
        **matrix.to_document(),
        "report": str(files.page),
        "results": str(files.results),
        "packed": None if packed is None else packed.to_document(),
    }


def _pack(options: ExportOptions, matrix: Matrix) -> ExportReport:
    with Console(stderr=True).status("packing") as status:
        return pack_best(options, matrix, step=_escaped(status.update))


def _escaped(update: Callable[[str], None]) -> Callable[[str], None]:
    return lambda words: update(escape(words))


def _check(options: ExportOptions, *, best: bool) -> None:
    if best:
        check_options(options)
        return
    check_name(options.name, "model name")
    for given, name in (
        (options.staging_only, "--staging-only"),
        (options.signing_key is not None, "--sign"),
        (options.model_card is not None, "--model-card"),
        (options.licence is not None, "--licence"),
    ):
        if given:
            raise ExportError(f"--matrix alone packs nothing, so there is no use for {name}; add --best, or leave it")
