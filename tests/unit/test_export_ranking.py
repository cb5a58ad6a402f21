"""Ranking: the fastest wins, unless something more exact is as fast as chance can tell."""

import pytest

from export.ranking import choose, compare, speed_of
from export.speed import Shape, Timing


def timings(*shapes: tuple[float, ...]) -> list[Timing]:
    """One timing a shape, from its rounds in milliseconds."""
    found = []
    for i, rounds in enumerate(shapes):
        median = sorted(rounds)[len(rounds) // 2] / 1e3
        found.append(
            Timing(
                shape=Shape(batch=2**i, sizes={}),
                ms=median * 1e3,
                samples_per_s=2**i / median,
                ratio=1.0,
                rounds_s=tuple(value / 1e3 for value in rounds),
            )
        )
    return found


STEADY = (10.0, 10.0, 10.0)
PRECISIONS = {"torchscript fp32": "fp32", "torchscript bf16": "bf16", "onnx int8": "int8", "onnx fp16": "fp16"}


def choose_from(**rounds: tuple[float, ...]) -> tuple[str, str]:
    names = {"fp32": "torchscript fp32", "bf16": "torchscript bf16", "fp16": "onnx fp16", "int8": "onnx int8"}
    winner = choose({names[one]: timings(values) for one, values in rounds.items()}, PRECISIONS)
    return winner.name, winner.reason


def test_the_fastest_wins_and_says_by_how_much() -> None:
    name, reason = choose_from(fp32=STEADY, int8=(5.0, 5.0, 5.0))
    assert name == "onnx int8"
    assert reason == "the fastest, 2.00 times as fast as the next one, torchscript fp32"


def test_of_those_as_fast_as_each_other_the_most_exact_wins() -> None:
    name, reason = choose_from(int8=(9.9, 9.9, 9.9), bf16=(9.95, 9.95, 9.95), fp16=STEADY)
    assert name == "onnx fp16"
    assert reason.startswith("onnx int8 is 1.01 times as fast, which is within the noise of 2%, and onnx fp16 is")


def test_of_the_same_precision_the_faster_one_wins_a_tie() -> None:
    own, other = timings((9.9, 9.9, 9.9)), timings(STEADY)
    winner = choose({"onnx fp32": other, "torchscript fp32": own}, {"onnx fp32": "fp32", "torchscript fp32": "fp32"})
    assert winner.name == "torchscript fp32"
    assert "1.01 times as fast as onnx fp32, which is within the noise" in winner.reason


def test_a_scatter_widens_the_margin() -> None:
    calm = compare(timings((9.0, 9.0, 9.0)), timings(STEADY))
    wild = compare(timings((6.0, 9.0, 13.0)), timings(STEADY))
    assert calm.factor == wild.factor == pytest.approx(10 / 9)
    assert not calm.is_tie
    assert wild.is_tie


def test_every_shape_counts_the_same() -> None:
    own = timings((5.0, 5.0, 5.0), (200.0, 200.0, 200.0))
    other = timings(STEADY, (100.0, 100.0, 100.0))
    assert compare(own, other).factor == pytest.approx(1.0)
    assert speed_of(own) == pytest.approx((200 * 10) ** 0.5)


def test_a_single_artifact_wins() -> None:
    assert choose_from(fp32=STEADY) == ("torchscript fp32", "nothing else was measured that passed")
