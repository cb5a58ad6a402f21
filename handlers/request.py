"""Requests: what TorchServe hands over, and what all tasks read alike.

A body is JSON, ``{"inputs": ...}`` or KServe v1's ``{"instances": [...]}``, both with ``parameters`` beside them if the
client likes, or an Open Inference Protocol request; or one sample in a form of the task's own (its *medium*), such as
an encoded image; multipart has one such sample a field.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from handlers.encoding import check_charset, decompress
from handlers.errors import MalformedError, OutOfRangeError, TooLargeError, UnsupportedTypeError, as_open_protocol
from handlers.limits import MAX_JSON_LISTS, MAX_REQUEST_BYTES
from handlers.open_inference import OpenRequest, is_open_request, parse_open_request
from handlers.parameters import PARAMETERS_FIELD
from handlers.words import kind, shown_keys

JSON_TYPES = ("application/json",)
RAW_TYPE = "application/octet-stream"
# Types that clients send without having chosen them: the bytes decide.
UNDECLARED_TYPES = ("", RAW_TYPE, "application/x-www-form-urlencoded", "multipart/form-data")


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One field of a request.

    Attributes:
        value: The raw bytes, or what TorchServe already made of them: the value of an ``application/json`` body, the
            string of a ``text/...`` one.
        content_type: Media type in lower case without parameters; empty when none was declared.
        name: What a multipart body calls it. ``parameters`` are no sample, and may also come beside a body that is not
            multipart.
        json_bytes: How many bytes of a body are JSON, when the bytes of tensors follow (the Open Inference Protocol's
            header ``Inference-Header-Content-Length``); None when all of them are what the type says.
        charset: What the type says of a body's characters, in lower case; empty if nothing.
        encoding: The body's content encoding, such as ``gzip``, in lower case; empty if it has none.
    """

    value: object
    content_type: str
    name: str = ""
    json_bytes: int | None = None
    charset: str = ""
    encoding: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Medium:
    """A form that samples of a task may have besides JSON.

    Attributes:
        types: Media types that declare it.
        recognises: Whether bytes of no declared type, or of one field of a multipart body, are of this form.
        accepted: What to send, for messages: ``send image/png, image/jpeg or application/json``.
        absent: The same as a fact: ``neither a PNG nor a JPEG image nor JSON``.
        wrong_field: The whole sentence for a field of a multipart body that is not of this form.
        raw: Whether an ``application/octet-stream`` that is nothing else is a sample.
    """

    types: tuple[str, ...]
    recognises: Callable[[bytes], bool]
    accepted: str
    absent: str
    wrong_field: str
    raw: bool = False

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
        parameters: The request's parameters, unread; None if it has none.
    """

    key: Literal["inputs", "instances"]
    value: object
    parameters: object = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaBody:
    """One sample or several in the task's own form.

    Attributes:
        values: Bytes, or strings that TorchServe has decoded, one a sample.
        many: True for multipart bodies of several samples, whose answer is a list.
        parameters: The request's parameters, unread; None if it has none.
        raw: True for bytes of which nothing says what they are.
    """

    values: tuple[bytes | str, ...]
    many: bool
    parameters: object = None
    raw: bool = False


Body = JsonBody | MediaBody | OpenRequest


def read_body(parts: Sequence[Part], medium: Medium) -> Body:
    """Read one request as what it claims to be.

    Args:
        parts: The request's fields; several only for multipart bodies, or with parameters.
        medium: The form that the task takes besides JSON.

    Raises:
        RequestError: If it is empty, too large, of another type, or no such JSON.
    """
    size = sum([len(part.value) for part in parts if isinstance(part.value, (bytes, bytearray, str))])
    if size > MAX_REQUEST_BYTES:
        raise TooLargeError("request_too_large", f"The request has {size} bytes; the limit is {MAX_REQUEST_BYTES}.")
    parameters = None
    if len(parts) > 1 or (parts and parts[0].name == PARAMETERS_FIELD):
        parameters = _parameters([part for part in parts if part.name == PARAMETERS_FIELD])
        parts = [part for part in parts if part.name != PARAMETERS_FIELD]
    if not parts:
        raise MalformedError("empty_request", f"The request has no body; {medium.no_body}.")
    if len(parts) > 1:
        values = tuple(_field(part, medium) for part in parts)
        return MediaBody(values=values, many=True, parameters=parameters)
    (part,) = parts
    if part.json_bytes is None:
        return _single(part, medium, parameters)
    with as_open_protocol():  # no other form has a number of bytes of JSON
        return _single(part, medium, parameters)


def _single(part: Part, medium: Medium, parameters: object) -> Body:
    """A body that is not multipart, or has one field."""
    if part.encoding or part.charset:
        part = _plain(part)
    value = part.value
    if isinstance(value, str) and part.content_type not in JSON_TYPES:  # TorchServe has decoded a text/... body
        text = _decoded_text(value, part.content_type, medium)
        return MediaBody(values=(text,), many=False, parameters=parameters)
    if not isinstance(value, (bytes, bytearray)):
        return _json_body(value, parameters)
    if not value:
        raise _empty(medium)
    if part.json_bytes is not None:
        return _with_binary(bytes(value), part.json_bytes, parameters)
    if part.content_type in JSON_TYPES:
        return _json_body(_load_json(value), parameters)
    return _undeclared(bytes(value), part.content_type, medium, parameters)


def _plain(part: Part) -> Part:
    """A body without its content encoding, its charset checked."""
    value = part.value
    if isinstance(value, str) and part.content_type not in JSON_TYPES:
        # TorchServe decodes what is declared to be text, compressed or not, if it can.
        value = value.encode("utf-8", errors="surrogatepass")
    if not isinstance(value, bytes | bytearray):
        # TorchServe has parsed it: it is neither compressed nor of another charset.
        decompress(b"", part.encoding, limit=MAX_REQUEST_BYTES)
        return part
    data = bytes(value)
    if data:  # an empty body is empty, whatever it claims to be
        data = decompress(data, part.encoding, limit=MAX_REQUEST_BYTES)
    if part.content_type in JSON_TYPES or part.content_type.startswith("text/"):
        check_charset(data, part.charset)
    return replace(part, value=data)


def _undeclared(data: bytes, content_type: str, medium: Medium, parameters: object) -> Body:
    """A body whose type does not say that it is JSON."""
    undeclared = content_type in UNDECLARED_TYPES
    if content_type in medium.types or (undeclared and medium.recognises(data)):
        return MediaBody(values=(data,), many=False, parameters=parameters)
    raw = content_type == RAW_TYPE and medium.raw
    if undeclared and looks_like_json(data):
        try:
            return _json_body(_load_json(data), parameters)
        except MalformedError as error:
            if not raw or error.code not in ("malformed_json", "not_utf8"):
                raise
    if raw:
        return MediaBody(values=(data,), many=False, parameters=parameters, raw=True)
    raise UnsupportedTypeError("unsupported_type", _unsupported(content_type, medium))


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
    return data.removeprefix(codecs.BOM_UTF8).lstrip()[:1] in (b"{", b"[")


def no_samples(key: str) -> OutOfRangeError:
    """The error for a request whose list of samples is empty."""
    return OutOfRangeError("no_samples", f"'{key}' is empty; send at least one sample.")


def _parameters(parts: Sequence[Part]) -> object:
    """What stands in the parts that are no samples; None if there are none, or nothing stands in them."""
    if len(parts) > 1:
        raise _parameters_twice()
    value = parts[0].value if parts else None
    if isinstance(value, str):
        value = value.encode("utf-8", errors="replace")
    return _load_json(value) if isinstance(value, (bytes, bytearray)) else value


def _parameters_twice() -> MalformedError:
    return MalformedError("wrong_parameters", "The parameters come twice; send them in one place.")


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


def _load_json(data: bytes | bytearray) -> object:
    if len(data) > MAX_JSON_LISTS:
        count = data.count(b"[") + data.count(b"{")
        if count > MAX_JSON_LISTS:
            raise TooLargeError(
                "json_too_complex",
                f"The JSON has {count} lists and objects; the limit is {MAX_JSON_LISTS}; send fewer samples, "
                "or flat or binary tensors.",
            )
    try:
        return json.loads(data.decode("utf-8-sig"))
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


def _with_binary(data: bytes, json_bytes: int, parameters: object) -> OpenRequest:
    """An Open Inference Protocol request whose tensors follow its JSON."""
    if not 0 < json_bytes <= len(data):
        raise MalformedError(
            "wrong_binary_size",
            f"The header Inference-Header-Content-Length says {json_bytes}, and the body has {len(data)} bytes.",
        )
    body = _load_json(data[:json_bytes])
    if not isinstance(body, dict):
        raise MalformedError("wrong_body", f"The JSON must be an object with the key 'inputs', not {kind(body)}.")
    return _open_request(body, data[json_bytes:], parameters)


def _json_body(body: object, parameters: object) -> JsonBody | OpenRequest:
    if not isinstance(body, dict):
        raise MalformedError("wrong_body", f"The JSON body must be an object with the key 'inputs', not {kind(body)}.")
    if is_open_request(body):
        return _open_request(body, b"", parameters)
    if len(body) > 1 and PARAMETERS_FIELD in body:
        body = dict(body)
        parameters = _one_of(parameters, body.pop(PARAMETERS_FIELD))
    if len(body) == 1:
        if "inputs" in body:
            return JsonBody(key="inputs", value=body["inputs"], parameters=parameters)
        if "instances" in body:
            return JsonBody(key="instances", value=_instances(body["instances"]), parameters=parameters)
    found = shown_keys(list(body))
    raise MalformedError(
        "wrong_key",
        "The JSON body must have exactly one of the keys 'inputs' and 'instances', and may have 'parameters', "
        f"not {found}.",
    )


def _instances(instances: object) -> list[object]:
    if not isinstance(instances, list):
        raise MalformedError("wrong_body", f"'instances' must be a list of samples, not {kind(instances)}.")
    if not instances:
        raise no_samples("instances")
    return instances


def _open_request(body: dict[str, object], binary: bytes, parameters: object) -> OpenRequest:
    if parameters is not None:
        body = {**body, PARAMETERS_FIELD: _one_of(parameters, body.get(PARAMETERS_FIELD))}
    with as_open_protocol():
        return parse_open_request(body, binary)


def _one_of(outside: object, inside: object) -> object:
    """The parameters, wherever they stand."""
    if outside is not None and inside is not None:
        raise _parameters_twice()
    return inside if outside is None else outside
