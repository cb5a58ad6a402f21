"""The plots of a comparison, in the style of the load test's."""

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from loadtest.compare_result import Cell, Comparison
from loadtest.compare_systems import TORCHPORT, System
from loadtest.plots import GOOD, HIGH, INK, LOG_FROM_RATIO, LOW, MIDDLE, MUTED, STYLE, WIDTH_IN
from loadtest.plots import _to_svg as to_svg

ROW_IN = 0.42
FRAME_IN = 1.2

Row = tuple[System, Cell]


def ranked(comparison: Comparison, users: int) -> list[Row]:
    """The systems measured at a number of users, the fastest first."""
    rows = [(system, comparison.cell(system.name, users)) for system in comparison.plan.systems]
    measured = [(system, cell) for system, cell in rows if cell is not None]
    return sorted(measured, key=lambda row: -row[1].rps)


def plot_throughput(comparison: Comparison, users: int) -> str:
    """A bar a system: its median rate, with the slowest and the fastest round, and the limits as lines."""
    rows = ranked(comparison, users)
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_plot(rows, "right answers per second")
        for place, (system, cell) in enumerate(rows):
            axes.barh(place, cell.rps, height=0.62, color=GOOD if system.name == TORCHPORT else LOW)
            spread = ([cell.rps - cell.lowest_rps], [cell.highest_rps - cell.rps])
            axes.errorbar(cell.rps, place, xerr=spread, color=INK, linewidth=1, capsize=2)
            axes.annotate(
                f"{cell.rps:,.0f}",
                (cell.highest_rps, place),
                (6, 0),
                textcoords="offset points",
                va="center",
                color=INK,
            )
        # One request at a time is no batch: a limit of batches says nothing about it.
        if users > 1:
            _draw_limits(axes, comparison)
            figure.legend(loc="outside upper left", ncols=2, handlelength=1.6)
        axes.set_xlim(left=0)
        axes.margins(x=0.12)
        return to_svg(figure, f"throughput-{users}")


def plot_latency(comparison: Comparison, users: int) -> str:
    """A line a system from its median latency to its 99th percentile."""
    rows = ranked(comparison, users)
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_plot(rows, "milliseconds")
        values = []
        for place, (_, cell) in enumerate(rows):
            ends = [value for value in (cell.p50_ms, cell.p99_ms) if value is not None]
            values += ends
            axes.plot(ends, [place] * len(ends), color=MUTED, linewidth=1.2)
            for value, colour, name in ((cell.p50_ms, LOW, "p50"), (cell.p99_ms, HIGH, "p99")):
                if value is not None:
                    axes.plot(value, place, "o", color=colour, markersize=6, label="" if place else name)
        if values and max(values) > LOG_FROM_RATIO * min(values):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.set_xlim(left=0)
        if values:
            figure.legend(loc="outside upper left", ncols=2, handlelength=1.0)
        return to_svg(figure, f"latency-{users}")


def _new_plot(rows: list[Row], label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, FRAME_IN + ROW_IN * max(1, len(rows))), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yticks(range(len(rows)), [system.title for system, _ in rows], color=INK)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", visible=True)
    axes.tick_params(length=0)
    return figure, axes


def _draw_limits(axes: Axes, comparison: Comparison) -> None:
    lines = [(False, False, "limit, arrival order", MIDDLE), (False, True, "limit, grouped by length", HIGH)]
    if not comparison.one_artifact:
        lines += [(True, False, "torchport's artifact, arrival order", MIDDLE), (True, True, "… grouped", HIGH)]
    for ours, grouped, label, colour in lines:
        value = comparison.limit(ours=ours, grouped=grouped)
        style = (0, (1, 2)) if ours else (0, (4, 3))
        axes.axvline(value, color=colour, linewidth=1.4, linestyle=style, label=f"{label}: {value:,.0f}/s")
