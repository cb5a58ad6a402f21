"""Whole requests in process: from the bytes of a body to the bytes of an answer, with no server and no HTTP.

The other limit (`compare_limit.py`) begins with decoded samples; what a server can reach is bounded by decoding too,
where that costs as much as computing: images. Three ways, which take turns:

- one request at a time: what a lone client would wait for without a server;
- batches, one after the other: what the threads of one batch can do;
- the same, on as many threads side by side as the cores have room for: nothing on these cores can do more in a process.

Of the batch sizes tried, the fastest counts: on a CPU, the largest batch is not always that.
"""

import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

from handlers.decoder import Decoded
from loadtest.peers.model import PeerModel

BATCHES = (1, 8, 32)
STAGES = ("decode", "stack", "compute", "encode")
# Of one way before the next has its turn.
_SLICE_S = 0.3

Read = Callable[[bytes], Decoded]


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """What one artifact answers in process.

    Attributes:
        alone_ms: Median milliseconds of one request at a time.
        one_per_s: Requests per second, one batch after the other.
        one_batch: The size of these batches.
        all_per_s: Requests per second of all lanes together.
        all_batch: The size of their batches.
        lanes: Threads side by side, each with batches of its own.
        stages_ms: By batch size, the median milliseconds of a request's share in each of `STAGES`.
    """

    alone_ms: float
    one_per_s: float
    one_batch: int
    all_per_s: float
    all_batch: int
    lanes: int
    stages_ms: dict[int, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        """As JSON-serialisable values."""
        return {**asdict(self), "stages_ms": {str(size): stages for size, stages in self.stages_ms.items()}}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        stages = {int(size): each for size, each in document["stages_ms"].items()}
        return cls(**{**document, "stages_ms": stages})


def measure_whole(
    model: PeerModel, read: Read, queue: Sequence[bytes], *, lanes: int, duration_s: float, slice_s: float = _SLICE_S
) -> Whole:
    """Measures all three ways.

    Args:
        model: Warm.
        read: Decodes one body.
        queue: Bodies in the order of their arrival.
        lanes: Threads side by side.
        duration_s: Seconds for all of it; every way has one turn at least.
        slice_s: Seconds of one turn.
    """
    batches = {size: [queue[i : i + size] for i in range(0, len(queue), size)] for size in BATCHES}
    # A request's share of each stage, for each batch.
    shares: dict[int, list[list[float]]] = {size: [] for size in BATCHES}
    rates: dict[tuple[int, int], list[float]] = {(count, size): [] for count in {1, lanes} for size in BATCHES}
    start_s = time.perf_counter()
    while not all(rates.values()) or time.perf_counter() - start_s < duration_s:
        for (count, size), found in rates.items():
            timed = [shares[size] if count == 1 else [] for _ in range(count)]
            found.append(_rate(model, read, batches[size], timed, slice_s))
    best = {
        count: max(((statistics.median(rates[count, size]), size) for size in BATCHES), key=lambda pair: pair[0])
        for count in {1, lanes}
    }
    return Whole(
        alone_ms=statistics.median(sum(each) for each in shares[1]) * 1e3,
        one_per_s=best[1][0],
        one_batch=best[1][1],
        all_per_s=best[lanes][0],
        all_batch=best[lanes][1],
        lanes=lanes,
        stages_ms={
            size: {stage: statistics.median(each[place] for each in found) * 1e3 for place, stage in enumerate(STAGES)}
            for size, found in shares.items()
        },
    )


def answer_batch(model: PeerModel, read: Read, bodies: Sequence[bytes]) -> tuple[list[bytes], list[float]]:
    """Answers a batch.

    Returns:
        The answers' bytes, and the seconds of each of `STAGES`.
    """
    times = [time.perf_counter()]
    requests = [read(body) for body in bodies]
    times.append(time.perf_counter())
    batch = model.stack([sample for request in requests for sample in request.samples])
    times.append(time.perf_counter())
    outputs = model.compute(batch)
    times.append(time.perf_counter())
    answers = [json.dumps(answer).encode() for answer in model.answer(requests, outputs)]
    times.append(time.perf_counter())
    return answers, [after - before for before, after in itertools.pairwise(times)]


def _rate(
    model: PeerModel,
    read: Read,
    batches: Sequence[Sequence[bytes]],
    timed: Sequence[list[list[float]]],
    slice_s: float,
) -> float:
    """Requests per second of some threads, which take batches in turn; each notes a request's share of its stages."""
    counts = [0] * len(timed)
    ends = [0.0] * len(timed)
    start_s = time.perf_counter()

    def work(lane: int) -> None:
        place = lane
        while (now_s := time.perf_counter()) - start_s < slice_s or not counts[lane]:
            bodies = batches[place % len(batches)]
            _, seconds = answer_batch(model, read, bodies)
            timed[lane].append([each / len(bodies) for each in seconds])
            counts[lane] += len(bodies)
            place += len(timed)
        ends[lane] = now_s

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(len(timed))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Each over its own time: the last batches do not end together.
    return sum(count / (end_s - start_s) for count, end_s in zip(counts, ends, strict=True))
