"""Writes what a load test found: a page for people, JSON for machines, a distribution for plotters."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from loadtest.errors import LoadTestError
from loadtest.files import write_atomically
from loadtest.plots import plot_latency_over_time, plot_percentiles, plot_throughput
from loadtest.result import Result

PAGE = "report.html"
RESULTS = "results.json"
DISTRIBUTION = "latency.hgrm"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFiles:
    """Where a report lies.

    Attributes:
        page: The HTML page; it needs no other file and no network.
        results: Everything as JSON.
        distribution: The latency distribution for HdrHistogram's plotters.
    """

    page: Path
    results: Path
    distribution: Path


def check_folder(folder: Path) -> None:
    """Refuses a folder that no report can be written to, before any load is sent.

    Raises:
        LoadTestError: It, or the folder that it would be made in, is a file or read-only.
    """
    nearest = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise LoadTestError(f"no report can be written to {folder}; give another folder with --out")


def write_report(result: Result, folder: Path) -> ReportFiles:
    """Writes the report of one load test, over an earlier one in the same folder.

    Args:
        result: What was found.
        folder: Made when missing.

    Raises:
        LoadTestError: The folder cannot be written.
    """
    files = ReportFiles(page=folder / PAGE, results=folder / RESULTS, distribution=folder / DISTRIBUTION)
    page = render_page(result).encode()
    results = json.dumps(result.to_json(), indent=1, allow_nan=False).encode() + b"\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(files.results, results)
        write_atomically(files.distribution, result.tally.latency.to_hgrm())
        write_atomically(files.page, page)
    except OSError as error:
        raise LoadTestError(
            f"cannot write the report to {folder}: {error.strerror}; give another folder with --out"
        ) from error
    return files


def render_page(result: Result) -> str:
    """The HTML page of one load test."""
    environment = Environment(
        loader=PackageLoader("loadtest", "."),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["ms"] = format_ms
    # The plots are our own markup; everything else on the page is escaped.
    return environment.get_template("report.html.j2").render(
        result=result,
        plan=result.plan,
        tally=result.tally,
        verdict=result.verdict,
        latency=asdict(result.latency),
        service=asdict(result.service),
        send_lag=asdict(result.send_lag),
        latency_plot=Markup(plot_latency_over_time(result)),
        throughput_plot=Markup(plot_throughput(result)),
        percentile_plot=Markup(plot_percentiles(result)),
    )


def format_ms(value: float | None) -> str:
    """A duration in milliseconds with three significant digits or more; a dash where it does not exist."""
    if value is None:
        return "—"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
