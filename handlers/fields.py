"""What TorchServe hands over for one request, field by field, as the parts that decoders read."""

from __future__ import annotations

from collections.abc import Mapping

from handlers.parameters import PARAMETERS_FIELD, PARAMETERS_HEADER, query_parameters
from handlers.request import JSON_TYPES, Part

# Fields that hold the body of a request that is not multipart; anything else beside them came from the URL's query.
_BODY_FIELDS = ("body", "data")
_JSON_LENGTH_HEADER = "inference-header-content-length"
_MULTIPART = "multipart/form-data"
_QUERY = ("top_k",)


def read_parts(row: Mapping[str, object], headers: Mapping[str, object]) -> list[Part]:
    """The body of a request, or the fields of a multipart one, and its parameters.

    Args:
        row: Values by field.
        headers: The request's headers by name, in the client's case; and for each field, a mapping with its own.
    """
    own = {name.lower(): value for name, value in headers.items() if isinstance(value, str)}
    declared = own.get("content-type", "")
    request_type = _media_type(declared)
    body = None if request_type == _MULTIPART else next((name for name in _BODY_FIELDS if name in row), None)
    if body is None:
        parts = [
            Part(value=value, content_type=_field_type(headers.get(name)) or request_type, name=name)
            for name, value in row.items()
            if name not in _QUERY
        ]
    else:
        content_type = _field_type(headers.get(body)) or request_type
        parts = [
            Part(
                value=row[body],
                content_type=content_type,
                json_bytes=_length(own.get(_JSON_LENGTH_HEADER)),
                charset=_charset(declared),
                encoding=own.get("content-encoding", "").strip().lower(),
            )
        ]
    if PARAMETERS_HEADER in own:
        parts.append(_parameters(own[PARAMETERS_HEADER].encode("utf-8", errors="replace")))
    if any(name in row for name in _QUERY):
        parts.append(_parameters(query_parameters(row)))
    return parts


def asks_for_description(row: Mapping[str, object], headers: Mapping[str, object]) -> bool:
    """Whether this is TorchServe's describe call, ``GET /models/NAME?customized=true``, and no prediction.

    A client may send the same header with a prediction: it has fields, then, and nothing else than they count.
    """
    return not row and headers.get("describe") == "True"


def _parameters(value: object) -> Part:
    return Part(value=value, content_type=JSON_TYPES[0], name=PARAMETERS_FIELD)


def _field_type(headers: object) -> str:
    """The media type that a field itself declares."""
    value = headers.get("content-type") if isinstance(headers, Mapping) else None
    return _media_type(str(value)) if value else ""


def _media_type(header: str) -> str:
    return header.partition(";")[0].strip().lower()


def _charset(header: str) -> str:
    """The charset of a media type; empty if it names none."""
    for parameter in header.split(";")[1:]:
        name, _, value = parameter.partition("=")
        if name.strip().lower() == "charset":
            return value.strip().strip('"').lower()
    return ""


def _length(header: str | None) -> int | None:
    """The number in a header; one that no body has if there is something else."""
    if header is None:
        return None
    return int(header) if header.isascii() and header.isdigit() and len(header) < 20 else -1
