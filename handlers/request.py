"""Requests: from what TorchServe hands over to a list of samples, not yet decoded.

Accepted bodies: an encoded image (``image/png``, ``image/jpeg``, or no type at all), JSON
``{"inputs": ...}`` with one sample or a list of them, KServe v1 ``{"instances": [...]}``, and multipart with one
image a field.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass

from handlers.errors import MalformedError, OutOfRangeError, TooLargeError, UnsupportedTypeError

IMAGE_TYPES = ("image/png", "image/jpeg", "image/jpg")
JSON_TYPES = ("application/json",)
# TorchServe answers what exceeds its own limit (max_request_size, set higher) with an empty 413.
MAX_REQUEST_BYTES = 16 << 20
# Types that clients send without having chosen them: the bytes decide.
UNDECLARED_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")

_IMAGE_MAGIC = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
_ACCEPTED = "send image/png, image/jpeg or application/json"
# `curl --data-binary @image.png` without -H declares a form, out of which TorchServe gets no bytes.
_NO_FORM = f"{_ACCEPTED}, named in the Content-Type header (a form loses the bytes)"


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One field of a request.

    Attributes:
        value: The raw bytes, or what TorchServe already parsed out of an ``application/json`` body.
        content_type: Media type in lower case without parameters; empty when none was declared.
    """

    value: object
    content_type: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedImage:
    """The bytes of a PNG or JPEG file."""

    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelArray:
    """Nested lists of pixel values, exactly as JSON gave them.

    Attributes:
        value: The nested lists.
        batched: True when this may be several samples stacked on a first axis.
    """

    value: object
    batched: bool


Payload = EncodedImage | PixelArray


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedRequest:
    """The samples of one request.

    Attributes:
        payloads: What the samples are made of, in request order.
        many: True when the client asked in a form whose answer is a list, however many samples there are.
    """

    payloads: tuple[Payload, ...]
    many: bool


def parse_request(parts: Sequence[Part], *, max_samples: int) -> ParsedRequest:
    """Find the samples of one request.

    Args:
        parts: The request's fields; several only for multipart bodies.
        max_samples: Requests with more samples are refused.

    Raises:
        RequestError: If there is nothing that can be read as a sample.
    """
    if not parts:
        raise MalformedError("empty_request", f"The request has no body; {_NO_FORM}.")
    size = sum(len(part.value) for part in parts if isinstance(part.value, bytes | bytearray))
    if size > MAX_REQUEST_BYTES:
        raise TooLargeError("request_too_large", f"The request has {size} bytes; the limit is {MAX_REQUEST_BYTES}.")
    if len(parts) == 1:
        parsed = _parse_part(parts[0])
    else:
        parsed = ParsedRequest(payloads=tuple(EncodedImage(data=_image_bytes(part)) for part in parts), many=True)
    if len(parsed.payloads) > max_samples:
        raise too_many_samples(len(parsed.payloads), max_samples)
    return parsed


def too_many_samples(count: int, max_samples: int) -> TooLargeError:
    """The error for a request with more samples than allowed."""
    return TooLargeError(
        "too_many_samples", f"The request holds {count} samples; send at most {max_samples} in one request."
    )


def _parse_part(part: Part) -> ParsedRequest:
    if not isinstance(part.value, bytes | bytearray):
        return _parse_json_value(part.value)
    data = bytes(part.value)
    if not data:
        raise MalformedError("empty_request", f"The request body is empty; {_NO_FORM}.")
    if part.content_type in JSON_TYPES:
        return _parse_json_value(_load_json(data))
    if part.content_type in IMAGE_TYPES or (part.content_type in UNDECLARED_TYPES and data.startswith(_IMAGE_MAGIC)):
        return ParsedRequest(payloads=(EncodedImage(data=data),), many=False)
    if part.content_type in UNDECLARED_TYPES and data.lstrip()[:1] in (b"{", b"["):
        return _parse_json_value(_load_json(data))
    raise UnsupportedTypeError("unsupported_type", _unsupported(part.content_type))


def _image_bytes(part: Part) -> bytes:
    """The bytes of one multipart field, which must be an image."""
    value = part.value
    if isinstance(value, bytes | bytearray):
        data = bytes(value)
        if part.content_type in IMAGE_TYPES or data.startswith(_IMAGE_MAGIC):
            return data
    raise UnsupportedTypeError(
        "unsupported_type",
        "Each field of a multipart request must be a PNG or JPEG file; send JSON as a body of its own.",
    )


def _unsupported(content_type: str) -> str:
    if content_type in UNDECLARED_TYPES:
        return f"The body is neither a PNG nor a JPEG image nor JSON; {_ACCEPTED}."
    # The type is the client's text: keep it short and printable, for it goes into logs too.
    shown = ascii(content_type[:60])
    return f"The content type {shown} is not supported; {_ACCEPTED}."


def _load_json(data: bytes) -> object:
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise MalformedError("not_utf8", f"The JSON body is not UTF-8 (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise MalformedError(
            "malformed_json",
            f"The body is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}.",
        ) from error
    except (RecursionError, ValueError) as error:
        # Nesting beyond the interpreter's stack, or an integer of more than 4,300 digits.
        raise MalformedError(
            "malformed_json", "The JSON body is nested too deeply or holds a number too long."
        ) from error


def _parse_json_value(body: object) -> ParsedRequest:
    if not isinstance(body, dict):
        raise MalformedError("wrong_body", f"The JSON body must be an object with the key 'inputs', not {_kind(body)}.")
    keys = sorted(str(key)[:40] for key in body)
    if keys == ["inputs"]:
        value = body["inputs"]
        if isinstance(value, dict):
            return ParsedRequest(payloads=(_decode_b64(value),), many=False)
        return ParsedRequest(payloads=(PixelArray(value=value, batched=True),), many=False)
    if keys == ["instances"]:
        instances = body["instances"]
        if not isinstance(instances, list):
            raise MalformedError("wrong_body", f"'instances' must be a list of samples, not {_kind(instances)}.")
        if not instances:
            raise OutOfRangeError("no_samples", "'instances' is empty; send at least one sample.")
        return ParsedRequest(
            payloads=tuple(
                _decode_b64(item) if isinstance(item, dict) else PixelArray(value=item, batched=False)
                for item in instances
            ),
            many=True,
        )
    found = ", ".join(ascii(key) for key in keys[:5]) or "no key at all"
    raise MalformedError("wrong_key", f"The JSON body must have exactly one key, 'inputs' or 'instances', not {found}.")


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


def _kind(value: object) -> str:
    names = {
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), "an object")
