"""Random inputs over the ranges of a signature: the same for the same arguments, on every machine."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from handlers.batching import stack
from handlers.preprocessing import ImagePreprocessing
from handlers.signature import Signature
from handlers.tensors import Array, Axis, TensorBatch, TensorSpec

SEED = 0

EXAMPLE_BATCH = 3
"""Samples of an example. More than one, since compilers take an axis of length one for a constant."""

# Where the signature sets no bound: floats as after normalisation, whole numbers as far as any test needs.
_FLOAT_RANGE = (-1.0, 1.0)
# Size of dynamic axes in an example: long enough to be no special case, short enough to trace quickly.
_EXAMPLE_SIZE = 11


def random_samples(signature: Signature, count: int, *, seed: int = SEED) -> list[TensorBatch]:
    """Random samples: values uniform over their range, sizes of dynamic axes over their bounds.

    The first sample has the shortest axes and the second the longest.

    Args:
        signature: Ranges and axes.
        count: Number of samples.
        seed: Another one gives other samples.

    Returns:
        Arrays by input name, without a batch axis.
    """
    generator = np.random.default_rng([seed, count])
    samples: list[TensorBatch] = []
    for i in range(count):
        sizes = {name: _size(axis, i, generator) for name, axis in sorted(signature.axes.items())}
        samples.append(_sample(signature, sizes, generator))
    return samples


def random_batch(
    signature: Signature, size: int, *, seed: int = SEED, sizes: Mapping[str, int] | None = None
) -> TensorBatch:
    """Random samples as one batch.

    Args:
        signature: Ranges and axes.
        size: Number of samples.
        seed: Another one gives another batch.
        sizes: Size of every dynamic axis, by its name, for all samples. None: they differ and are padded, or are all
            the longest where an input has no padding.

    Returns:
        Arrays by input name, batch axis first.
    """
    if sizes is None and not _can_pad(signature):
        sizes = {name: axis.maximum for name, axis in signature.axes.items()}
    if sizes is None:
        return stack(random_samples(signature, size, seed=seed), signature)
    generator = np.random.default_rng([seed, size])
    return stack([_sample(signature, sizes, generator) for _ in range(size)], signature)


def example_batch(signature: Signature) -> TensorBatch:
    """The batch that compilers see: no dynamic axis has a size of one, of its own bounds, or of another axis.

    With sizes like these no compiler takes an axis for a constant or two axes for one. Where inputs have padding the
    samples differ in size, since a model may leave out its mask when nothing is padded.
    """
    sizes = example_sizes(signature)
    generator = np.random.default_rng(SEED)
    samples = []
    for i in range(EXAMPLE_BATCH):
        shorter = i if _can_pad(signature) else 0
        fitted = {name: max(size - shorter, signature.axes[name].minimum) for name, size in sizes.items()}
        samples.append(_sample(signature, fitted, generator))
    return stack(samples, signature)


def example_sizes(signature: Signature) -> dict[str, int]:
    """Size of every dynamic axis in :func:`example_batch`, by its name."""
    taken = {1, EXAMPLE_BATCH, *(axis for spec in signature.inputs for axis in spec.shape if isinstance(axis, int))}
    sizes: dict[str, int] = {}
    for name, axis in sorted(signature.axes.items()):
        sizes[name] = _example_size(axis, taken)
        taken.add(sizes[name])
    return sizes


def _example_size(axis: Axis, taken: Collection[int]) -> int:
    """The usable size nearest to the usual one; bounds of the axis only where nothing else is left."""
    usual = min(max(_EXAMPLE_SIZE, axis.minimum), axis.maximum)
    reach = range(max(axis.minimum, usual - 64), min(axis.maximum, usual + 64) + 1)
    bounds = (axis.minimum, axis.maximum)
    return min(reach, key=lambda size: (size in taken, size in bounds, abs(size - usual), size))


def _can_pad(signature: Signature) -> bool:
    return all(spec.padding is not None for spec in signature.inputs if spec.dynamic_axes)


def _size(axis: Axis, index: int, generator: np.random.Generator) -> int:
    if index < 2:
        return (axis.minimum, axis.maximum)[index]
    return int(generator.integers(axis.minimum, axis.maximum, endpoint=True))


def _sample(signature: Signature, sizes: Mapping[str, int], generator: np.random.Generator) -> dict[str, Array]:
    if signature.image is not None:
        return {signature.inputs[0].name: _pixels(signature.image, generator)}
    return {spec.name: _values(spec, sizes, generator) for spec in signature.inputs}


def _pixels(image: ImagePreprocessing, generator: np.random.Generator) -> NDArray[np.float32]:
    """Pixels over their whole range, normalised."""
    pixels = generator.random((image.channels, image.height, image.width))
    mean = np.asarray(image.mean).reshape(-1, 1, 1)
    std = np.asarray(image.std).reshape(-1, 1, 1)
    normalised: NDArray[np.float32] = ((pixels - mean) / std).astype(np.float32)
    return normalised


def _values(spec: TensorSpec, sizes: Mapping[str, int], generator: np.random.Generator) -> Array:
    shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape[1:]]
    if spec.dtype.startswith("float"):
        low, high = _float_range(spec)
        # Never beyond the bounds, which rounding to float32 might cross.
        values = np.clip(generator.uniform(low, high, shape).astype(spec.numpy_dtype), low, high)
        return np.asarray(values, dtype=spec.numpy_dtype)
    low, high = _integer_range(spec)
    integers = generator.integers(int(low), int(high), shape, dtype=np.int64, endpoint=True)
    return integers.astype(spec.numpy_dtype)


def value_range(signature: Signature, spec: TensorSpec) -> tuple[Array, Array]:
    """The least and the greatest value that random samples may have: numbers, or ``[channels, 1, 1]`` of images."""
    if signature.image is not None:
        mean, std = (np.asarray(one).reshape(-1, 1, 1) for one in (signature.image.mean, signature.image.std))
        return (0 - mean) / std, (1 - mean) / std
    low, high = _float_range(spec) if spec.dtype.startswith("float") else _integer_range(spec)
    return np.asarray(low), np.asarray(high)


def _integer_range(spec: TensorSpec) -> tuple[float, float]:
    low, high = (0.0, 1.0) if spec.dtype == "bool" else (-np.inf, np.inf)
    return low if spec.minimum is None else spec.minimum, high if spec.maximum is None else spec.maximum


def _float_range(spec: TensorSpec) -> tuple[float, float]:
    """The declared range; with one bound only, a range of the usual width beside it."""
    low, high = _FLOAT_RANGE
    if spec.minimum is not None and spec.maximum is not None:
        return spec.minimum, spec.maximum
    if spec.minimum is not None:
        return spec.minimum, max(high, spec.minimum + high - low)
    if spec.maximum is not None:
        return min(low, spec.maximum - (high - low)), spec.maximum
    return low, high
