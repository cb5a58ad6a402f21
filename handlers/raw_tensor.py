"""Raw bodies of models with one tensor: a ``.npy`` file, or nothing but the tensor's bytes."""

from __future__ import annotations

import io
import math

import numpy as np

from handlers.errors import MalformedError, OutOfRangeError
from handlers.limits import too_many_samples
from handlers.tensor_payload import TensorReader
from handlers.tensors import Array

NPY_MAGIC = b"\x93NUMPY"
# A header says dtype, order and shape; NumPy pads its own to 128 bytes.
_MAX_HEADER_BYTES = 4096


def read_npy(data: bytes, reader: TensorReader, *, max_samples: int) -> tuple[Array, bool]:
    """Read a ``.npy`` file of one sample, or of several stacked on a first axis.

    Args:
        data: Begins with ``NPY_MAGIC``.
        reader: The model's only input.
        max_samples: Files with more samples are refused.

    Returns:
        ``[samples, ...]``, and whether the file has that first axis.

    Raises:
        RequestError: If the file is broken, or outside of the signature.
    """
    stream = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(stream)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
        shape, column_major, dtype = read(stream, max_header_size=_MAX_HEADER_BYTES)
    except Exception as error:  # NumPy evaluates the header as Python, which fails in a dozen ways
        raise MalformedError(
            "broken_npy", "The header of the .npy file cannot be read; write the file with numpy.save."
        ) from error
    if not all(0 <= size < 1 << 63 for size in shape):
        raise MalformedError("broken_npy", "The header of the .npy file has a size that no array has.")
    spec = reader.spec
    many = len(shape) == len(spec.shape)
    sample_shape = shape[1:] if many else shape
    if dtype.kind not in "biuf":  # never objects, which would be pickled
        raise OutOfRangeError(
            "wrong_datatype", f"The .npy file does not hold plain numbers; the tensor {spec.name!r} is {spec.dtype}."
        )
    reader.check_shape(sample_shape)
    count = shape[0] if many else 1
    _check_count(count, max_samples)
    start = stream.tell()
    needed = math.prod(shape) * dtype.itemsize
    if len(data) - start != needed:
        raise MalformedError(
            "broken_npy",
            f"The .npy file has {len(data) - start} bytes of numbers; its header promises {needed}.",
        )
    flat = np.frombuffer(data, dtype, offset=start)
    array = flat.reshape(shape, order="F" if column_major else "C").reshape((count, *sample_shape))
    return np.ascontiguousarray(reader.from_array(array)), many


def read_bytes(data: bytes, reader: TensorReader, *, max_samples: int) -> tuple[Array, bool]:
    """Read the little-endian bytes of one sample or of several; a sample with a dynamic axis comes alone.

    Args:
        data: Numbers of the tensor's dtype, row by row.
        reader: The model's only input.
        max_samples: Bodies of more samples are refused.

    Returns:
        ``[samples, ...]``, and whether there are several.

    Raises:
        RequestError: If the number of bytes is that of no sample, or a value is outside of the signature.
    """
    spec = reader.spec
    axes = spec.shape[1:]
    dynamic = len(spec.dynamic_axes)
    if dynamic > 1:
        raise OutOfRangeError(
            "raw_shape_unknown",
            f"The bytes of {spec.name!r} do not tell its shape {reader.shape_text}; send a .npy file or JSON.",
        )
    size = math.prod(axis for axis in axes if isinstance(axis, int)) * spec.numpy_dtype.itemsize
    count, rest = divmod(len(data), size)
    if rest or not count:
        what = f"{size} bytes for each step of {next(iter(spec.dynamic_axes.values()))}" if dynamic else f"{size} bytes"
        raise OutOfRangeError(
            "wrong_size",
            f"The body has {len(data)} bytes; one sample of {spec.name!r}, {reader.shape_text} of {spec.dtype}, has "
            f"{what} (declare JSON as application/json).",
        )
    if dynamic:
        shape: tuple[int, ...] = tuple(count if isinstance(axis, str) else axis for axis in axes)
        reader.check_shape(shape)
        return reader.from_bytes(data, (1, *shape)), False
    _check_count(count, max_samples)
    return reader.from_bytes(data, (count, *(axis for axis in axes if isinstance(axis, int)))), count > 1


def _check_count(count: int, max_samples: int) -> None:
    if count < 1:
        raise OutOfRangeError("no_samples", "The first axis of the .npy file is empty; send at least one sample.")
    if count > max_samples:
        raise too_many_samples(count, max_samples)
