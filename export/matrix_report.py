"""Writes what the matrix found: a page for people, JSON for machines."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from export import matrix_format
from export.atomic import replacing
from export.errors import MeasurementError
from export.matrix_entries import Matrix
from export.matrix_plots import plot_speed_against_size, plot_speed_by_batch
from export.matrix_table import result_of
from export.ranking import speed_of, times_as_fast

PAGE = "matrix.html"
RESULTS = "matrix.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportFiles:
    """Where a report lies.

    Attributes:
        page: The HTML page; it needs no other file and no network.
        results: Everything as JSON.
    """

    page: Path
    results: Path


def check_folder(folder: Path) -> None:
    """Refuse a folder that no report can be written to, before any of the slow steps.

    Raises:
        MeasurementError: If it, or the folder that it would be made in, is a file or read-only.
    """
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise MeasurementError(f"no report can be written to {folder}; give another folder with --report")


def write_report(matrix: Matrix, folder: Path, *, command: str) -> ReportFiles:
    """Write the report, over an earlier one in the same folder.

    Args:
        matrix: What was found.
        folder: Made when missing.
        command: What was typed.

    Raises:
        MeasurementError: If the folder cannot be written.
    """
    files = ReportFiles(page=folder / PAGE, results=folder / RESULTS)
    page = render_page(matrix, command=command).encode()
    results = json.dumps({**matrix.to_document(), "command": command}, indent=1, allow_nan=False).encode() + b"\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, content in ((files.results, results), (files.page, page)):
            with replacing(path) as file:
                file.write(content)
    except OSError as error:
        raise MeasurementError(
            f"cannot write the report to {folder}: {error.strerror}; give another folder with --report"
        ) from error
    return files


def render_page(matrix: Matrix, *, command: str) -> str:
    """The HTML page of one matrix."""
    environment = Environment(
        loader=PackageLoader("export", "."),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("megabytes", "milliseconds", "rate", "times", "small", "share"):
        environment.filters[name] = getattr(matrix_format, name)
    measured = bool(matrix.measured)
    # The plots are our own markup; everything else on the page is escaped.
    return environment.get_template("matrix.html.j2").render(
        matrix=matrix,
        command=command,
        baseline=matrix.entry(matrix.baseline or ""),
        result_of=result_of,
        speed_of=speed_of,
        times_as_fast=times_as_fast,
        size_plot=Markup(plot_speed_against_size(matrix)) if measured else None,
        batch_plot=Markup(plot_speed_by_batch(matrix)) if measured else None,
    )
