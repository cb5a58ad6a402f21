"""Warming up: every batch size, and the extremes of every dynamic axis, before a client pays for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from handlers.backend import Backend
from handlers.errors import BackendError, one_line
from handlers.signature import Signature
from handlers.tensors import Array, TensorSpec


def warm_up(backend: Backend, signature: Signature, max_batch: int) -> None:
    """Run batches of every size up to the largest, in powers of two, and compare what comes back with the signature.

    Dynamic axes have their smallest size; at batches of one and of the largest size, their largest one as well.

    Raises:
        BackendError: If the model fails, or gives another name, shape or dtype than the signature says.
    """
    for size, sizes in _extremes(signature, max_batch):
        batch = plain_batch(signature, size, sizes)
        # Twice: TorchScript's profiling executor records on the first run and optimises on the second.
        for _ in range(2):
            try:
                outputs = backend.run(batch)
            except Exception as error:  # whatever a runtime raises here, this worker must not become ready
                raise BackendError(f"the model fails on {_what(size, sizes)}: {one_line(error)}") from error
            _check(outputs, signature, size, sizes)


def _extremes(signature: Signature, max_batch: int) -> Iterator[tuple[int, dict[str, int]]]:
    """Batch sizes, each with the sizes of the dynamic axes."""
    smallest = {name: axis.minimum for name, axis in signature.axes.items()}
    largest = {name: axis.maximum for name, axis in signature.axes.items()}
    powers = {1 << power for power in range(max_batch.bit_length())}
    for size in sorted(powers | {max_batch}):
        yield size, smallest
    if largest != smallest:
        for size in sorted({1, max_batch}):
            yield size, largest


def plain_batch(signature: Signature, size: int, sizes: Mapping[str, int]) -> dict[str, Array]:
    """A batch of the values nearest to zero that the inputs may hold.

    Args:
        signature: The inputs.
        size: Samples.
        sizes: Of the dynamic axes by name.
    """
    return {spec.name: _plain(spec, size, sizes) for spec in signature.inputs}


def _plain(spec: TensorSpec, size: int, sizes: Mapping[str, int]) -> Array:
    """The value nearest to zero that the input may hold, everywhere."""
    lowest = -np.inf if spec.minimum is None else spec.minimum
    highest = np.inf if spec.maximum is None else spec.maximum
    shape = [sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape[1:]]
    return np.full((size, *shape), min(max(0.0, lowest), highest), dtype=spec.numpy_dtype)


def _check(outputs: Mapping[str, Array], signature: Signature, size: int, sizes: Mapping[str, int]) -> None:
    expected = {spec.name for spec in signature.outputs}
    if outputs.keys() != expected:
        raise BackendError(
            f"the model gives {', '.join(sorted(outputs))}; the signature says {', '.join(sorted(expected))}"
        )
    for spec in signature.outputs:
        output = outputs[spec.name]
        # An axis of the output alone, such as a number of boxes, may have any size: it stays a name.
        shape = (size, *(sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in spec.shape[1:]))
        fits = output.ndim == len(shape) and all(
            isinstance(axis, str) or length == axis for length, axis in zip(output.shape, shape, strict=True)
        )
        if not fits:
            raise BackendError(
                f"the model's {spec.name!r} has the shape {list(output.shape)} for {_what(size, sizes)}; "
                f"the signature says {list(shape)}"
            )
        if output.dtype != spec.numpy_dtype:
            raise BackendError(f"the model's {spec.name!r} is {output.dtype}; the signature says {spec.dtype}")


def _what(size: int, sizes: Mapping[str, int]) -> str:
    """A batch in words: ``a batch of 2 (length 1)``."""
    axes = ", ".join(f"{name} {axis}" for name, axis in sizes.items())
    return f"a batch of {size}" + (f" ({axes})" if axes else "")
