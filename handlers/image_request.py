"""Requests of images: from a request's fields to payloads, and to normalised samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handlers.decoder import Decoded, decode_body
from handlers.errors import MalformedError
from handlers.image import EncodedImage, ImageDecoder, Payload, PixelArray
from handlers.jpeg_batches import JpegBatches
from handlers.limits import too_many_samples
from handlers.open_inference import BYTES, OpenRequest, check_outputs, output_tensors
from handlers.open_tensors import check_names, count_samples, decode_base64, read_files, read_samples
from handlers.parameters import NO_PARAMETERS, read_parameters
from handlers.preprocessing import ImagePreprocessing
from handlers.request import Body, JsonBody, MediaBody, Medium, Part
from handlers.signature import Signature
from handlers.tensor_payload import TensorReader
from handlers.tensors import TensorBatch

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

    An Open Inference Protocol request names the model's input, and sends files as BYTES, or in the input's own datatype
    what preprocessing would have made of them.

    Args:
        signature: Names the one input, the output and the labels.
        preprocessing: Colour mode, size and normalisation.
        max_samples: Requests with more samples are refused.
        jpeg: See :class:`handlers.image.ImageDecoder`.
    """

    def __init__(
        self,
        signature: Signature,
        preprocessing: ImagePreprocessing,
        *,
        max_samples: int,
        jpeg: JpegBatches | None = None,
    ) -> None:
        self._name = signature.inputs[0].name
        self._reader = TensorReader(signature.inputs[0], signature.axes)
        self._outputs = output_tensors(signature)
        self._classes = len(signature.labels)
        self._max_samples = max_samples
        self._images = ImageDecoder(preprocessing, max_samples=max_samples, jpeg=jpeg)

    def decode(self, parts: Sequence[Part]) -> Decoded:
        """Decode one request; see :class:`handlers.decoder.Decoder`."""
        return decode_body(parts, IMAGES, self._decode)

    def _decode(self, body: Body) -> Decoded:
        parameters = NO_PARAMETERS
        if body.parameters is not None:
            parameters = read_parameters(body.parameters, classes=self._classes)
        if isinstance(body, OpenRequest):
            check_outputs(body.reply, self._outputs)
            samples = self._open_samples(body)
            return Decoded(samples=samples, many=True, parameters=parameters, reply=body.reply)
        parsed = parse_body(body, max_samples=self._max_samples)
        self._images.check_total([item.data for item in parsed.payloads if isinstance(item, EncodedImage)])
        pieces = [self._images.decode(payload) for payload in parsed.payloads]
        return Decoded(
            samples=[{self._name: sample} for samples, _ in pieces for sample in samples],
            many=parsed.many or any(many for _, many in pieces),
            parameters=parameters,
        )

    def _open_samples(self, request: OpenRequest) -> list[TensorBatch]:
        if request.inputs[0].datatype != BYTES:
            return read_samples(request, [self._reader], max_samples=self._max_samples)
        check_names(request, [self._name])
        count_samples(request, max_samples=self._max_samples)
        files = read_files(request.inputs[0])
        self._images.check_total(files)
        return [{self._name: self._images.decode(EncodedImage(data=data))[0][0]} for data in files]


def parse_body(body: JsonBody | MediaBody, *, max_samples: int) -> ParsedRequest:
    """Find the samples of one request.

    Args:
        body: Its body.
        max_samples: Requests with more samples are refused.

    Raises:
        RequestError: If there is nothing that can be read as a sample.
    """
    parsed = _parse(body)
    if len(parsed.payloads) > max_samples:
        raise too_many_samples(len(parsed.payloads), max_samples)
    return parsed


def _parse(body: JsonBody | MediaBody) -> ParsedRequest:
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
    return EncodedImage(data=decode_base64(text))
