"""A benchmark in a terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from export.bench import Bench
from export.bench_limit import ANSWERED, PADDED, PLANNED, Throughput
from export.bench_points import Latency
from export.matrix_format import ABSENT, megabytes, milliseconds, rate

_WAYS = {
    PADDED: "batches of {} in arrival order, padded",
    PLANNED: "{} samples in flight, grouped by the planner",
    ANSWERED: "{} requests in flight, bytes in, bytes out",
}


def print_bench(bench: Bench, console: Console) -> None:
    """Print the points, the limit, one request alone, and the memory."""
    archive, artifact = bench.inspection.archive, bench.inspection.signature.artifact
    kind = "" if artifact is None else f", {artifact.format} {artifact.precision} on {artifact.device}"
    threads = bench.options.threads
    console.print(_points(bench, f"{archive.name} {archive.version}{kind}, {threads} thread{'s'[: threads != 1]}"))
    console.print(_limit(bench))
    alone = bench.limit.alone
    console.print(f"one request at a time, bytes in, bytes out: {_percentiles(alone)}", soft_wrap=True)
    memory = bench.memory
    gpu = "" if memory.gpu_bytes is None else f", {megabytes(memory.gpu_bytes)} MB of the GPU"
    console.print(
        f"memory of a fresh process: {megabytes(memory.peak_bytes)} MB at most, of which "
        f"{megabytes(memory.before_bytes)} MB before it loads the model{gpu}",
        soft_wrap=True,
    )
    if bench.disturbed:
        console.print(
            f"[yellow]other processes ran on this one's core: it got {bench.cpu_share:.0%} of the time; "
            "measure again on a quiet machine[/]",
            soft_wrap=True,
        )
    best = bench.limit.best
    console.print(f"[bold green]limit: {rate(best.samples_per_s)} samples/s[/] ({_words(best)})", soft_wrap=True)


def _points(bench: Bench, title: str) -> Table:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=0)
    axes = list(bench.inspection.signature.axes)
    for name in ("batch", *axes, "p50 ms", "p90 ms", "p99 ms", "samples/s", "runs"):
        table.add_column(escape(name), justify="right", no_wrap=True)
    for point in bench.points:
        latency = point.latency
        table.add_row(
            str(point.shape.batch),
            *(str(point.shape.sizes[axis]) for axis in axes),
            milliseconds(latency.p50_ms),
            milliseconds(latency.p90_ms),
            ABSENT if latency.p99_ms is None else milliseconds(latency.p99_ms),
            rate(point.samples_per_s),
            f"{latency.runs:,}",
        )
    return table


def _limit(bench: Bench) -> Table:
    limit, workload = bench.limit, bench.workload
    sizes = "".join(
        f", {axis} {found['minimum']:g} to {found['maximum']:g}, on average {found['mean']:.3g}"
        for axis, found in workload.sizes(bench.inspection.signature).items()
    )
    title = f"{limit.samples:,} samples a round, drawn from {len(workload.requests):,}: {workload.source}{sizes}"
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, padding=0)
    table.add_column("way")
    for name in ("samples/s", "slowest", "fastest", "padding"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in limit.throughputs:
        table.add_row(
            _words(one),
            rate(one.samples_per_s),
            rate(one.slowest),
            rate(one.fastest),
            ABSENT if one.padding is None else f"{one.padding:.0%}",
        )
    return table


def _words(one: Throughput) -> str:
    return _WAYS[one.way].format(one.in_flight)


def _percentiles(latency: Latency) -> str:
    p99 = "" if latency.p99_ms is None else f", p99 {milliseconds(latency.p99_ms)} ms"
    return f"p50 {milliseconds(latency.p50_ms)} ms, p90 {milliseconds(latency.p90_ms)} ms{p99}"
