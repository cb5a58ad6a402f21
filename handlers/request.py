"""Requests: what TorchServe hands over, and what all tasks read alike.

A body is JSON, ``{"inputs": ...}`` or KServe v1's ``{"instances": [...]}``, or one sample in a form of the task's own
(its *medium*), such as an encoded image; multipart has one such sample a field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from handlers.errors import MalformedError, OutOfRangeError, TooLargeError, UnsupportedTypeError

JSON_TYPES = ("application/json",)
# TorchServe answers what exceeds its own limit (max_request_size, set higher) with an empty 413.
MAX_REQUEST_BYTES = 16 << 20
# Types that clients send without having chosen them: the bytes decide.
UNDECLARED_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One field of a request.

    Attributes:
        value: The raw bytes, or what TorchServe already made of them: the value of an ``application/json`` body, the
            string of a ``text/...`` one.
        content_type: Media type in lower case without parameters; empty when none was declared.
    """

    value: object
    content_type: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Medium:
    """A form that samples of a task may have besides JSON.

    Attributes:
        types: Media types that declare it.
        recognises: Whether bytes of no declared type, or of one field of a multipart body, are of this form.
        accepted: What to send, for messages: ``send image/png, image/jpeg or application/json``.
        absent: The same as a fact: ``neither a PNG nor a JPEG image nor JSON``.
        wrong_field: The whole sentence for a field of a multipart body that is not of this form.
    """

    types: tuple[str, ...]
    recognises: Callable[[bytes], bool]
    accepted: str
    absent: str
    wrong_field: str

    @property
    def no_body(self) -> str:
        """What to send, when nothing arrived.

        ``curl --data-binary`` without ``-H`` declares a form, out of which TorchServe gets no bytes.
        """
        return f"{self.accepted}, named in the Content-Type header (a form loses the bytes)"


@dataclass(frozen=True, kw_only=True, slots=True)
class JsonBody:
    """A JSON body.

    Attributes:
        key: ``inputs`` holds one sample or several; ``instances`` holds a list of at least one.
        value: What the key holds.
    """

    key: Literal["inputs", "instances"]
    value: object


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaBody:
    """One sample or several in the task's own form.

    Attributes:
        values: Bytes, or strings that TorchServe has decoded, one a sample.
        many: True for multipart bodies of several fields, whose answer is a list.
    """

    values: tuple[bytes | str, ...]
    many: bool


def read_body(parts: Sequence[Part], medium: Medium) -> JsonBody | MediaBody:
    """Read one request as what it claims to be.

    Args:
        parts: The request's fields; several only for multipart bodies.
        medium: The form that the task takes besides JSON.

    Raises:
        RequestError: If it is empty, too large, of another type, or no such JSON.
    """
    if not parts:
        raise MalformedError("empty_request", f"The request has no body; {medium.no_body}.")
    size = sum([len(part.value) for part in parts if isinstance(part.value, (bytes, bytearray, str))])
    if size > MAX_REQUEST_BYTES:
        raise TooLargeError("request_too_large", f"The request has {size} bytes; the limit is {MAX_REQUEST_BYTES}.")
    if len(parts) > 1:
        return MediaBody(values=tuple(_field(part, medium) for part in parts), many=True)
    (part,) = parts
    value = part.value
    if isinstance(value, str) and part.content_type not in JSON_TYPES:  # TorchServe has decoded a text/... body
        return MediaBody(values=(_decoded_text(value, part.content_type, medium),), many=False)
    if not isinstance(value, (bytes, bytearray)):
        return _json_body(value)
    data = bytes(value)
    if not data:
        raise _empty(medium)
    undeclared = part.content_type in UNDECLARED_TYPES
    if part.content_type in JSON_TYPES:
        return _json_body(_load_json(data))
    if part.content_type in medium.types or (undeclared and medium.recognises(data)):
        return MediaBody(values=(data,), many=False)
    if undeclared and looks_like_json(data):
        return _json_body(_load_json(data))
    raise UnsupportedTypeError("unsupported_type", _unsupported(part.content_type, medium))


def _decoded_text(value: str, content_type: str, medium: Medium) -> str:
    if not value:
        raise _empty(medium)
    if content_type not in medium.types:
        raise UnsupportedTypeError("unsupported_type", _unsupported(content_type, medium))
    return value


def _empty(medium: Medium) -> MalformedError:
    return MalformedError("empty_request", f"The request body is empty; {medium.no_body}.")


def looks_like_json(data: bytes) -> bool:
    """Whether bytes begin like a JSON object or list."""
    return data.lstrip()[:1] in (b"{", b"[")


def too_many_samples(count: int, max_samples: int) -> TooLargeError:
    """The error for a request with more samples than allowed."""
    return TooLargeError(
        "too_many_samples", f"The request holds {count} samples; send at most {max_samples} in one request."
    )


def no_samples(key: str) -> OutOfRangeError:
    """The error for a request whose list of samples is empty."""
    return OutOfRangeError("no_samples", f"'{key}' is empty; send at least one sample.")


def kind(value: object) -> str:
    """What a JSON value is, in words."""
    names = {
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), "an object")


def shown_keys(keys: Sequence[object]) -> str:
    """Keys of a client's object for a message: few, short and printable, for they go into logs too."""
    return ", ".join(ascii(str(key)[:40]) for key in sorted(keys, key=str)[:5]) or "no key at all"


def _field(part: Part, medium: Medium) -> bytes | str:
    """The sample in one field of a multipart body."""
    value = part.value
    if isinstance(value, str) and part.content_type in medium.types:
        return value
    if isinstance(value, bytes | bytearray):
        data = bytes(value)
        if part.content_type in medium.types or medium.recognises(data):
            return data
    raise UnsupportedTypeError("unsupported_type", medium.wrong_field)


def _unsupported(content_type: str, medium: Medium) -> str:
    if content_type in UNDECLARED_TYPES:
        return f"The body is {medium.absent}; {medium.accepted}."
    # The type is the client's text: keep it short and printable, for it goes into logs too.
    shown = ascii(content_type[:60])
    return f"The content type {shown} is not supported; {medium.accepted}."


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


def _json_body(body: object) -> JsonBody:
    if not isinstance(body, dict):
        raise MalformedError("wrong_body", f"The JSON body must be an object with the key 'inputs', not {kind(body)}.")
    if set(body) == {"inputs"}:
        return JsonBody(key="inputs", value=body["inputs"])
    if set(body) == {"instances"}:
        instances = body["instances"]
        if not isinstance(instances, list):
            raise MalformedError("wrong_body", f"'instances' must be a list of samples, not {kind(instances)}.")
        if not instances:
            raise no_samples("instances")
        return JsonBody(key="instances", value=instances)
    found = shown_keys(list(body))
    raise MalformedError("wrong_key", f"The JSON body must have exactly one key, 'inputs' or 'instances', not {found}.")
