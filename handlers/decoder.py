"""Decoders: from a request's fields to samples, by the signature's task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from handlers.errors import LoadError, as_open_protocol
from handlers.open_inference import OpenReply, OpenRequest
from handlers.parameters import NO_PARAMETERS, Parameters
from handlers.request import Body, Medium, Part, read_body
from handlers.signature import Signature
from handlers.tensors import TensorBatch

if TYPE_CHECKING:
    from handlers.jpeg_batches import JpegBatches


@dataclass(frozen=True, kw_only=True, slots=True)
class Decoded:
    """The samples of one valid request, and what its answer should look like.

    Attributes:
        samples: The model's inputs by name, without the batch axis; at least one sample.
        many: True when the client asked in a form whose answer is a list, however many samples there are.
        parameters: What the client chose.
        truncated: Positions of the samples that are texts of which the end was cut off.
        reply: What an Open Inference Protocol request says about its answer; None for the other forms.
    """

    samples: list[TensorBatch]
    many: bool
    parameters: Parameters = NO_PARAMETERS
    truncated: frozenset[int] = frozenset()
    reply: OpenReply | None = None


class Decoder(Protocol):
    """Decodes the requests of one task."""

    def decode(self, parts: Sequence[Part]) -> Decoded:
        """Decode one request.

        Raises:
            RequestError: If it is broken, or outside the signature.
        """
        ...


def decode_body(parts: Sequence[Part], medium: Medium, decode: Callable[[Body], Decoded]) -> Decoded:
    """Decode one request, whose error gets the form that the request has.

    Args:
        parts: Its fields.
        medium: The form that the task takes besides JSON.
        decode: Finds the samples in the body.

    Raises:
        RequestError: If it is broken, or outside the signature.
    """
    body = read_body(parts, medium)
    if not isinstance(body, OpenRequest):
        return decode(body)
    with as_open_protocol():
        return decode(body)


def build_decoder(
    signature: Signature, *, max_samples: int, folder: Path | None = None, jpeg: JpegBatches | None = None
) -> Decoder:
    """The decoder of a signature's task.

    Args:
        signature: Preprocessing, inputs and their bounds.
        max_samples: Requests with more samples are refused.
        folder: Where the tokenizer lies; texts need it.
        jpeg: Decodes JPEG files on a GPU; None for the CPU.

    Raises:
        LoadError: If the tokenizer cannot be used.
    """
    # Imported here so that an archive needs only the libraries of its own task.
    if signature.image is not None:
        from handlers.image_request import ImageRequestDecoder  # noqa: PLC0415

        return ImageRequestDecoder(signature, signature.image, max_samples=max_samples, jpeg=jpeg)
    if signature.text is not None:
        from handlers.text import TextDecoder, load_tokenizer  # noqa: PLC0415

        if folder is None:
            raise LoadError("a model of texts needs its tokenizer; say in which folder it lies")
        return TextDecoder(signature, load_tokenizer(folder, signature.text), max_samples=max_samples)
    from handlers.tensor_request import TensorDecoder  # noqa: PLC0415

    return TensorDecoder(signature, max_samples=max_samples)
