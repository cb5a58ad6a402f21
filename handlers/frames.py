"""TorchServe's wire between frontend and worker: requests that come in, answers that go out.

Everything is big-endian and prefixed with its length; lists end with -1. As ``ts.protocol.otf_message_handler`` of
TorchServe 0.12.0 reads and writes it, but from what has already arrived, whole or not.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

_INTEGER = struct.Struct("!i")
_END = -1
_PREDICT = b"I"
_LONGEST_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Frame:
    """One request.

    Attributes:
        id: Its id, which the answer must carry.
        headers: The request's headers by name; for each field also its own ``content-type``, under the field's name,
            as TorchServe's context has them.
        fields: Bytes by field name: ``body``, or those of a multipart request or a query.
    """

    id: bytes
    headers: Mapping[str, object]
    fields: Mapping[str, object]


class FrameError(Exception):
    """The frontend sent what no frontend of a known release sends."""


class _IncompleteError(Exception):
    """More bytes must arrive first."""


class FrameReader:
    """Cuts a stream of bytes into requests."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        # No message is tried again before so many bytes are there: a large one arrives in hundreds of pieces.
        self._needed = 1

    def feed(self, chunk: bytes) -> list[Frame]:
        """Add what has arrived, and take the requests of all messages that are whole now.

        Raises:
            FrameError: If it is another command than to predict.
        """
        self._buffer += chunk
        frames: list[Frame] = []
        start = 0
        while len(self._buffer) - start >= self._needed:
            try:
                found, stop = _message(self._buffer, start)
            except _IncompleteError as incomplete:
                (end,) = incomplete.args
                self._needed = end - start
                break
            frames += found
            start, self._needed = stop, 1
        if start:
            del self._buffer[:start]
        return frames


def _message(buffer: bytearray, start: int) -> tuple[list[Frame], int]:
    """The requests of one message, and where it ends."""
    if buffer[start : start + 1] != _PREDICT:
        raise FrameError(f"the frontend sent the command {bytes(buffer[start : start + 1])!r}")
    frames = []
    request_id, position = _piece(buffer, start + 1)
    while request_id is not None:
        headers: dict[str, object] = {}
        own: dict[str, object] = {}
        name, position = _piece(buffer, position)
        while name is not None:
            value, position = _piece(buffer, position)
            own[name.decode()] = (value or b"").decode()
            name, position = _piece(buffer, position)
        fields: dict[str, object] = {}
        name, position = _piece(buffer, position)
        while name is not None:
            kind, position = _piece(buffer, position)
            value, position = _piece(buffer, position)
            field = name.decode()
            fields[field] = value or b""
            headers[field] = {"content-type": (kind or b"").decode()}
            name, position = _piece(buffer, position)
        # The request's own headers last, as TorchServe's context has them.
        frames.append(Frame(request_id, {**headers, **own}, fields))
        request_id, position = _piece(buffer, position)
    return frames, position


def _piece(buffer: bytearray, position: int) -> tuple[bytes | None, int]:
    """The bytes behind a length, or None for the end of a list; and where they end."""
    start = position + 4
    if start > len(buffer):
        raise _IncompleteError(start)
    (length,) = _INTEGER.unpack_from(buffer, position)
    if length == _END:
        return None, start
    stop = start + length
    if stop > len(buffer):
        raise _IncompleteError(stop)
    return bytes(buffer[start:stop]), stop


def _prefixed(data: bytes) -> bytes:
    return _INTEGER.pack(len(data)) + data


_BEGIN = _INTEGER.pack(200) + _prefixed(b"Prediction success")
_LAST = _INTEGER.pack(_END)
_NO_HEADERS = _INTEGER.pack(0)


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer.

    Attributes:
        id: Of its request.
        status: HTTP status.
        phrase: Its reason phrase; ASCII.
        content_type: ASCII.
        body: Bytes.
    """

    id: bytes
    status: int
    phrase: str
    content_type: str
    body: bytes

    def encode(self) -> bytes:
        """A whole message with this answer alone."""
        return b"".join(
            (
                _BEGIN,
                _prefixed(self.id),
                _prefixed(self.content_type.encode("ascii")),
                _INTEGER.pack(self.status),
                _prefixed(self.phrase.encode("ascii")),
                _NO_HEADERS,
                _prefixed(self.body),
                _LAST,
            )
        )
