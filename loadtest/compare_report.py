"""Writes what a comparison found: a page for people, JSON for machines."""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from loadtest.compare_breakdown import break_down
from loadtest.compare_plots import plot_latency, plot_throughput, ranked
from loadtest.compare_result import Comparison
from loadtest.errors import LoadTestError
from loadtest.files import write_atomically
from loadtest.report import PAGE, RESULTS, format_ms

TEMPLATE = "compare.html.j2"


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareFiles:
    """Where a comparison's report lies.

    Attributes:
        page: The HTML page; it needs no other file and no network.
        results: Everything as JSON, with every round's histogram.
    """

    page: Path
    results: Path


def write_comparison(comparison: Comparison, folder: Path) -> CompareFiles:
    """Writes the report, over an earlier one in the same folder.

    Args:
        comparison: What was found.
        folder: Made when missing.

    Raises:
        LoadTestError: The folder cannot be written.
    """
    files = CompareFiles(page=folder / PAGE, results=folder / RESULTS)
    results = json.dumps(comparison.to_json(), indent=1, allow_nan=False).encode() + b"\n"
    page = render_comparison(comparison).encode()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(files.results, results)
        write_atomically(files.page, page)
    except OSError as error:
        raise LoadTestError(
            f"cannot write the report to {folder}: {error.strerror}; give another folder with --out"
        ) from error
    return files


def render_comparison(comparison: Comparison) -> str:
    """The HTML page."""
    environment = Environment(
        loader=PackageLoader("loadtest", "."),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["ms"] = format_ms
    environment.filters["median"] = statistics.median
    sections = [
        {
            "users": users,
            "rows": ranked(comparison, users),
            # The plots are our own markup; everything else on the page is escaped.
            "throughput": Markup(plot_throughput(comparison, users)),
            "latency": Markup(plot_latency(comparison, users)),
            "breakdown": break_down(comparison, users),
        }
        for users in sorted(comparison.plan.users, reverse=True)
    ]
    return environment.get_template(TEMPLATE).render(comparison=comparison, plan=comparison.plan, sections=sections)
