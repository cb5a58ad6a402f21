"""The limit: what one process can compute of a stream of requests, without HTTP and without waiting for anybody.

Serving is held against it: what TorchServe adds can only make it less. The same seeded stream goes through several
ways, which take turns within a round:

=====================  ==========================================================================================
``padded``             samples in their order of arrival, in batches of the archive's size, padded to their longest
``planned``            samples through :meth:`ServedModel.compute`, N in flight at a time: the planner groups them
``answered``           requests through :meth:`ServedModel.answer`, N in flight at a time: bytes in, bytes out
=====================  ==========================================================================================
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

from export.bench_points import Clock, Latency, Step, repeat, there_and_back
from export.bench_workload import Workload
from export.errors import MeasurementError
from handlers.batching import stack
from handlers.errors import RequestError, one_line
from handlers.model import ServedModel
from handlers.signature import Signature
from handlers.tensors import TensorBatch

PADDED = "padded"
PLANNED = "planned"
ANSWERED = "answered"

T = TypeVar("T")

# Of a fast model one pass over the largest number in flight is over in milliseconds; it gets several.
_MOST_PASSES = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Throughput:
    """One way through the stream.

    Attributes:
        way: ``padded``, ``planned`` or ``answered``.
        in_flight: Requests handed over at once; for ``padded``, samples of a batch.
        samples_per_s: Median over the rounds.
        slowest: The slowest round.
        fastest: The fastest round.
        padding: Share of what was computed that was padding; None where that is not known from outside.
    """

    way: str
    in_flight: int
    samples_per_s: float
    slowest: float
    fastest: float
    padding: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Limit:
    """What the model can do at most, and what answering one request after another takes.

    Attributes:
        requests: Requests of the stream that every way takes once a round.
        samples: Samples of them.
        throughputs: Every way.
        alone: One request at a time through ``answer``, bytes in and bytes out.
    """

    requests: int
    samples: int
    throughputs: tuple[Throughput, ...]
    alone: Latency

    @property
    def best(self) -> Throughput:
        """The fastest way to compute decoded samples; ties go to the first."""
        return max((one for one in self.throughputs if one.way != ANSWERED), key=lambda one: one.samples_per_s)

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return {"samples_per_s": self.best.samples_per_s, "way": self.best.way, **asdict(self)}


def measure_limit(
    served: ServedModel,
    workload: Workload,
    *,
    batch: int,
    in_flight: Sequence[int],
    duration_s: float,
    rounds: int,
    seed: int,
    step: Step = lambda words: None,
    clock: Clock = time.perf_counter,
) -> Limit:
    """Measure every way through one seeded stream.

    Args:
        served: The model, warm.
        workload: What the stream is drawn from.
        batch: Samples of a padded batch.
        in_flight: Requests handed over at once.
        duration_s: About how many seconds each way gets over all rounds; one pass a round at least.
        rounds: How often each way takes its turn.
        seed: Of the stream.
        step: Told what comes next: once to begin with, and ``rounds`` times for each way and for one at a time.
        clock: Seconds.

    Raises:
        MeasurementError: If the model fails on a sample.
    """
    step("finding the length of the stream")
    once = workload.draw(max(in_flight), seed=seed)
    _plan_all(served, workload, once, len(once))  # the first pass may compile for shapes it has not seen
    start = clock()
    _plan_all(served, workload, once, len(once))
    passes = math.ceil(duration_s / rounds / max(clock() - start, 1e-9))
    stream = workload.draw(len(once) * min(passes, _MOST_PASSES), seed=seed)
    count = sum(len(workload.samples[i]) for i in stream)
    ways: list[tuple[str, int, Callable[[], None]]] = []
    samples = [sample for i in stream for sample in workload.samples[i]]
    if _can_pad(served.signature, samples):
        ways.append((PADDED, batch, lambda: _pad_all(served, samples, batch)))
    for size in in_flight:
        ways.append((PLANNED, size, lambda size=size: _plan_all(served, workload, stream, size)))  # type: ignore[misc]
    for size in in_flight:
        ways.append((ANSWERED, size, lambda size=size: _answer_all(served, workload, stream, size)))  # type: ignore[misc]
    rates: list[list[float]] = [[] for _ in ways]
    alone: list[float] = []
    following = itertools.cycle(stream)
    for number in range(rounds):
        for i in there_and_back(len(ways), number):
            way, size, run = ways[i]
            step(f"{way}, {size} in flight, round {number + 1} of {rounds}")
            start = clock()
            run()
            rates[i].append(count / max(clock() - start, 1e-9))
        step(f"one at a time, round {number + 1} of {rounds}")
        alone += repeat(lambda: _answer(served, workload, [next(following)]), duration_s / rounds, clock)
    throughputs = [
        Throughput(
            way=way,
            in_flight=size,
            samples_per_s=statistics.median(found),
            slowest=min(found),
            fastest=max(found),
            padding=_padding(samples, served.signature, batch) if way == PADDED else None,
        )
        for (way, size, _), found in zip(ways, rates, strict=True)
    ]
    return Limit(requests=len(stream), samples=count, throughputs=tuple(throughputs), alone=Latency.of(alone))


def _pad_all(served: ServedModel, samples: Sequence[TensorBatch], batch: int) -> None:
    for some in _chunks(samples, batch):
        try:
            served.backend.run(stack(some, served.signature))
        except Exception as error:  # runtimes raise types of their own
            raise MeasurementError(f"the model fails on {len(some)} padded samples: {one_line(error)}") from error


def _plan_all(served: ServedModel, workload: Workload, stream: Sequence[int], in_flight: int) -> None:
    for some in _chunks(stream, in_flight):
        for row in served.compute([sample for i in some for sample in workload.samples[i]]):
            if isinstance(row, RequestError):
                raise _failed(row)


def _answer_all(served: ServedModel, workload: Workload, stream: Sequence[int], in_flight: int) -> None:
    for some in _chunks(stream, in_flight):
        _answer(served, workload, some)


def _answer(served: ServedModel, workload: Workload, numbers: Sequence[int]) -> None:
    for answer in served.answer([workload.requests[i].parts() for i in numbers]):
        if answer.error is not None:
            raise _failed(answer.error)
        json.dumps(answer.body, allow_nan=False).encode()


def _failed(error: RequestError) -> MeasurementError:
    cause = "" if error.__cause__ is None else f" ({one_line(error.__cause__)})"
    return MeasurementError(f"the model fails on a sample of the stream: {error.message}{cause}")


def _chunks(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _can_pad(signature: Signature, samples: Sequence[TensorBatch]) -> bool:
    """Whether any samples can share a batch: inputs without padding must have one size in all of them."""
    return all(
        spec.padding is not None or len({sample[spec.name].shape for sample in samples}) == 1
        for spec in signature.inputs
    )


def _padding(samples: Sequence[TensorBatch], signature: Signature, batch: int) -> float:
    """Share of padding among the values of all inputs."""
    real = padded = 0
    for some in _chunks(samples, batch):
        for spec in signature.inputs:
            shapes = [sample[spec.name].shape for sample in some]
            real += sum(map(math.prod, shapes))
            padded += len(some) * math.prod(max(sizes) for sizes in zip(*shapes, strict=True))
    return 1 - real / padded
