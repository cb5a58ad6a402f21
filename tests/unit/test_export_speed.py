"""Speed: artifacts take turns, and one that is slower than fp32 is refused unless asked for. The clock is a fake."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest

from export.speed import Shape, Timing, mean_ratio, measure, shapes_to_measure, speed_gate
from export.thresholds import Thresholds
from handlers.signature import Signature
from handlers.tensors import Array, Axis

INT8 = Thresholds.of("int8")


class Clock:
    """Seconds that pass only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Takes:
    """A backend that takes a time for each sample; the machine slows down as it goes."""

    device = "cpu"

    def __init__(self, clock: Clock, seconds: float, log: list[float]) -> None:
        self._clock = clock
        self._seconds = seconds
        self._log = log

    def run(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        self._log.append(self._seconds)
        self._clock.now += self._seconds * len(batch["image"]) * (1 + self._clock.now / 100)
        return {"logits": np.zeros((len(batch["image"]), 3), np.float32)}


def test_they_take_turns_and_the_ratio_is_that_within_a_round(signature: Signature) -> None:
    clock, log = Clock(), list[float]()
    backends = {"fp32": Takes(clock, 0.02, log), "int8": Takes(clock, 0.01, log)}
    shapes = [Shape(batch=1, sizes={}), Shape(batch=4, sizes={})]
    timings = measure(backends, signature, shapes=shapes, rounds=4, clock=clock)
    assert [timing.ratio for timing in timings["fp32"]] == [1.0, 1.0]
    assert [timing.ratio for timing in timings["int8"]] == pytest.approx([0.5, 0.5], rel=0.05)
    assert timings["int8"][1].ms == pytest.approx(40, rel=0.4)
    assert timings["int8"][1].samples_per_s == pytest.approx(100, rel=0.4)
    # After the warm-up, there and back.
    assert log[6:14] == [0.02, 0.01, 0.01, 0.02, 0.02, 0.01, 0.01, 0.02]


def test_long_batches_get_fewer_rounds(signature: Signature) -> None:
    clock, log = Clock(), list[float]()
    measure({"fp32": Takes(clock, 5.0, log)}, signature, shapes=[Shape(batch=1, sizes={})], rounds=99, clock=clock)
    assert len(log) == 6


def test_shapes_cover_batches_and_lengths(signature: Signature) -> None:
    assert [shape.batch for shape in shapes_to_measure(signature)] == [1, 8, 32]
    texts = replace(signature, axes={"length": Axis(minimum=1, maximum=512)})
    assert [str(shape) for shape in shapes_to_measure(texts)] == [
        "batch 1, length 128",
        "batch 1, length 512",
        "batch 8, length 128",
        "batch 8, length 512",
        "batch 32, length 128",
        "batch 16, length 512",
    ]


def test_twice_as_fast_and_twice_as_slow_make_one() -> None:
    timings = [Timing(shape=Shape(batch=1, sizes={}), ms=1, samples_per_s=1, ratio=ratio) for ratio in (0.5, 2.0)]
    assert mean_ratio(timings) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("ratio", "allow", "passed", "said"),
    [
        (0.5, False, True, "2.00 times as fast as fp32"),
        (1.04, False, True, "0.96 times as fast"),
        (1.5, False, False, "serve fp32, or give --allow-slower"),
        (1.5, True, True, "slower, and allowed"),
    ],
)
def test_a_slower_artifact_is_refused_unless_it_is_allowed(
    monkeypatch: pytest.MonkeyPatch, signature: Signature, ratio: float, allow: bool, passed: bool, said: str
) -> None:
    timing = Timing(shape=Shape(batch=1, sizes={}), ms=1, samples_per_s=1, ratio=ratio)
    monkeypatch.setattr("export.speed.measure", lambda backends, signature: {"candidate": [timing]})
    backend = Takes(Clock(), 1, [])
    result = speed_gate(backend, backend, signature, INT8, allow_slower=allow)
    assert (result.gate, result.passed) == ("speed", passed)
    assert result.measured == pytest.approx(ratio)
    assert said in result.detail
