"""Random inputs: over the whole range of a signature, and the same every time."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from export.inputs import EXAMPLE_BATCH, example_batch, example_sizes, random_batch, random_samples
from handlers.preprocessing import ImagePreprocessing
from handlers.signature import Signature


def tensor_signature(inputs: list[dict[str, Any]], axes: dict[str, Any] | None = None) -> Signature:
    document: dict[str, Any] = {
        "format_version": 1,
        "task": "tensor",
        "inputs": inputs,
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 2]}],
    }
    return Signature.from_document({**document, "axes": axes} if axes else document)


TEXT = tensor_signature(
    [
        {"name": "ids", "dtype": "int64", "shape": ["batch", "n"], "minimum": 2, "maximum": 5, "padding": 0},
        {"name": "mask", "dtype": "bool", "shape": ["batch", "n"], "minimum": 1, "maximum": 1, "padding": 0},
    ],
    {"n": {"minimum": 2, "maximum": 30}},
)


class TestImages:
    def test_a_batch_covers_the_normalised_range_of_pixels(self, signature: Signature) -> None:
        batch = random_batch(signature, 64)["image"]
        assert (batch.shape, batch.dtype) == ((64, 1, 8, 8), np.float32)
        assert -2 <= batch.min() < -1.95
        assert 1.95 < batch.max() <= 2

    def test_each_channel_has_its_own_range(self, signature: Signature) -> None:
        image = ImagePreprocessing(mode="RGB", height=4, width=5, mean=(0.0, 0.5, 1.0), std=(1.0, 1.0, 0.1))
        batch = random_batch(replace(signature, image=image), 50)["image"]
        assert batch.shape == (50, 3, 4, 5)
        assert [round(float(batch[:, channel].mean())) for channel in range(3)] in ([0, 0, -5], [1, 0, -5])


class TestReproducibility:
    def test_the_same_arguments_give_the_same_and_others_give_others(self, signature: Signature) -> None:
        first = random_batch(signature, 3)["image"]
        assert np.array_equal(first, random_batch(signature, 3)["image"])
        assert not np.array_equal(first, random_batch(signature, 7)["image"][:3])
        assert not np.array_equal(first, random_batch(signature, 3, seed=1)["image"])

    def test_samples_of_a_batch_are_those_asked_for_one_by_one(self) -> None:
        batch = random_batch(TEXT, 4)
        for i, sample in enumerate(random_samples(TEXT, 4)):
            length = len(sample["ids"])
            assert np.array_equal(batch["ids"][i, :length], sample["ids"])
            assert not batch["mask"][i, length:].any()


class TestSizes:
    def test_the_shortest_and_the_longest_come_first_and_all_inputs_agree(self) -> None:
        samples = random_samples(TEXT, 40)
        lengths = [len(sample["ids"]) for sample in samples]
        assert lengths[:2] == [2, 30]
        assert lengths == [len(sample["mask"]) for sample in samples]
        assert min(lengths) == 2
        assert max(lengths) == 30
        assert len(set(lengths)) > 10

    def test_sizes_may_be_given(self) -> None:
        assert random_batch(TEXT, 5, sizes={"n": 17})["ids"].shape == (5, 17)

    def test_without_padding_all_samples_are_the_longest(self) -> None:
        signature = tensor_signature(
            [{"name": "x", "dtype": "float32", "shape": ["batch", "n", 3]}], {"n": {"maximum": 9}}
        )
        assert random_batch(signature, 4)["x"].shape == (4, 9, 3)


class TestValues:
    @pytest.mark.parametrize(
        ("spec", "low", "high"),
        [
            ({"dtype": "float32"}, -1, 1),
            ({"dtype": "float64"}, -1, 1),
            ({"dtype": "float32", "minimum": 0, "maximum": 255}, 0, 255),
            ({"dtype": "float32", "minimum": 5}, 5, 7),
            ({"dtype": "float32", "minimum": 0}, 0, 2),
            ({"dtype": "float32", "maximum": -5}, -7, -5),
            ({"dtype": "int32", "minimum": -3, "maximum": 3}, -3, 3),
            ({"dtype": "int64", "minimum": 7, "maximum": 7}, 7, 7),
            ({"dtype": "bool"}, False, True),
            ({"dtype": "bool", "minimum": 1, "maximum": 1}, True, True),
        ],
    )
    def test_they_fill_the_range_and_never_leave_it(self, spec: dict[str, Any], low: float, high: float) -> None:
        signature = tensor_signature([{"name": "x", "shape": ["batch", 50], **spec}])
        values = random_batch(signature, 50)["x"]
        assert values.dtype == np.dtype(spec["dtype"])
        slack = 0.01 * (float(high) - float(low)) if spec["dtype"].startswith("float") else 0
        assert low <= values.min() <= low + slack
        assert high - slack <= values.max() <= high


class TestExample:
    @pytest.mark.parametrize(
        ("minimum", "maximum"), [(1, 512), (1, 2), (2, 3), (1, 4), (11, 12), (3, 3), (100, 4000), (1, 1)]
    )
    def test_sizes_lie_within_the_bounds(self, minimum: int, maximum: int) -> None:
        signature = replace(TEXT, axes={"n": replace(TEXT.axes["n"], minimum=minimum, maximum=maximum)})
        assert minimum <= example_sizes(signature)["n"] <= maximum
        batch = example_batch(signature)
        assert batch["ids"].shape == (EXAMPLE_BATCH, example_sizes(signature)["n"])

    def test_no_size_is_special(self) -> None:
        """Not one, not a bound, not the batch, not another axis, not a fixed size."""
        names = ("a", "b", "c")
        signature = tensor_signature(
            [{"name": "x", "dtype": "float32", "shape": ["batch", *names, 11]}],
            {name: {"minimum": 1, "maximum": 13} for name in names},
        )
        sizes = example_sizes(signature)
        assert len(set(sizes.values())) == 3
        assert not set(sizes.values()) & {1, EXAMPLE_BATCH, 11, 13}

    def test_samples_differ_in_length_so_that_no_mask_is_left_out(self) -> None:
        batch = example_batch(TEXT)
        assert not batch["mask"].all()
        assert batch["mask"].any(axis=1).all()
