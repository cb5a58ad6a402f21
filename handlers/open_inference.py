"""The Open Inference Protocol, version 2 (KServe v2): its requests as tensors.

A request is ``{"id"?, "inputs": [{"name", "shape", "datatype", "data"}, …], "outputs"?: [{"name"}], "parameters"?}``;
the first axis of every shape is the batch. With the header ``Inference-Header-Content-Length``, the bytes of tensors
may follow the JSON, as many as their ``parameters.binary_data_size`` says. Answers have that form where
``parameters.binary_data_output``, or ``binary_data`` of an output, ask for it (the protocol's binary extension).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeGuard

from handlers.errors import MalformedError, OutOfRangeError
from handlers.signature import Signature
from handlers.words import kind, shown_keys

BYTES = "BYTES"
TEXT_INPUT = "text"
"""The input that texts are sent as, whatever tensors of tokens become of them."""
DATATYPES = {"float32": "FP32", "float64": "FP64", "int64": "INT64", "int32": "INT32", "bool": "BOOL"}
"""The protocol's names of the dtypes that signatures know."""
ELEMENT_LENGTH = struct.Struct("<I")
"""What stands before each element of a BYTES tensor in its binary form: how many bytes it has."""

# KServe's client says the model as well; the URL has named it already.
_REQUEST_KEYS = ("id", "inputs", "outputs", "parameters", "model_name", "model_version")
_TENSOR_KEYS = ("name", "shape", "datatype", "data", "parameters")
_OUTPUT_KEYS = ("name", "parameters")
_BINARY_SIZE = "binary_data_size"
_BINARY_OUTPUTS = "binary_data_output"
_BINARY = "binary_data"
_CLASSIFICATION = "classification"
_MAX_ID_CHARS = 256
_MAX_TENSORS = 256
_MAX_DIMENSIONS = 32
# For any size. What is merely too much is refused where it is counted.
_TOO_LARGE = 1 << 63


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenTensor:
    """One tensor of a request, its contents not yet checked.

    Attributes:
        name: The input that it is for.
        shape: Sizes of its axes, the batch first.
        datatype: What it calls its dtype, such as ``FP32``.
        data: What JSON parsing gave; bytes if they followed the JSON.
    """

    name: str
    shape: tuple[int, ...]
    datatype: str
    data: object


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenOutput:
    """One output that a request wants.

    Attributes:
        name: The output.
        binary: Whether as bytes that follow the JSON.
        classes: How many classes of it to list in its place; None for the output itself.
    """

    name: str
    binary: bool = False
    classes: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenReply:
    """What a request says about its answer.

    Attributes:
        id: What the client calls the request, and hears again; None if it has no name.
        outputs: The outputs that it wants, in order; empty for the usual ones.
        binary: Whether the usual ones should be bytes that follow the JSON.
    """

    id: str | None
    outputs: tuple[OpenOutput, ...]
    binary: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class OpenRequest:
    """One request.

    Attributes:
        inputs: At least one tensor, each of another name.
        reply: What it says about its answer.
        parameters: Its parameters, unread.
    """

    inputs: tuple[OpenTensor, ...]
    reply: OpenReply
    parameters: object


def is_open_request(body: Mapping[str, object]) -> bool:
    """Whether a JSON body means this protocol."""
    if "instances" in body:
        return False
    if "outputs" in body or "id" in body or "model_name" in body:
        return True
    inputs = body.get("inputs")
    first = inputs[0] if type(inputs) is list and inputs else None
    return type(first) is dict and "name" in first and ("datatype" in first or "shape" in first)


def parse_open_request(body: Mapping[str, object], binary: bytes = b"") -> OpenRequest:
    """Read one request.

    Args:
        body: Its JSON.
        binary: What followed it.

    Raises:
        RequestError: If it is no such request.
    """
    _check_keys(body, _REQUEST_KEYS, required=("inputs",), what="A request of the Open Inference Protocol")
    inputs = _items(body["inputs"], "inputs")
    if not inputs:
        raise MalformedError("wrong_body", "'inputs' is empty; send at least one tensor.")
    tensors = []
    rest = memoryview(binary)
    for item in inputs:
        tensor, size = _tensor(item, rest)
        tensors.append(tensor)
        rest = rest[size:]
    if rest:
        raise MalformedError(
            "wrong_binary_size",
            f"The last {len(rest)} bytes belong to no tensor; let each one's {_BINARY_SIZE} say how many are its own.",
        )
    names = [tensor.name for tensor in tensors]
    if len(set(names)) != len(names):
        raise MalformedError("wrong_body", "'inputs' names a tensor twice; send each one once.")
    identity = body.get("id")
    if identity is not None and (not isinstance(identity, str) or len(identity) > _MAX_ID_CHARS):
        raise MalformedError("wrong_body", f"'id' must be a string of at most {_MAX_ID_CHARS} characters.")
    parameters = body.get("parameters")
    binary_outputs = False
    if isinstance(parameters, dict) and _BINARY_OUTPUTS in parameters:
        parameters = dict(parameters)
        binary_outputs = _flag(parameters.pop(_BINARY_OUTPUTS), _BINARY_OUTPUTS) or False
    chosen = body.get("outputs")
    outputs = tuple(_output(item, binary_outputs) for item in _items([] if chosen is None else chosen, "outputs"))
    if len({output.name for output in outputs}) != len(outputs):
        raise MalformedError("wrong_body", "'outputs' names an output twice; ask for each one once.")
    reply = OpenReply(id=identity, outputs=outputs, binary=binary_outputs)
    return OpenRequest(inputs=tuple(tensors), reply=reply, parameters=parameters)


def check_outputs(reply: OpenReply, known: Mapping[str, tuple[str, Sequence[int]]]) -> None:
    """Refuse a request for outputs that the model does not have.

    Args:
        reply: What the request wants.
        known: What :func:`output_tensors` gave.

    Raises:
        OutOfRangeError: With the names of those that it has, or the number of classes.
    """
    unknown = [output.name for output in reply.outputs if output.name not in known]
    if unknown:
        raise OutOfRangeError(
            "unknown_output", f"Unknown outputs: {shown_keys(unknown)}; this model has {', '.join(known)}."
        )
    for output in reply.outputs:
        datatype, shape = known[output.name]
        if output.classes is None:
            continue
        if len(shape) != 2 or shape[1] < 1 or datatype in (BYTES, DATATYPES["bool"]):
            raise OutOfRangeError(
                "wrong_parameter",
                f"{_CLASSIFICATION} is for outputs of numbers, [batch, classes], which {output.name!a} is not.",
            )
        if not 1 <= output.classes <= shape[1]:
            raise OutOfRangeError("wrong_parameter", f"{_CLASSIFICATION} must be a whole number from 1 to {shape[1]}.")


def output_tensors(signature: Signature) -> dict[str, tuple[str, list[int]]]:
    """What an answer may hold: for each name, the datatype and the shape, in which -1 is any size."""
    tensors: dict[str, tuple[str, list[int]]] = {}
    if signature.labels:
        tensors["label"] = (BYTES, [-1])
        tensors["probability"] = ("FP32", [-1])
        tensors["top_k_label"] = (BYTES, [-1, -1])
        tensors["top_k_probability"] = ("FP32", [-1, -1])
    for spec in signature.outputs:  # last: a model's own output may be called like one of ours
        tensors[spec.name] = (DATATYPES[spec.dtype], [axis if isinstance(axis, int) else -1 for axis in spec.shape])
    return tensors


def _tensor(item: object, rest: memoryview) -> tuple[OpenTensor, int]:
    """One tensor, and how many of the bytes after the JSON are its own."""
    if not isinstance(item, dict):
        raise MalformedError("wrong_body", f"Each tensor must be an object, not {kind(item)}.")
    _check_keys(item, _TENSOR_KEYS, required=("name", "shape", "datatype"), what="A tensor")
    name, shape, datatype = item["name"], item["shape"], item["datatype"]
    if not isinstance(name, str) or not isinstance(datatype, str):
        raise MalformedError("wrong_body", "The name and the datatype of a tensor must be strings.")
    if not isinstance(shape, list) or not 1 <= len(shape) <= _MAX_DIMENSIONS or not all(map(_is_size, shape)):
        raise MalformedError(
            "wrong_body", f"The shape of tensor {name[:80]!a} must be a list of whole numbers, the batch first."
        )
    parameters = item.get("parameters")
    size = parameters.get(_BINARY_SIZE) if isinstance(parameters, dict) else None
    if size is None and "data" in item:
        return OpenTensor(name=name, shape=tuple(shape), datatype=datatype, data=item["data"]), 0
    if not _is_size(size) or "data" in item:
        raise MalformedError(
            "wrong_body", f"Tensor {name[:80]!a} must have either 'data' or a {_BINARY_SIZE} in its parameters."
        )
    if size > len(rest):
        raise MalformedError(
            "wrong_binary_size",
            f"Tensor {name[:80]!a} claims {size} bytes after the JSON; {len(rest)} are left "
            "(the header Inference-Header-Content-Length says where the JSON ends).",
        )
    return OpenTensor(name=name, shape=tuple(shape), datatype=datatype, data=bytes(rest[:size])), size


def _is_size(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 <= value < _TOO_LARGE


def _items(value: object, key: str) -> list[object]:
    if not isinstance(value, list):
        raise MalformedError("wrong_body", f"'{key}' must be a list of tensors, not {kind(value)}.")
    if len(value) > _MAX_TENSORS:
        raise MalformedError("wrong_body", f"'{key}' lists {len(value)} tensors; the limit is {_MAX_TENSORS}.")
    return value


def _output(item: object, binary: bool) -> OpenOutput:
    name = item.get("name") if isinstance(item, dict) else None
    if not isinstance(item, dict) or not isinstance(name, str):
        raise MalformedError("wrong_body", """Each of 'outputs' must be an object such as {"name": "…"}.""")
    _check_keys(item, _OUTPUT_KEYS, required=("name",), what="Each of 'outputs'")
    parameters = item.get("parameters")
    if parameters is None:
        return OpenOutput(name=name, binary=binary)
    if not isinstance(parameters, dict):
        raise MalformedError(
            "wrong_parameters",
            f"The parameters of output {name[:80]!a} must be an object of names and values, not {kind(parameters)}.",
        )
    unknown = [key for key in parameters if key not in (_BINARY, _CLASSIFICATION)]
    if unknown:
        raise OutOfRangeError(
            "unknown_parameter",
            f"Unknown parameters of output {name[:80]!a}: {shown_keys(unknown)}; "
            f"an output takes {_BINARY} and {_CLASSIFICATION}.",
        )
    own = _flag(parameters.get(_BINARY), _BINARY)
    classes = parameters.get(_CLASSIFICATION)
    if classes is not None and not _is_size(classes):
        raise OutOfRangeError("wrong_parameter", f"{_CLASSIFICATION} must be a whole number of classes.")
    return OpenOutput(name=name, binary=binary if own is None else own, classes=classes)


def _flag(value: object, name: str) -> bool | None:
    """A parameter that is true or false, or not given."""
    if value is None or isinstance(value, bool):
        return value
    raise OutOfRangeError("wrong_parameter", f"{name} must be true or false, not {kind(value)}.")


def _check_keys(item: Mapping[str, object], known: Sequence[str], *, required: Sequence[str], what: str) -> None:
    if not set(required) <= item.keys() <= set(known):
        raise MalformedError(
            "wrong_key",
            f"{what} must have the keys {', '.join(required)}, and may have "
            f"{', '.join(key for key in known if key not in required)}, not {shown_keys(list(item))}.",
        )
