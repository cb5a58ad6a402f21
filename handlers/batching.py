"""Batches: from the samples of many requests to arrays that a model takes, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch, TensorSpec


def group(samples: Sequence[TensorBatch], signature: Signature, max_batch: int) -> list[list[int]]:
    """Batches in order of arrival, which pad most; a worker plans better ones (:mod:`handlers.planner`).

    Args:
        samples: Any number of them.
        signature: Which axes are dynamic, and how they are padded.
        max_batch: Samples of the largest batch.

    Returns:
        Positions in ``samples``, each in exactly one batch. Samples of different sizes share one only if every
        dynamic input has a padding.
    """
    dynamic = [spec for spec in signature.inputs if spec.dynamic_axes]
    if all(spec.padding is not None for spec in dynamic):
        alike = [list(range(len(samples)))]
    else:
        by_shape: dict[tuple[tuple[int, ...], ...], list[int]] = {}
        for i, sample in enumerate(samples):
            by_shape.setdefault(tuple(sample[spec.name].shape for spec in dynamic), []).append(i)
        alike = list(by_shape.values())
    return [indices[i : i + max_batch] for indices in alike for i in range(0, len(indices), max_batch)]


def stack(samples: Sequence[TensorBatch], signature: Signature) -> dict[str, Array]:
    """Build one batch, padding the dynamic axes of the smaller samples.

    Args:
        samples: At least one. Inputs without padding must have one size.
        signature: Names, dtypes and padding of the inputs.

    Returns:
        The inputs by name, each ``[batch, ...]``.

    Raises:
        ValueError: If samples of different sizes have no padding.
    """
    return {spec.name: _stack([sample[spec.name] for sample in samples], spec) for spec in signature.inputs}


def _stack(arrays: list[Array], spec: TensorSpec) -> Array:
    shape = arrays[0].shape
    if not spec.dynamic_axes or all(array.shape == shape for array in arrays):
        return np.stack(arrays)
    if spec.padding is None:
        raise ValueError(f"samples of different sizes have no padding for {spec.name}")
    largest = tuple(max(sizes) for sizes in zip(*(array.shape for array in arrays), strict=True))
    batch = np.full((len(arrays), *largest), spec.padding, dtype=spec.numpy_dtype)
    for row, array in zip(batch, arrays, strict=True):
        row[tuple(slice(size) for size in array.shape)] = array
    return batch


def split(outputs: Mapping[str, Array], samples: Sequence[TensorBatch], signature: Signature) -> list[dict[str, Array]]:
    """Give each sample its row of every output, without what padding added to it.

    Args:
        outputs: What the model gave for the batch of ``samples``, by name.
        samples: The samples of that batch, in order.
        signature: Output axes that are called like an input axis have that axis's size.

    Raises:
        ValueError: If there is not one row a sample: rows would go to the wrong requests.
    """
    rows: list[dict[str, Array]] = [{} for _ in samples]
    for spec in signature.outputs:
        output = outputs[spec.name]
        if output.ndim == 0 or len(output) != len(samples):
            raise ValueError(f"the model gave the shape {output.shape} for a batch of {len(samples)}")
        # Positions count the batch axis, which rows do not have.
        cut = {axis - 1: name for axis, name in spec.dynamic_axes.items() if name in signature.axes}
        if not cut:
            for row, values in zip(rows, output, strict=True):
                row[spec.name] = values
            continue
        for row, values, sample in zip(rows, output, samples, strict=True):
            sizes = axis_sizes(sample, signature)
            row[spec.name] = values[
                tuple(slice(sizes[cut[axis]]) if axis in cut else slice(None) for axis in range(values.ndim))
            ]
    return rows


def axis_sizes(sample: TensorBatch, signature: Signature) -> dict[str, int]:
    """The sizes of a sample's dynamic axes by name."""
    return {
        name: sample[spec.name].shape[axis - 1] for spec in signature.inputs for axis, name in spec.dynamic_axes.items()
    }
