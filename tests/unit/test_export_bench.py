"""The benchmark's measuring: percentiles, turns, the stream and its ways. The clock is a fake wherever time counts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from export.bench_limit import ANSWERED, PADDED, PLANNED, Limit, measure_limit
from export.bench_points import LEAST_RUNS_OF_P99, Latency, measure_points, repeat, shapes_for
from export.bench_workload import Workload, decode_all
from export.errors import MeasurementError
from export.evaluation import LabelledRequest, tensor_request
from export.speed import Shape
from handlers.model import ServedModel
from handlers.signature import Signature
from handlers.tensors import Array


class Clock:
    """Seconds that pass only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Backend:
    """Takes a time for each value of a batch, padding included, that floats add up exactly; remembers the shapes."""

    device = "cpu"

    def __init__(self, clock: Clock, seconds: float = 1 / 1024) -> None:
        self._clock = clock
        self._seconds = seconds
        self.shapes: list[tuple[int, ...]] = []

    def run(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        values = batch["x"]
        self.shapes.append(values.shape)
        self._clock.now += self._seconds * values.size
        return {"y": values.sum(axis=1, keepdims=True).astype(np.float32)}


def rows_signature(**changes: Any) -> Signature:
    """One input of a dynamic length from 1 to 8."""
    spec = {
        "name": "x",
        "dtype": "float32",
        "shape": ["batch", "length"],
        "padding": 0,
        "minimum": 0,
        "maximum": 9,
        **changes,
    }
    return Signature.from_document(
        {
            "format_version": 1,
            "task": "tensor",
            "axes": {"length": {"minimum": 1, "maximum": 8}},
            "inputs": [{key: value for key, value in spec.items() if value is not None}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 1]}],
        }
    )


def request(*values: float) -> LabelledRequest:
    return tensor_request({"x": np.array(values, np.float32)}, where=f"the request of {len(values)}")


def workload(served: ServedModel) -> Workload:
    return decode_all(served, "two lengths", [request(1, 2), request(1, 2, 3, 4, 5, 6)])


def test_percentiles_are_measured_values_and_p99_needs_enough_of_them() -> None:
    latency = Latency.of([number / 1e3 for number in range(1, 101)])
    assert (latency.runs, latency.p50_ms, latency.p90_ms, latency.p99_ms) == (100, 50, 90, 99)
    assert Latency.of([0.001] * (LEAST_RUNS_OF_P99 - 1)).p99_ms is None
    assert Latency.of([0.002]).p50_ms == 2


def test_something_is_repeated_until_the_time_is_over_and_at_least_once() -> None:
    clock = Clock()

    def work() -> None:
        clock.now += 0.25

    assert repeat(work, 1.0, clock) == [0.25] * 4
    assert repeat(work, 0.01, clock) == [0.25]


def test_points_take_turns_there_and_back_and_count_every_run() -> None:
    clock, signature = Clock(), rows_signature()
    backend = Backend(clock)
    shapes = [Shape(batch=1, sizes={"length": 2}), Shape(batch=4, sizes={"length": 8})]
    said: list[str] = []
    short, long = measure_points(backend, signature, shapes, duration_s=1 / 8, rounds=2, clock=clock, step=said.append)
    # After three runs each to warm up: 1/16 s a round, which is 32 runs of the one and 2 of the other.
    assert backend.shapes[:6] == [(1, 2)] * 3 + [(4, 8)] * 3
    assert backend.shapes[6:] == [(1, 2)] * 32 + [(4, 8)] * 4 + [(1, 2)] * 32
    assert short.latency.runs == 64
    assert long.latency.runs == 4
    assert long.latency.p50_ms == 31.25
    assert short.samples_per_s == 512
    assert long.samples_per_s == 128
    assert long.rounds_ms == (31.25, 31.25)
    assert long.to_document()["shape"] == {"batch": 4, "sizes": {"length": 8}}
    assert said[0] == "warming up batch 1, length 2"
    assert len(said) == len(shapes) * (2 + 1)


def test_a_model_that_fails_on_a_shape_gives_a_sentence() -> None:
    class Broken(Backend):
        def run(self, batch: Mapping[str, Array]) -> dict[str, Array]:
            raise RuntimeError("no memory\nat all")

    with pytest.raises(MeasurementError, match="the model fails on batch 2, length 3: no memory at all; leave it out"):
        measure_points(Broken(Clock()), rows_signature(), [Shape(batch=2, sizes={"length": 3})], duration_s=1, rounds=1)


def test_shapes_are_every_batch_size_with_every_length(signature: Signature) -> None:
    rows = rows_signature()
    assert [str(shape) for shape in shapes_for(rows, batch_sizes=[1, 2], lengths=[3, 8])] == [
        "batch 1, length 3",
        "batch 1, length 8",
        "batch 2, length 3",
        "batch 2, length 8",
    ]
    assert [str(shape) for shape in shapes_for(rows, batch_sizes=[4], lengths=[])] == [
        "batch 4, length 2",
        "batch 4, length 8",
    ]
    assert [str(shape) for shape in shapes_for(signature, batch_sizes=[5, 7], lengths=[])] == ["batch 5", "batch 7"]
    assert [shape.batch for shape in shapes_for(signature, batch_sizes=[], lengths=[])] == [1, 8, 32]


@pytest.mark.parametrize("length", [0, 9])
def test_a_length_outside_of_its_axis_is_refused(length: int) -> None:
    with pytest.raises(MeasurementError, match=f"--lengths has {length}, and the axis length runs from 1 to 8"):
        shapes_for(rows_signature(), batch_sizes=[], lengths=[4, length])


def test_lengths_need_a_dynamic_axis(signature: Signature) -> None:
    with pytest.raises(MeasurementError, match="every axis of this one is fixed"):
        shapes_for(signature, batch_sizes=[], lengths=[4])


def limit_of(served: ServedModel, clock: Clock, **changes: Any) -> Limit:
    arguments: dict[str, Any] = {
        "batch": 2,
        "in_flight": [4, 8],
        "duration_s": 0.3,
        "rounds": 3,
        "seed": 1,
        "clock": clock,
        **changes,
    }
    return measure_limit(served, workload(served), **arguments)


def test_every_way_takes_the_same_stream_and_padding_costs_what_it_costs() -> None:
    clock = Clock()
    backend = Backend(clock)
    served = ServedModel(rows_signature(), backend, max_batch=2)
    said: list[str] = []
    limit = limit_of(served, clock, step=said.append)
    assert [(one.way, one.in_flight) for one in limit.throughputs] == [
        (PADDED, 2),
        (PLANNED, 4),
        (PLANNED, 8),
        (ANSWERED, 4),
        (ANSWERED, 8),
    ]
    assert limit.requests == limit.samples
    assert limit.requests % 8 == 0
    draws = workload(served).draw(limit.requests, seed=1)
    lengths = [(2, 6)[i] for i in draws]
    padded = sum(2 * max(pair) for pair in zip(lengths[::2], lengths[1::2], strict=True))
    first = limit.throughputs[0]
    assert first.padding == pytest.approx(1 - sum(lengths) / padded)
    # The same time for each value, padding included; and every round is as long as any other.
    assert first.samples_per_s == pytest.approx(limit.samples / (padded / 1024))
    assert (first.slowest, first.fastest) == (pytest.approx(first.samples_per_s), pytest.approx(first.samples_per_s))
    assert all(one.padding is None for one in limit.throughputs[1:])
    assert limit.best.way in (PADDED, PLANNED)
    assert limit.best.samples_per_s >= first.samples_per_s
    assert limit.to_document()["samples_per_s"] == limit.best.samples_per_s
    # One at a time: two values or six, in a share of the stream.
    assert limit.alone.p50_ms in (pytest.approx(2e3 / 1024), pytest.approx(6e3 / 1024))
    assert len(said) == 1 + 3 * (5 + 1)


def test_answering_is_never_taken_for_the_limit() -> None:
    clock = Clock()
    limit = limit_of(ServedModel(rows_signature(), Backend(clock), max_batch=2), clock)
    faster = tuple(
        replace(one, samples_per_s=one.samples_per_s * 9) if one.way == ANSWERED else one for one in limit.throughputs
    )
    assert replace(limit, throughputs=faster).best == limit.best


def test_samples_that_cannot_be_padded_are_only_planned() -> None:
    clock = Clock()
    served = ServedModel(rows_signature(padding=None), Backend(clock), max_batch=2)
    assert {one.way for one in limit_of(served, clock).throughputs} == {PLANNED, ANSWERED}


def test_a_sample_that_the_model_fails_on_stops_the_benchmark() -> None:
    class Failing(Backend):
        def run(self, batch: Mapping[str, Array]) -> dict[str, Array]:
            raise RuntimeError("a kernel is missing")

    clock = Clock()
    served = ServedModel(rows_signature(), Failing(clock), max_batch=2)
    with pytest.raises(MeasurementError, match=r"fails on a sample of the stream: .* \(a kernel is missing\)"):
        limit_of(served, clock)


def test_a_request_that_is_refused_is_named() -> None:
    served = ServedModel(rows_signature(), Backend(Clock()))
    with pytest.raises(MeasurementError, match=r"the request of 9 is refused: .*length"):
        decode_all(served, "too long", [request(1), request(*[1] * 9)])


def test_a_workload_is_drawn_by_its_seed_and_knows_its_sizes() -> None:
    served = ServedModel(rows_signature(), Backend(Clock()))
    drawn = workload(served)
    assert drawn.draw(50, seed=3) == drawn.draw(50, seed=3) != drawn.draw(50, seed=4)
    assert set(drawn.draw(50, seed=3)) == {0, 1}
    assert drawn.to_document(served.signature) == {
        "source": "two lengths",
        "requests": 2,
        "samples": 2,
        "sizes": {"length": {"minimum": 2, "mean": 4, "maximum": 6}},
    }
