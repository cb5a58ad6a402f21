import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from handlers.batching import group, split, stack
from handlers.signature import TENSOR, Signature
from handlers.tensors import Axis, TensorSpec

AXES = {"length": Axis(minimum=1, maximum=9), "width": Axis(minimum=1, maximum=9)}


def signature(padding=-1.0):
    return Signature(
        task=TENSOR,
        inputs=(
            TensorSpec(name="ids", dtype="int64", shape=("batch", "length"), padding=padding),
            TensorSpec(name="grid", dtype="float32", shape=("batch", "width", 2, "length"), padding=padding),
            TensorSpec(name="fixed", dtype="float32", shape=("batch", 3)),
        ),
        outputs=(
            TensorSpec(name="tokens", dtype="float32", shape=("batch", "length", 4)),
            TensorSpec(name="both", dtype="float32", shape=("batch", "width", "length")),
            TensorSpec(name="boxes", dtype="int64", shape=("batch", "count")),
            TensorSpec(name="pooled", dtype="float32", shape=("batch",)),
        ),
        axes=AXES,
    )


def sample(length, width, value=1):
    return {
        "ids": np.full(length, value, np.int64),
        "grid": np.full((width, 2, length), value, np.float32),
        "fixed": np.full(3, value, np.float32),
    }


def test_smaller_samples_are_padded_at_the_end_of_each_dynamic_axis():
    batch = stack([sample(2, 3), sample(4, 1)], signature())
    assert batch["ids"].tolist() == [[1, 1, -1, -1], [1, 1, 1, 1]]
    assert batch["grid"].shape == (2, 3, 2, 4)
    assert (batch["grid"][0, :, :, :2] == 1).all()
    assert (batch["grid"][0, :, :, 2:] == -1).all()
    assert (batch["grid"][1, 0] == 1).all()
    assert (batch["grid"][1, 1:] == -1).all()
    assert {name: array.dtype for name, array in batch.items()} == {
        "ids": np.int64,
        "grid": np.float32,
        "fixed": np.float32,
    }


def test_the_batch_does_not_share_memory_with_the_samples():
    first = sample(2, 2)
    stack([first], signature())["fixed"][:] = 9
    assert (first["fixed"] == 1).all()


def test_different_sizes_without_padding_are_our_own_defect():
    with pytest.raises(ValueError, match="no padding for ids"):
        stack([sample(2, 3), sample(4, 1)], signature(padding=None))


def test_with_padding_all_samples_share_batches():
    samples = [sample(length, 1) for length in (1, 2, 3, 4, 5)]
    assert group(samples, signature(), 2) == [[0, 1], [2, 3], [4]]


def test_without_padding_only_equal_sizes_share_a_batch():
    samples = [sample(1, 1), sample(2, 1), sample(1, 1), sample(1, 2), sample(2, 1), sample(1, 1)]
    assert group(samples, signature(padding=None), 2) == [[0, 2], [5], [1, 4], [3]]


def test_no_samples_make_no_batch():
    assert group([], signature(), 4) == []
    assert group([], signature(padding=None), 4) == []


def outputs(batch, length, width):
    return {
        "tokens": np.zeros((batch, length, 4), np.float32),
        "both": np.zeros((batch, width, length), np.float32),
        "boxes": np.zeros((batch, 7), np.int64),
        "pooled": np.arange(batch, dtype=np.float32),
    }


def test_outputs_are_cut_back_to_the_sample_s_own_size():
    samples = [sample(2, 3), sample(4, 1)]
    first, second = split(outputs(2, 4, 3), samples, signature())
    assert {name: value.shape for name, value in first.items()} == {
        "tokens": (2, 4),
        "both": (3, 2),
        "boxes": (7,),
        "pooled": (),
    }
    assert second["both"].shape == (1, 4)
    assert (first["pooled"], second["pooled"]) == (0, 1)


@pytest.mark.parametrize("rows", [1, 3])
def test_another_number_of_rows_is_refused(rows):
    with pytest.raises(ValueError, match="for a batch of 2"):
        split(outputs(rows, 4, 3), [sample(2, 3)] * 2, signature())


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=20),
    st.integers(1, 8),
    st.sampled_from([None, 0.0]),
)
def test_every_sample_is_in_one_batch_and_comes_back_whole(sizes, max_batch, padding):
    spec = signature(padding)
    samples = [sample(*size, value=i) for i, size in enumerate(sizes)]
    batches = group(samples, spec, max_batch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(samples)))
    assert all(len(batch) <= max_batch for batch in batches)
    for batch in batches:
        stacked = stack([samples[i] for i in batch], spec)
        for row, i in enumerate(batch):
            length, width = sizes[i]
            np.testing.assert_array_equal(stacked["ids"][row, :length], samples[i]["ids"])
            np.testing.assert_array_equal(stacked["grid"][row, :width, :, :length], samples[i]["grid"])
