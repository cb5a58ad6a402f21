"""Tensors of Open Inference Protocol requests, checked against the signature and taken apart into samples."""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence

from handlers.errors import MalformedError, OutOfRangeError
from handlers.limits import too_many_samples
from handlers.nested import flatten
from handlers.open_inference import BYTES, DATATYPES, ELEMENT_LENGTH, OpenRequest, OpenTensor
from handlers.tensor_payload import TensorReader, check_axes
from handlers.tensors import Array, TensorBatch, TensorSpec
from handlers.words import shown_keys, shown_shape


def read_samples(request: OpenRequest, readers: Sequence[TensorReader], *, max_samples: int) -> list[TensorBatch]:
    """The samples of a request that sends the model's own inputs.

    Args:
        request: Its inputs' names must be the model's.
        readers: One an input of the model.
        max_samples: Requests with more samples are refused.

    Raises:
        RequestError: If a tensor is missing, malformed, or outside of the signature.
    """
    check_names(request, [reader.spec.name for reader in readers])
    tensors = {tensor.name: tensor for tensor in request.inputs}
    count = count_samples(request, max_samples=max_samples)
    batch = {reader.spec.name: _read(tensors[reader.spec.name], reader) for reader in readers}
    check_axes(batch, [reader.spec for reader in readers], batched=True)
    return [{name: array[i, ...] for name, array in batch.items()} for i in range(count)]


def check_names(request: OpenRequest, names: Sequence[str]) -> None:
    """Refuse a request whose tensors are not exactly the ones that the model takes.

    Raises:
        OutOfRangeError: With both.
    """
    found = [tensor.name for tensor in request.inputs]
    if set(found) != set(names):
        raise OutOfRangeError(
            "wrong_inputs", f"The inputs must be exactly {', '.join(names)}, not {shown_keys(found)}."
        )


def count_samples(request: OpenRequest, *, max_samples: int) -> int:
    """How many samples a request has.

    Raises:
        RequestError: If its tensors disagree, or there are none, or too many.
    """
    first = request.inputs[0]
    count = first.shape[0]
    for tensor in request.inputs[1:]:
        if tensor.shape[0] != count:
            raise OutOfRangeError(
                "wrong_size",
                f"The batch has the size {count} in {first.name[:80]!a} and {tensor.shape[0]} in "
                f"{tensor.name[:80]!a}; it must be the same.",
            )
    if not count:
        raise OutOfRangeError("no_samples", "The batch is empty; send at least one sample.")
    if count > max_samples:
        raise too_many_samples(count, max_samples)
    return count


def read_texts(tensor: OpenTensor) -> list[str]:
    """The strings of a BYTES tensor of one axis.

    Raises:
        RequestError: If it is another tensor.
    """
    texts = []
    for item in _elements(tensor):
        try:
            texts.append(item if isinstance(item, str) else item.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise MalformedError(
                "not_utf8", f"A text is not UTF-8 (byte {error.start}); encode it as UTF-8."
            ) from error
    return texts


def read_files(tensor: OpenTensor) -> list[bytes]:
    """The files in a BYTES tensor of one axis: base64 in JSON, as they are after it.

    Raises:
        RequestError: If it is another tensor.
    """
    return [decode_base64(item) if isinstance(item, str) else item for item in _elements(tensor)]


def decode_base64(text: str) -> bytes:
    """The bytes that a client has written as base64.

    Raises:
        MalformedError: If it has not.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise MalformedError("malformed_base64", "An image is not valid base64.") from error


def _read(tensor: OpenTensor, reader: TensorReader) -> Array:
    """One input of all samples, ``[batch, ...]``."""
    spec = reader.spec
    wanted = DATATYPES[spec.dtype]
    if tensor.datatype != wanted:
        raise OutOfRangeError(
            "wrong_datatype",
            f"The tensor {spec.name!r} has the datatype {tensor.datatype[:20]!a}; it must be {wanted}.",
        )
    reader.check_shape(tensor.shape[1:])
    if isinstance(tensor.data, bytes):
        return reader.from_bytes(tensor.data, tensor.shape)
    items, shape, types = flatten(tensor.data)
    if shape not in (tensor.shape, (math.prod(tensor.shape),)):
        raise _wrong_count(tensor, spec, shape)
    return reader.from_items(items, types, tensor.shape)


def _wrong_count(tensor: OpenTensor, spec: TensorSpec, shape: tuple[int, ...]) -> OutOfRangeError:
    return OutOfRangeError(
        "wrong_shape",
        f"The data of {spec.name!r} have the shape {shown_shape(shape)}; its shape {shown_shape(tensor.shape)} needs "
        f"{math.prod(tensor.shape)} numbers, flat or nested.",
    )


def _elements(tensor: OpenTensor) -> Sequence[str | bytes]:
    """What a BYTES tensor of one axis holds: strings from JSON, bytes from what followed it."""
    if tensor.datatype != BYTES:
        raise OutOfRangeError(
            "wrong_datatype",
            f"The tensor {tensor.name[:80]!a} has the datatype {tensor.datatype[:20]!a}; it must be {BYTES}.",
        )
    count = math.prod(tensor.shape)
    # [batch, 1] is what several clients make of a list of strings.
    if any(size != 1 for size in tensor.shape[1:]):
        raise OutOfRangeError(
            "wrong_shape", f"The tensor {tensor.name[:80]!a} must have one item a sample, the shape [batch]."
        )
    if isinstance(tensor.data, bytes):
        elements: list[bytes] = list(_split(tensor.data, tensor))
        if len(elements) != count:
            raise _wrong_items(tensor, count, len(elements))
        return elements
    items, _, types = flatten(tensor.data)
    if types != {str}:
        raise MalformedError("not_text", f"The tensor {tensor.name[:80]!a} must hold strings.")
    if len(items) != count:
        raise _wrong_items(tensor, count, len(items))
    return items


def _wrong_items(tensor: OpenTensor, count: int, found: int) -> OutOfRangeError:
    return OutOfRangeError(
        "wrong_shape",
        f"The data of {tensor.name[:80]!a} hold {found} strings; its shape {shown_shape(tensor.shape)} needs {count}.",
    )


def _split(data: bytes, tensor: OpenTensor) -> list[bytes]:
    """Elements with their lengths before them, little-endian 32-bit: the protocol's binary form of BYTES."""
    elements = []
    start = 0
    while start < len(data):
        stop = start + ELEMENT_LENGTH.size
        end = stop + ELEMENT_LENGTH.unpack_from(data, start)[0] if stop <= len(data) else len(data) + 1
        if end > len(data):
            raise MalformedError(
                "wrong_binary_size",
                f"The bytes of {tensor.name[:80]!a} end within an element; "
                "each begins with its length, 4 bytes little-endian.",
            )
        elements.append(data[stop:end])
        start = end
    return elements
