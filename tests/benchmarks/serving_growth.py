"""Throughput and latency of serving against requests in flight, against length, and against the number of workers.

    python tests/benchmarks/serving_growth.py model_store/tickets.mar --out docs/measured
    python tests/benchmarks/serving_growth.py model_store/digits.mar --in-flight 1,8,64 --seconds 3

Closed loop: so many golden samples in flight, each sent when the one before is answered; latency is then that of a
client who waits for its turn, not of one who comes when he likes (`torchport loadtest --rate` measures that). Lengths
are measured for models with a dynamic axis, all requests of one length. Client and server share this machine's cores;
where the client used more than 90 % of one, the figure is marked with *. Points of a sweep take turns in rounds, and
the best and worst round are kept. Writes growth-NAME.md and growth-NAME.svg; the last line is JSON.
"""

import argparse
import asyncio
import platform
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator
from serving_client import http_message
from serving_load import Load, closed_loop, say_json
from serving_server import Server, golden_answers, golden_message, serving

from export.archive import Archive, open_archive
from export.evaluation import tensor_request, text_request
from export.inputs import random_batch
from export.machine import describe_machine
from handlers.model import ServedModel
from handlers.request import Part

LENGTH_IN_FLIGHT = 32
MOST_CLIENT_CPU = 0.9
# Of a point during which this machine stood still.
TRIES = 5
STYLE = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.linewidth": 0.5,
    "font.size": 9,
    "svg.fonttype": "none",
    "svg.hashsalt": "torchport",  # the same figures give the same file
}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One point of a sweep: medians over its rounds."""

    x: int
    requests_per_s: float
    slowest: float
    fastest: float
    p50_ms: float
    p99_ms: float
    faults: int
    client_cpu_share: float

    @classmethod
    def of(cls, x: int, rounds: Sequence[Load]) -> "Measured":
        rates = [load.rate_rps for load in rounds]
        return cls(
            x=x,
            requests_per_s=round(statistics.median(rates), 1),
            slowest=round(min(rates), 1),
            fastest=round(max(rates), 1),
            p50_ms=round(statistics.median(load.percentile_ms(50) or 0.0 for load in rounds), 3),
            p99_ms=round(statistics.median(load.percentile_ms(99) or 0.0 for load in rounds), 3),
            faults=sum(sum(load.faults.values()) for load in rounds),
            client_cpu_share=round(max(load.client_cpu_share for load in rounds), 3),
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--in-flight", type=numbers, default=[1 << power for power in range(10)])
    parser.add_argument("--lengths", type=numbers, help="by default doubling, from the shortest to the longest")
    parser.add_argument("--workers", type=numbers, default=[1, 2])
    parser.add_argument("--workers-in-flight", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each point and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder for the table and the plot")
    options = parser.parse_args()
    archive = open_archive(options.archive)
    known = golden_answers(archive)
    bodies = by_length(archive, options.lengths)
    sweeps: dict[str, list[Measured]] = {}
    with serving([options.archive], workers=options.workers[0]) as server:
        golden = [golden_message(one, server.token()) for one in known]
        sweeps["in flight"] = sweep(
            server, {count: (golden, count) for count in options.in_flight}, options, "in flight"
        )
        if bodies:
            sized = {length: ([to_message(archive, server, body)], LENGTH_IN_FLIGHT) for length, body in bodies.items()}
            sweeps["length"] = sweep(server, sized, options, f"length, {LENGTH_IN_FLIGHT} in flight")
    over_workers = []
    for count in options.workers:
        with serving([options.archive], workers=count) as server:
            golden = [golden_message(one, server.token()) for one in known]
            over_workers += sweep(
                server,
                {count: (golden, options.workers_in_flight)},
                options,
                f"workers, {options.workers_in_flight} in flight",
            )
    sweeps["workers"] = over_workers
    notes = {
        "in flight": "",
        "length": f", {LENGTH_IN_FLIGHT} in flight",
        "workers": f", {options.workers_in_flight} in flight",
    }
    titles = {name: f"{name}{notes[name]}" for name in sweeps}
    table = markdown(archive, sweeps, titles, options)
    print(table)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"growth-{archive.name}.md").write_text(table)
        plot(sweeps, titles, options.out / f"growth-{archive.name}.svg")
    faults = sum(point.faults for points in sweeps.values() for point in points)
    say_json(
        {
            "ok": not faults,
            "archive": archive.name,
            "sha256": archive.sha256,
            "machine": describe_machine("cpu"),
            "python": platform.python_version(),
            "seconds": options.seconds,
            "rounds": options.rounds,
            "sweeps": {name: [vars(point) for point in points] for name, points in sweeps.items()},
        }
    )


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def sweep(
    server: Server, loads: Mapping[int, tuple[Sequence[bytes], int]], options: argparse.Namespace, what: str
) -> list[Measured]:
    """Each point is (messages, in flight) by what the sweep varies."""
    found: dict[int, list[Load]] = {x: [] for x in loads}
    for number in range(options.rounds):
        for x in loads if number % 2 == 0 else reversed(loads):
            messages, in_flight = loads[x]
            for _ in range(TRIES):
                load = asyncio.run(closed_loop(server.address, messages, in_flight=in_flight, seconds=options.seconds))
                if not load.pauses:
                    break
            found[x].append(load)
            print(f"{what}: {x}, round {number + 1}: {load.to_document()}", flush=True)
    return [Measured.of(x, rounds) for x, rounds in found.items()]


def by_length(archive: Archive, wanted: Sequence[int] | None) -> dict[int, Part]:
    """A request body for each length of the model's dynamic axes; empty if it has none."""
    with tempfile.TemporaryDirectory(prefix="torchport-serving-") as folder:
        archive.extract(Path(folder))
        model = ServedModel.load(Path(folder), threads=1)
        axes = model.signature.axes
        if not axes:
            return {}
        lowest, highest = max(axis.minimum for axis in axes.values()), min(axis.maximum for axis in axes.values())
        lengths = wanted or sorted({highest, *(1 << power for power in range(20) if lowest <= 1 << power <= highest)})
        if model.signature.text is None:
            found = {}
            for length in lengths:
                batch = random_batch(model.signature, 1, sizes={name: length for name in axes})
                request = tensor_request({name: values[0] for name, values in batch.items()})
                found[length] = Part(value=request.body, content_type=request.content_type)
            return found
        return {length: text_of(model, length) for length in lengths}


def text_of(model: ServedModel, length: int) -> Part:
    """A text of so many tokens, or of the fewest above: the tokenizer splits words as it likes."""
    words: list[str] = []
    for word in endless_words():
        words.append(word)
        request = text_request(" ".join(words))
        part = Part(value=request.body, content_type=request.content_type)
        (sample,) = model.decode([part])
        if len(sample[model.signature.inputs[0].name]) >= length:
            return part
    raise AssertionError("words are endless")


def endless_words() -> Iterator[str]:
    while True:
        yield from ("the", "order", "is", "late", "and", "a", "refund", "was", "not", "sent", "to", "my", "account")


def to_message(archive: Archive, server: Server, part: Part) -> bytes:
    assert isinstance(part.value, bytes)
    return http_message(
        "POST",
        f"/predictions/{archive.name}",
        token=server.token(),
        headers=[("Content-Type", part.content_type)],
        body=part.value,
    )


def markdown(
    archive: Archive, sweeps: Mapping[str, Sequence[Measured]], titles: Mapping[str, str], options: argparse.Namespace
) -> str:
    machine = describe_machine("cpu")
    lines = [
        f"{archive.name} {archive.version} on {machine['processor']}, {machine['cores']} cores, client on the same "
        f"ones; closed loop, {options.rounds} rounds of {options.seconds:g} s, medians (slowest to fastest round).",
    ]
    for name, points in sweeps.items():
        lines += ["", f"| {titles[name]} | requests/s | p50 ms | p99 ms |", "|---:|---:|---:|---:|"]
        for point in points:
            mark = "*" if point.client_cpu_share > MOST_CLIENT_CPU else ""
            fault = f" ({point.faults} failed)" if point.faults else ""
            rate = f"{point.requests_per_s:,.0f}{mark} ({point.slowest:,.0f} to {point.fastest:,.0f}){fault}"
            lines.append(f"| {point.x} | {rate} | {point.p50_ms:.3g} | {point.p99_ms:.3g} |")
    return "\n".join(lines) + "\n"


def plot(sweeps: Mapping[str, Sequence[Measured]], titles: Mapping[str, str], path: Path) -> None:
    """Throughput above, latency below, one column a sweep."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.2 * len(sweeps), 4.4), layout="constrained")
        rows = figure.subplots(2, len(sweeps), squeeze=False, sharex="col")
        for column, (name, points) in enumerate(sweeps.items()):
            above, below = rows[0][column], rows[1][column]
            xs = [point.x for point in points]
            above.fill_between(xs, [p.slowest for p in points], [p.fastest for p in points], alpha=0.2, linewidth=0)
            above.plot(xs, [point.requests_per_s for point in points], marker="o", markersize=3)
            above.set_ylim(bottom=0)
            below.plot(xs, [point.p50_ms for point in points], marker="o", markersize=3, label="p50")
            below.plot(xs, [point.p99_ms for point in points], marker="o", markersize=3, label="p99")
            below.set_yscale("log")
            below.set_xscale("log", base=2)
            below.set_xticks(xs, [str(x) for x in xs])
            below.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            below.xaxis.set_minor_locator(NullLocator())
            below.set_xlabel(titles[name])
            if column == 0:
                above.set_ylabel("requests/s")
                below.set_ylabel("latency, ms")
                below.legend(frameon=False)
        figure.savefig(path, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
