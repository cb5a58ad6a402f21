"""TorchServe's wire between frontend and worker: requests that come in, answers that go out.

Everything is big-endian and prefixed with its length; lists end with -1. As ``ts.protocol.otf_message_handler`` of
TorchServe 0.12.0 reads and writes it, but from what has already arrived, whole or not.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

_INTEGER = struct.Struct("!i")
_END = -1
_PREDICT = ord("I")
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


class _Missing:
    """Stands for what has not arrived yet."""


_MISSING = _Missing()


class FrameReader:
    """Cuts a stream of bytes into requests. It goes on where it stopped, so nothing is looked at or copied twice."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._position = 0
        # The buffer must be that long before anything can be taken out of it.
        self._needed = 1
        self._frames: list[Frame] = []
        self._taking = self._take()

    def feed(self, chunk: bytes) -> list[Frame]:
        """Add what has arrived, and take the requests of all messages that are whole now.

        Raises:
            FrameError: If it is another command than to predict.
        """
        self._buffer += chunk
        if len(self._buffer) < self._needed:
            return []
        next(self._taking)
        del self._buffer[: self._position]
        self._needed -= self._position
        self._position = 0
        frames, self._frames = self._frames, []
        return frames

    def _take(self) -> Iterator[None]:
        """Message after message; it pauses whenever something is missing."""
        while True:
            self._needed = self._position + 1
            if len(self._buffer) < self._needed:
                yield
            command = self._buffer[self._position]
            if command != _PREDICT:
                raise FrameError(f"the frontend sent the command {bytes([command])!r}")
            self._position += 1
            frames = yield from self._message()
            self._frames += frames
            del frames  # until the next message, this would hold what was answered long since

    def _message(self) -> Generator[None, None, list[Frame]]:
        # Not a generator that waits for a piece, which would cost half as much again.
        piece = self._piece
        frames: list[Frame] = []
        while True:
            while (request_id := piece()) is _MISSING:
                yield
            if request_id is None:
                return frames
            own: dict[str, object] = {}
            while True:
                while (name := piece()) is _MISSING:
                    yield
                if name is None:
                    break
                while (value := piece()) is _MISSING:
                    yield
                own[name.decode()] = (value or b"").decode()
            headers: dict[str, object] = {}
            fields: dict[str, object] = {}
            while True:
                while (name := piece()) is _MISSING:
                    yield
                if name is None:
                    break
                while (kind := piece()) is _MISSING:
                    yield
                while (value := piece()) is _MISSING:
                    yield
                field = name.decode()
                fields[field] = value or b""
                headers[field] = {"content-type": (kind or b"").decode()}
            # The request's own headers last, as TorchServe's context has them.
            headers |= own
            frames.append(Frame(request_id, headers, fields))

    def _piece(self) -> Any:
        """The bytes behind a length; None for the end of a list; _MISSING, if they have not all arrived."""
        buffer, position = self._buffer, self._position
        start = position + 4
        if start > len(buffer):
            self._needed = start
            return _MISSING
        (length,) = _INTEGER.unpack_from(buffer, position)
        if length == _END:
            self._position = start
            return None
        stop = start + length
        if stop > len(buffer):
            self._needed = stop
            return _MISSING
        self._position = stop
        return bytes(buffer[start:stop])


def _prefixed(data: bytes) -> bytes:
    return _INTEGER.pack(len(data)) + data


_BEGIN = _INTEGER.pack(200) + _prefixed(b"Prediction success")
_LAST = _INTEGER.pack(_END)


@functools.lru_cache(maxsize=64)
def _head(content_type: str, status: int, phrase: str, headers: tuple[tuple[str, str], ...]) -> bytes:
    """What stands between an answer's id and its body, which is the same for nearly all of them."""
    return b"".join(
        (
            _prefixed(content_type.encode("ascii")),
            _INTEGER.pack(status),
            _prefixed(phrase.encode("ascii")),
            _INTEGER.pack(len(headers)),
            *(_prefixed(text.encode("ascii")) for header in headers for text in header),
        )
    )


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer.

    Attributes:
        id: Of its request.
        status: HTTP status.
        phrase: Its reason phrase; ASCII.
        content_type: ASCII.
        body: Bytes.
        headers: More headers by name; ASCII.
    """

    id: bytes
    status: int
    phrase: str
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """A whole message with this answer alone."""
        head = _head(self.content_type, self.status, self.phrase, tuple(self.headers.items()))
        return b"".join((_BEGIN, _prefixed(self.id), head, _prefixed(self.body), _LAST))
