"""Latency of the artifact alone by batch size and length: ready-made batches in, arrays out.

All points take turns within a round, so that a machine that slows down slows all of them. Percentiles are over every
run of all rounds; the spread is that of the rounds' medians.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from export.errors import MeasurementError
from export.inputs import random_batch
from export.speed import BATCH_SIZES, Shape, shapes_to_measure
from handlers.backend import Backend
from handlers.errors import one_line
from handlers.signature import Signature

# Fewer runs say nothing about the slowest one in a hundred.
LEAST_RUNS_OF_P99 = 100
# The profiling executor of TorchScript records on the first run and optimises on the second.
_WARM_UP_RUNS = 3

Clock = Callable[[], float]
Step = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """How long something takes.

    Attributes:
        runs: How often it was done.
        p50_ms: The median.
        p90_ms: What 90 % do not exceed.
        p99_ms: What 99 % do not exceed; None for fewer than ``LEAST_RUNS_OF_P99`` runs.
    """

    runs: int
    p50_ms: float
    p90_ms: float
    p99_ms: float | None

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Latency:
        """Percentiles of at least one duration."""
        # Values that were measured, none between two of them.
        p50, p90, p99 = np.quantile(np.asarray(seconds) * 1e3, [0.5, 0.9, 0.99], method="inverted_cdf").tolist()
        enough = len(seconds) >= LEAST_RUNS_OF_P99
        return cls(runs=len(seconds), p50_ms=p50, p90_ms=p90, p99_ms=p99 if enough else None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """One batch size with one size of the dynamic axes.

    Attributes:
        shape: The batch.
        latency: Of one batch, copies to and from the device included.
        samples_per_s: Samples computed in all runs, over the time that these took.
        rounds_ms: Median of each round, in order: how steady the machine was.
    """

    shape: Shape
    latency: Latency
    samples_per_s: float
    rounds_ms: tuple[float, ...]

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def shapes_for(signature: Signature, *, batch_sizes: Sequence[int], lengths: Sequence[int]) -> tuple[Shape, ...]:
    """What to measure.

    Args:
        signature: Its dynamic axes.
        batch_sizes: Empty for the usual ones.
        lengths: Sizes that every dynamic axis takes; empty for a quarter of the longest and the longest.

    Raises:
        MeasurementError: If a length is outside of an axis's bounds, or there is no dynamic axis.
    """
    if lengths and not signature.axes:
        raise MeasurementError("--lengths is for models with a dynamic axis, and every axis of this one is fixed")
    for length, (name, axis) in itertools.product(lengths, signature.axes.items()):
        if not axis.minimum <= length <= axis.maximum:
            raise MeasurementError(
                f"--lengths has {length}, and the axis {name} runs from {axis.minimum} to {axis.maximum}"
            )
    if not batch_sizes and not lengths:
        return shapes_to_measure(signature)
    usual = shapes_to_measure(signature)
    sizes = [{name: length for name in signature.axes} for length in lengths] or [dict(shape.sizes) for shape in usual]
    shapes = [Shape(batch=batch, sizes=size) for batch in batch_sizes or BATCH_SIZES for size in sizes]
    return tuple(shape for i, shape in enumerate(shapes) if shape not in shapes[:i])


def measure_points(
    backend: Backend,
    signature: Signature,
    shapes: Sequence[Shape],
    *,
    duration_s: float,
    rounds: int,
    step: Step = lambda words: None,
    clock: Clock = time.perf_counter,
) -> list[Point]:
    """Measure the artifact alone.

    Args:
        backend: The artifact, with its threads.
        signature: Its inputs.
        shapes: The points.
        duration_s: Seconds of each point over all rounds, warm-up not counted; it runs once a round at least.
        rounds: How often each point takes its turn.
        step: Told what comes next: ``rounds + 1`` times each point.
        clock: Seconds.

    Raises:
        MeasurementError: If the model fails.
    """
    batches = [random_batch(signature, shape.batch, sizes=shape.sizes or None) for shape in shapes]
    for shape, batch in zip(shapes, batches, strict=True):
        step(f"warming up {shape}")
        try:
            for _ in range(_WARM_UP_RUNS):
                backend.run(batch)
        except Exception as error:  # runtimes raise types of their own
            raise MeasurementError(
                f"the model fails on {shape}: {one_line(error)}; leave it out with --batch-sizes and --lengths"
            ) from error
    times: list[list[list[float]]] = [[] for _ in shapes]
    for number in range(rounds):
        for i in there_and_back(len(shapes), number):
            step(f"{shapes[i]}, round {number + 1} of {rounds}")
            times[i].append(repeat(lambda i=i: backend.run(batches[i]), duration_s / rounds, clock))  # type: ignore[misc]
    points = []
    for shape, by_round in zip(shapes, times, strict=True):
        every = list(itertools.chain.from_iterable(by_round))
        points.append(
            Point(
                shape=shape,
                latency=Latency.of(every),
                samples_per_s=shape.batch * len(every) / sum(every),
                rounds_ms=tuple(statistics.median(one) * 1e3 for one in by_round),
            )
        )
    return points


def there_and_back(count: int, number: int) -> Sequence[int]:
    """The order of a round: so that nobody always runs on a cache that the same one has just filled."""
    return range(count) if number % 2 == 0 else range(count - 1, -1, -1)


def repeat(run: Callable[[], object], duration_s: float, clock: Clock) -> list[float]:
    """Run something until the time is over, and at least once; the seconds of each run."""
    seconds = []
    start = before = clock()
    while True:
        run()
        now = clock()
        seconds.append(max(now - before, 1e-9))
        before = now
        if now - start >= duration_s:
            return seconds
