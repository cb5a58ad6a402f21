"""Requests of tensors: JSON objects with one entry an input."""

from __future__ import annotations

from collections.abc import Sequence

from handlers.decoder import Decoded
from handlers.errors import MalformedError, OutOfRangeError
from handlers.request import JsonBody, Medium, Part, kind, no_samples, read_body, shown_keys, too_many_samples
from handlers.signature import Signature
from handlers.tensor_payload import tensor_from_json
from handlers.tensors import Array, TensorBatch

TENSORS = Medium(
    types=(),
    recognises=lambda data: False,
    accepted="send application/json",
    absent="not JSON",
    wrong_field="Tensors cannot be sent as multipart; send application/json.",
)


class TensorDecoder:
    """Decodes requests of tensors; see :class:`handlers.decoder.Decoder`.

    ``{"inputs": {"name": nested lists, ...}}`` is one sample, without a batch axis; ``{"inputs": [...]}`` and
    ``{"instances": [...]}`` are several. A model with one input also takes its nested lists bare.

    Args:
        signature: The inputs and their bounds.
        max_samples: Requests with more samples are refused.
    """

    def __init__(self, signature: Signature, *, max_samples: int) -> None:
        self._signature = signature
        self._names = [spec.name for spec in signature.inputs]
        self._max_samples = max_samples

    def decode(self, parts: Sequence[Part]) -> Decoded:
        """Decode one request; see :class:`handlers.decoder.Decoder`."""
        body = read_body(parts, TENSORS)
        if not isinstance(body, JsonBody):
            raise MalformedError("wrong_body", "A request of tensors must be JSON.")
        values, many = self._values(body)
        if len(values) > self._max_samples:
            raise too_many_samples(len(values), self._max_samples)
        return Decoded(samples=[self._sample(value) for value in values], many=many)

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
        signature = self._signature
        if len(self._names) == 1 and not isinstance(value, dict):
            value = {self._names[0]: value}
        if not isinstance(value, dict):
            raise MalformedError(
                "wrong_body", f"A sample must be an object with the keys {', '.join(self._names)}, not {kind(value)}."
            )
        if set(value) != set(self._names):
            raise OutOfRangeError(
                "wrong_inputs",
                f"A sample must have exactly the keys {', '.join(self._names)}, not {shown_keys(list(value))}.",
            )
        sample = {spec.name: tensor_from_json(value[spec.name], spec, signature.axes) for spec in signature.inputs}
        self._check_axes(sample)
        return sample

    def _check_axes(self, sample: dict[str, Array]) -> None:
        """An axis has one size in all inputs of a sample."""
        sizes: dict[str, tuple[int, str]] = {}
        for spec in self._signature.inputs:
            for axis, name in spec.dynamic_axes.items():
                size = sample[spec.name].shape[axis - 1]
                first, where = sizes.setdefault(name, (size, spec.name))
                if first != size:
                    raise OutOfRangeError(
                        "wrong_size",
                        f"The axis {name} has the size {first} in {where!r} and {size} in {spec.name!r}; "
                        "it must be the same.",
                    )
