"""Requests of images: from a request's fields to payloads, and to normalised samples."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass

from handlers.decoder import Decoded
from handlers.errors import MalformedError
from handlers.image import EncodedImage, ImageDecoder, Payload, PixelArray
from handlers.preprocessing import ImagePreprocessing
from handlers.request import MediaBody, Medium, Part, read_body, too_many_samples
from handlers.signature import Signature

_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")

IMAGES = Medium(
    types=("image/png", "image/jpeg", "image/jpg"),
    recognises=lambda data: data.startswith(_MAGIC),
    accepted="send image/png, image/jpeg or application/json",
    absent="neither a PNG nor a JPEG image nor JSON",
    wrong_field="Each field of a multipart request must be a PNG or JPEG file; send JSON as a body of its own.",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedRequest:
    """The samples of one request, not yet decoded.

    Attributes:
        payloads: What the samples are made of, in request order.
        many: True when the client asked in a form whose answer is a list, however many samples there are.
    """

    payloads: tuple[Payload, ...]
    many: bool


class ImageRequestDecoder:
    """Decodes requests of images; see :class:`handlers.decoder.Decoder`.

    Args:
        signature: Names the one input.
        preprocessing: Colour mode, size and normalisation.
        max_samples: Requests with more samples are refused.
    """

    def __init__(self, signature: Signature, preprocessing: ImagePreprocessing, *, max_samples: int) -> None:
        self._name = signature.inputs[0].name
        self._max_samples = max_samples
        self._images = ImageDecoder(preprocessing, max_samples=max_samples)

    def decode(self, parts: Sequence[Part]) -> Decoded:
        """Decode one request; see :class:`handlers.decoder.Decoder`."""
        parsed = parse_request(parts, max_samples=self._max_samples)
        pieces = [self._images.decode(payload) for payload in parsed.payloads]
        return Decoded(
            samples=[{self._name: sample} for samples, _ in pieces for sample in samples],
            many=parsed.many or any(many for _, many in pieces),
        )


def parse_request(parts: Sequence[Part], *, max_samples: int) -> ParsedRequest:
    """Find the samples of one request.

    Args:
        parts: The request's fields; several only for multipart bodies.
        max_samples: Requests with more samples are refused.

    Raises:
        RequestError: If there is nothing that can be read as a sample.
    """
    parsed = _parse(parts)
    if len(parsed.payloads) > max_samples:
        raise too_many_samples(len(parsed.payloads), max_samples)
    return parsed


def _parse(parts: Sequence[Part]) -> ParsedRequest:
    body = read_body(parts, IMAGES)
    if isinstance(body, MediaBody):
        # TorchServe decodes strings only out of types that begin with "text", which no image has.
        images = [EncodedImage(data=value) for value in body.values if isinstance(value, bytes)]
        return ParsedRequest(payloads=tuple(images), many=body.many)
    if body.key == "instances" and isinstance(body.value, list):
        return ParsedRequest(payloads=tuple(_payload(item, batched=False) for item in body.value), many=True)
    return ParsedRequest(payloads=(_payload(body.value, batched=True),), many=False)


def _payload(value: object, *, batched: bool) -> Payload:
    return _decode_b64(value) if isinstance(value, dict) else PixelArray(value=value, batched=batched)


def _decode_b64(item: dict[str, object]) -> EncodedImage:
    text = item.get("b64")
    if set(item) != {"b64"} or not isinstance(text, str):
        raise MalformedError(
            "wrong_key", 'A sample given as an object must be {"b64": "<base64 of a PNG or JPEG file>"}.'
        )
    try:
        return EncodedImage(data=base64.b64decode(text, validate=True))
    except (binascii.Error, ValueError) as error:
        raise MalformedError("malformed_base64", "The value of 'b64' is not valid base64.") from error
