"""Requests of tensors: JSON with one entry an input, Open Inference Protocol tensors, or raw bytes."""

from __future__ import annotations

from collections.abc import Sequence

from handlers.decoder import Decoded, decode_body
from handlers.errors import MalformedError, OutOfRangeError, UnsupportedTypeError
from handlers.limits import too_many_samples
from handlers.open_inference import OpenRequest, check_outputs, output_tensors
from handlers.open_tensors import read_samples
from handlers.parameters import NO_PARAMETERS, read_parameters
from handlers.raw_tensor import NPY_MAGIC, read_bytes, read_npy
from handlers.request import Body, JsonBody, MediaBody, Medium, Part, no_samples
from handlers.signature import Signature
from handlers.tensor_payload import TensorReader, check_axes
from handlers.tensors import TensorBatch
from handlers.words import kind, shown_keys

_NO_MULTIPART = "Tensors cannot be sent as multipart; send application/json."
NPY_TYPES = ("application/x-npy", "application/npy")

# Raw bytes say which numbers they are, but not of which input: they are for models with one.
ONE_TENSOR = Medium(
    types=NPY_TYPES,
    recognises=lambda data: data.startswith(NPY_MAGIC),
    accepted="send application/json, application/octet-stream or application/x-npy",
    absent="neither a .npy file nor JSON",
    wrong_field=_NO_MULTIPART,
    raw=True,
)
TENSORS = Medium(
    types=(),
    recognises=lambda data: False,
    accepted="send application/json",
    absent="not JSON",
    wrong_field=_NO_MULTIPART,
)


class TensorDecoder:
    """Decodes requests of tensors; see :class:`handlers.decoder.Decoder`.

    ``{"inputs": {"name": nested lists, ...}}`` is one sample, without a batch axis; ``{"inputs": [...]}`` and
    ``{"instances": [...]}`` are several. A model with one input also takes its nested lists bare, and its raw bytes.

    Args:
        signature: The inputs and their bounds.
        max_samples: Requests with more samples are refused.
    """

    def __init__(self, signature: Signature, *, max_samples: int) -> None:
        self._specs = signature.inputs
        self._readers = [TensorReader(spec, signature.axes) for spec in signature.inputs]
        self._names = [spec.name for spec in signature.inputs]
        self._outputs = output_tensors(signature)
        self._medium = ONE_TENSOR if len(self._names) == 1 else TENSORS
        # With one dynamic axis in all there is nothing to compare.
        self._shares_axes = sum(len(spec.dynamic_axes) for spec in signature.inputs) > 1
        self._max_samples = max_samples

    def decode(self, parts: Sequence[Part]) -> Decoded:
        """Decode one request; see :class:`handlers.decoder.Decoder`."""
        return decode_body(parts, self._medium, self._decode)

    def _decode(self, body: Body) -> Decoded:
        parameters = NO_PARAMETERS
        if body.parameters is not None:
            parameters = read_parameters(body.parameters, classes=0)
        if isinstance(body, OpenRequest):
            check_outputs(body.reply, self._outputs)
            samples = read_samples(body, self._readers, max_samples=self._max_samples)
            return Decoded(samples=samples, many=True, parameters=parameters, reply=body.reply)
        if isinstance(body, MediaBody):
            samples, many = self._raw(body)
            return Decoded(samples=samples, many=many, parameters=parameters)
        values, many = self._values(body)
        if len(values) > self._max_samples:
            raise too_many_samples(len(values), self._max_samples)
        return Decoded(samples=[self._sample(value) for value in values], many=many, parameters=parameters)

    def _raw(self, body: MediaBody) -> tuple[list[TensorBatch], bool]:
        """The samples of a body of bytes, and whether they are an array of samples."""
        data = body.values[0]
        if body.many or not isinstance(data, bytes):
            raise UnsupportedTypeError("unsupported_type", self._medium.wrong_field)
        read = read_bytes if body.raw else read_npy
        array, many = read(data, self._readers[0], max_samples=self._max_samples)
        return [{self._names[0]: array[i, ...]} for i in range(len(array))], many

    def _values(self, body: JsonBody) -> tuple[list[object], bool]:
        """One JSON value a sample, and whether they were sent as a list."""
        value = body.value
        if not isinstance(value, list):
            return [value], False
        if body.key == "instances":
            return value, True
        # A list of objects is a list of samples; any other belongs to the one sample of a model with one input.
        if len(self._names) == 1 and not (value and isinstance(value[0], dict)):
            return [value], False
        if not value:
            raise no_samples(body.key)
        return value, True

    def _sample(self, value: object) -> TensorBatch:
        if not isinstance(value, dict):
            if len(self._readers) == 1:
                return {self._names[0]: self._readers[0].from_json(value)}
            raise MalformedError(
                "wrong_body", f"A sample must be an object with the keys {', '.join(self._names)}, not {kind(value)}."
            )
        if value.keys() != set(self._names):
            raise OutOfRangeError(
                "wrong_inputs",
                f"A sample must have exactly the keys {', '.join(self._names)}, not {shown_keys(list(value))}.",
            )
        sample = {reader.spec.name: reader.from_json(value[reader.spec.name]) for reader in self._readers}
        if self._shares_axes:
            check_axes(sample, self._specs, batched=False)
        return sample
