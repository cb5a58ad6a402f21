"""The plots of the matrix, as SVG that takes its colours and font from the page around it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from export.matrix_entries import PASSED, Entry, Matrix
from export.ranking import speed_of
from export.speed import Timing

# Stand-ins that no plot needs for itself; each becomes a CSS variable, so light, dark and print come from the page.
_INK, _MUTED, _GRID = "#010101", "#020202", "#030303"
_FORMATS = {"torchscript": "#040404", "onnx": "#050505", "pt2": "#060606", "eager": "#070707"}
_CSS_COLOURS = {
    _INK: "var(--ink)",
    _MUTED: "var(--muted)",
    _GRID: "var(--line)",
    **{colour: f"var(--{format})" for format, colour in _FORMATS.items()},
}
# A format is a colour, a precision is a shape: both can be told apart where colours cannot.
_MARKERS = {"fp32": "o", "bf16": "s", "fp16": "D", "int8": "^"}
_LINES: dict[str, Any] = {"fp32": "-", "bf16": (0, (5, 2)), "fp16": (0, (7, 2, 1, 2)), "int8": (0, (1.5, 1.5))}
_STYLE: dict[Any, Any] = {
    "axes.edgecolor": _GRID,
    "axes.grid": True,
    "axes.labelcolor": _MUTED,
    "axes.titlecolor": _MUTED,
    "axes.titlesize": 10,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 10,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": _INK,
    "lines.linewidth": 1.6,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "svg.hashsalt": "torchport",  # the same result gives the same file
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
}
_WIDTH_IN, _HEIGHT_IN = 8.0, 4.0
_LEGEND_COLUMNS = 4
_MANY = 5  # batch sizes, from which on all ticks would touch


def plot_speed_against_size(matrix: Matrix) -> str:
    """Samples a second against megabytes: up and to the left is better. Hollow: slower than it may be."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), layout="constrained")
        axes = figure.add_subplot()
        for entry in matrix.measured:
            size_mb = (entry.bytes or 0) / 1e6
            axes.plot([size_mb], [speed_of(entry.timings)], linestyle="none", markersize=9, **_looks(entry))
        axes.set_xlim(left=0)
        axes.margins(0.12)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("size of the artifact, MB")
        axes.set_ylabel("samples per second")
        axes.yaxis.set_major_formatter(FuncFormatter(_plain))
        axes.tick_params(length=0)
        _add_legend(figure, axes)
        return _to_svg(figure, "size")


def plot_speed_by_batch(matrix: Matrix) -> str:
    """Samples a second by batch size, one drawing for each size of the dynamic axes."""
    with matplotlib.rc_context(_STYLE):
        groups = list(dict.fromkeys(_title(timing) for entry in matrix.measured for timing in entry.timings))
        figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), layout="constrained")
        drawings: list[Axes] = list(figure.subplots(1, len(groups), sharey=True, squeeze=False)[0])
        for axes, title in zip(drawings, groups, strict=True):
            axes.set_title(title, loc="left")
            for entry in matrix.measured:
                points = sorted((one.shape.batch, one.samples_per_s) for one in entry.timings if _title(one) == title)
                axes.plot(*zip(*points, strict=True), linestyle=_LINES[entry.combination.precision], **_looks(entry))
            _scale(axes, {timing.shape.batch for entry in matrix.measured for timing in entry.timings})
            axes.set_xlabel("batch size")
        drawings[0].set_ylabel("samples per second")
        _add_legend(figure, drawings[0])
        return _to_svg(figure, "batch")


def _title(timing: Timing) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in timing.shape.sizes.items())


def _looks(entry: Entry) -> dict[str, Any]:
    colour = _FORMATS[entry.combination.format]
    return {
        "color": colour,
        "marker": _MARKERS[entry.combination.precision],
        "markerfacecolor": colour if entry.status == PASSED else "none",
        "label": entry.name,
    }


def _scale(axes: Axes, batches: Iterable[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted(batches)
    axes.set_xticks(ticks if len(ticks) < _MANY else ticks[::2], minor=False)
    axes.xaxis.set_major_formatter(FuncFormatter(_plain))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(_plain))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_minor_locator(NullLocator())
    axes.tick_params(length=0)


def _plain(value: float, _: object) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else f"{value:g}"


def _add_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=_LEGEND_COLUMNS, handlelength=2.6)


def _to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for the middle of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Two drawings share one page, so each keeps its ids to itself.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    # The page decides on size and font; matplotlib measured the text with its own, which is close enough.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: (\d+)px [^;\"]*", r"font-size: \1px", svg)
    for stand_in, variable in _CSS_COLOURS.items():
        svg = svg.replace(stand_in, variable)
    return svg
