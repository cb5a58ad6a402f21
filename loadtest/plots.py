"""The report's plots, as SVG that takes its colours and font from the page around it."""

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from loadtest.result import Result

# Stand-ins that no plot needs for itself; each becomes a CSS variable, so light, dark and print come from the page.
INK, MUTED, GRID = "#010101", "#020202", "#030303"
GOOD, BAD = "#040404", "#050505"
LOW, MIDDLE, HIGH = "#060606", "#070707", "#080808"
CSS_COLOURS = {
    INK: "var(--ink)",
    MUTED: "var(--muted)",
    GRID: "var(--line)",
    GOOD: "var(--good)",
    BAD: "var(--bad)",
    LOW: "var(--low)",
    MIDDLE: "var(--middle)",
    HIGH: "var(--high)",
}

STYLE: dict[Any, Any] = {
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.size": 10,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "savefig.facecolor": "none",
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's font
    "svg.hashsalt": "torchport",  # the same result gives the same file
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
WIDTH_IN, HEIGHT_IN = 8.0, 3.0
LOG_FROM_RATIO = 20.0  # from this spread on, a linear axis presses the median flat
PLOTTED_LEVELS = ((50.0, "p50", LOW), (90.0, "p90", MIDDLE), (99.0, "p99", HIGH))
PERCENTILE_TICKS = (0.0, 50.0, 90.0, 99.0, 99.9, 99.99, 99.999)


def plot_latency_over_time(result: Result) -> str:
    """Percentiles of the right answers of each interval, by the planned send; a gap where there are none.

    Failures are left to the throughput plot: counted as slowest, one in a hundred would erase the p99 line.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_plot("seconds since the start of the window", "latency, ms")
        numbers = _window(result)
        times_s = [(number + 0.5) * result.plan.interval_s for number in numbers]
        curves = [_interval_percentiles(result, number) for number in numbers]
        for column, (_, name, colour) in enumerate(PLOTTED_LEVELS):
            values = [_or_gap(each[column]) for each in curves]
            axes.plot(times_s, values, color=colour, label=name, marker="o", markersize=3)
        _draw_objective(axes, result)
        _scale_latency(axes, [value for each in curves for value in each if value is not None])
        axes.set_xlim(0, result.plan.duration_s)
        _add_legend(figure, axes)
        return _to_svg(figure, "latency")


def plot_throughput(result: Result) -> str:
    """Answers per second, by their arrival: right ones, and failures on top of them."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_plot("seconds since the start of the window", "requests per second")
        numbers = _window(result)
        width_s = result.plan.interval_s
        edges_s = [number * width_s for number in numbers]
        # The last interval may be cut off by the window's end; its rate counts for what there is of it.
        widths_s = [min(width_s, result.plan.duration_s - edge_s) for edge_s in edges_s]
        steps = [result.tally.intervals.get(number) for number in numbers]
        right = [step.right / width if step else 0.0 for step, width in zip(steps, widths_s, strict=True)]
        failed = [step.failed / width if step else 0.0 for step, width in zip(steps, widths_s, strict=True)]
        axes.bar(edges_s, right, widths_s, align="edge", color=GOOD, label="right answers")
        if any(failed):
            axes.bar(edges_s, failed, widths_s, bottom=right, align="edge", color=BAD, label="failed")
        if result.plan.rate_rps is not None:
            axes.axhline(result.plan.rate_rps, color=INK, linewidth=1, linestyle=(0, (4, 3)), label="target")
        axes.set_xlim(0, result.plan.duration_s)
        axes.set_ylim(bottom=0)
        axes.margins(y=0.1)
        _add_legend(figure, axes)
        return _to_svg(figure, "throughput")


def plot_percentiles(result: Result) -> str:
    """Latency by percentile on HdrHistogram's scale, where each further nine takes the same room."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_plot("percentile of the right answers", "latency, ms")
        curves = [(result.tally.service, "from the actual send", LOW, 1.5)]
        if result.plan.open_loop:
            curves.insert(0, (result.tally.latency, "from the planned send", HIGH, 3.5))
        nines = 1.0
        values: list[float] = []
        for histogram, name, colour, width in curves:
            # 100 % lies infinitely far to the right; the last point before it already shows the maximum.
            points = [(1 / (1 - level / 100), value) for level, value in histogram.curve_ms() if level < 100]
            if points:
                axes.plot(*zip(*points, strict=True), color=colour, label=name, linewidth=width)
                nines = max(nines, points[-1][0])
                values += [value for _, value in points]
        _draw_objective(axes, result)
        axes.set_xscale("log")
        ticks = [level for level in PERCENTILE_TICKS if 1 / (1 - level / 100) <= nines * 1.01]
        axes.set_xticks([1 / (1 - level / 100) for level in ticks], [f"{level:g}%" for level in ticks])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlim(1, max(nines, 2.0))
        _scale_latency(axes, values)
        _add_legend(figure, axes)
        return _to_svg(figure, "percentiles")


def _new_plot(x_label: str, y_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, HEIGHT_IN), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.tick_params(length=0)
    return figure, axes


def _window(result: Result) -> range:
    """Numbers of the intervals of the measured window."""
    return range(-(-int(result.plan.duration_s * 1e3) // int(result.plan.interval_s * 1e3)))


def _interval_percentiles(result: Result, number: int) -> list[float | None]:
    step = result.tally.intervals.get(number)
    if step is None:
        return [None for _ in PLOTTED_LEVELS]
    levels = [level for level, _, _ in PLOTTED_LEVELS]
    return step.latency.percentiles_ms(levels)


def _or_gap(value: float | None) -> float:
    """The value, or what matplotlib leaves a gap for."""
    return float("nan") if value is None else value


def _draw_objective(axes: Axes, result: Result) -> None:
    objective_ms = result.plan.slo_p99_ms
    if objective_ms is not None:
        label = f"objective for p99: {objective_ms:g} ms"
        axes.axhline(objective_ms, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=label)


def _scale_latency(axes: Axes, values: Sequence[float]) -> None:
    if values and max(values) > LOG_FROM_RATIO * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(bottom=0)


def _add_legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), handlelength=1.6)


def _to_svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for the middle of a page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Three drawings share one page, so each keeps its ids to itself.
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'href="#', f'href="#{name}-', svg)
    svg = re.sub(r"url\(#", f"url(#{name}-", svg)
    # The page decides on size and font; matplotlib measured the text with its own, which is close enough.
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r"font: (\d+)px [^;\"]*", r"font-size: \1px", svg)
    for stand_in, variable in CSS_COLOURS.items():
        svg = svg.replace(stand_in, variable)
    return svg
