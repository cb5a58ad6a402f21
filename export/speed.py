"""Speed of artifacts in process: side by side, on this machine.

Wall-clock times of one artifact scatter by tens of percent from minute to minute on a shared machine; the ratio of
two that take turns does not. So artifacts are measured in rounds, each of which runs all of them one after the other,
and the ratios are the medians over the rounds.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from export.gates import GateResult
from export.inputs import random_batch
from export.thresholds import Thresholds
from handlers.backend import Backend
from handlers.model import DEFAULT_MAX_BATCH
from handlers.signature import Signature
from handlers.tensors import TensorBatch

SPEED_GATE = "speed"
BATCH_SIZES = (1, 8, DEFAULT_MAX_BATCH)
ROUNDS = 9
# Short batches run several times in a round: the clock and the scheduler are no finer.
_ROUND_S = 0.01
_MAX_RUNS = 100
# The profiling executor of TorchScript records on the first run and optimises on the second.
_WARM_UP_RUNS = 3
# All of one shape, warm-up included. Long batches get fewer rounds, at least three.
_SHAPE_S = 8.0
_LEAST_ROUNDS = 3
_MAX_POSITIONS = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """The shape of a batch to measure.

    Attributes:
        batch: Samples.
        sizes: Size of every dynamic axis by its name.
    """

    batch: int
    sizes: Mapping[str, int]

    def __str__(self) -> str:
        return ", ".join([f"batch {self.batch}", *(f"{axis} {size}" for axis, size in self.sizes.items())])


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """How fast one artifact is with batches of one shape.

    Attributes:
        shape: The batch.
        ms: Median time of one batch, in milliseconds, copies to and from the device included.
        samples_per_s: Samples computed in a second at that time.
        ratio: Median over the rounds of this artifact's time over the first one's; 1 for the first one itself.
        rounds_s: Seconds of one batch, round by round, for comparisons with others that took turns with it.
    """

    shape: Shape
    ms: float
    samples_per_s: float
    ratio: float
    rounds_s: tuple[float, ...] = ()

    def to_document(self) -> dict[str, Any]:
        """The JSON form, without the rounds."""
        document = asdict(self)
        del document["rounds_s"]
        return document


def shapes_to_measure(signature: Signature) -> tuple[Shape, ...]:
    """A few batch sizes, each with dynamic axes at a quarter of their longest and at their longest."""
    shapes = []
    for batch in BATCH_SIZES:
        if not signature.axes:
            shapes.append(Shape(batch=batch, sizes={}))
            continue
        for share in (4, 1):
            sizes = {name: max(axis.minimum, axis.maximum // share) for name, axis in signature.axes.items()}
            limit = max(1, _MAX_POSITIONS // math.prod(sizes.values()))
            shape = Shape(batch=min(batch, limit), sizes=sizes)
            if shape not in shapes:
                shapes.append(shape)
    return tuple(shapes)


def measure(
    backends: Mapping[str, Backend],
    signature: Signature,
    *,
    shapes: Sequence[Shape] | None = None,
    rounds: int = ROUNDS,
    limit_s: float = _SHAPE_S,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Timing]]:
    """Measure artifacts side by side.

    Args:
        backends: What to measure, by name; ratios are to the first one. Each has its threads already.
        signature: Of all of them.
        shapes: What to measure with; by default :func:`shapes_to_measure`.
        rounds: How often each takes its turn.
        limit_s: Time for one shape, warm-up included, after which there are no more rounds than the least.
        clock: Seconds.

    Returns:
        One timing a shape for each name.
    """
    timings: dict[str, list[Timing]] = {name: [] for name in backends}
    for shape in shapes_to_measure(signature) if shapes is None else shapes:
        batch = random_batch(signature, shape.batch, sizes=shape.sizes or None)
        times = _take_turns(list(backends.values()), batch, rounds=rounds, limit_s=limit_s, clock=clock)
        first = times[0]
        for name, seconds in zip(backends, times, strict=True):
            median = statistics.median(seconds)
            timings[name].append(
                Timing(
                    shape=shape,
                    ms=median * 1e3,
                    samples_per_s=shape.batch / median,
                    ratio=statistics.median(own / base for own, base in zip(seconds, first, strict=True)),
                    rounds_s=tuple(seconds),
                )
            )
    return timings


def _take_turns(
    backends: Sequence[Backend], batch: TensorBatch, *, rounds: int, limit_s: float, clock: Callable[[], float]
) -> list[list[float]]:
    """Seconds a batch, one list a backend with one number a round."""
    start = clock()
    runs = []
    for backend in backends:
        for _ in range(_WARM_UP_RUNS):
            began = clock()
            backend.run(batch)
            took = clock() - began
        runs.append(min(_MAX_RUNS, max(1, math.ceil(_ROUND_S / max(took, 1e-9)))))
    times: list[list[float]] = [[] for _ in backends]
    for number in range(rounds):
        # There and back, so that nobody always runs on a cache that another one has just filled.
        order = range(len(backends)) if number % 2 == 0 else reversed(range(len(backends)))
        for i in order:
            began = clock()
            for _ in range(runs[i]):
                backends[i].run(batch)
            times[i].append(max((clock() - began) / runs[i], 1e-9))
        if number + 1 >= _LEAST_ROUNDS and clock() - start > limit_s:
            break
    return times


def mean_ratio(timings: Sequence[Timing]) -> float:
    """The geometric mean of the ratios over all shapes: twice as fast and twice as slow make 1."""
    return math.exp(statistics.fmean(math.log(timing.ratio) for timing in timings))


def speed_gate(
    candidate: Backend, baseline: Backend, signature: Signature, thresholds: Thresholds, *, allow_slower: bool
) -> GateResult:
    """Refuse an artifact of a lower precision that is slower than the fp32 artifact of the same format.

    Args:
        candidate: The artifact; one thread.
        baseline: The fp32 artifact of the same format; one thread.
        signature: Of both.
        thresholds: ``slowdown`` counts here.
        allow_slower: Let it pass all the same; the result then says how slow it is.
    """
    timings = measure({"fp32": baseline, "candidate": candidate}, signature)["candidate"]
    ratio = mean_ratio(timings)
    fast_enough = ratio <= thresholds.slowdown
    slowest, fastest = max(timings, key=_ratio), min(timings, key=_ratio)
    detail = (
        f"{1 / ratio:.2f} times as fast as fp32 with one thread, from {1 / slowest.ratio:.2f} ({slowest.shape}) to "
        f"{1 / fastest.ratio:.2f} ({fastest.shape})"
    )
    if not fast_enough:
        detail += "; slower, and allowed" if allow_slower else "; serve fp32, or give --allow-slower"
    return GateResult(
        gate=SPEED_GATE, passed=fast_enough or allow_slower, measured=ratio, bound=thresholds.slowdown, detail=detail
    )


def _ratio(timing: Timing) -> float:
    return timing.ratio
