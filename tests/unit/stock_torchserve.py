"""TorchServe's own code on the worker's side, and messages as its frontend writes them."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterable

with warnings.catch_warnings():
    warnings.simplefilter("ignore", ResourceWarning)  # ts/version.py leaves its file open
    import ts
    from ts import async_service, context, service
    from ts.protocol import otf_message_handler

__all__ = ["async_service", "context", "inference_request", "message", "otf_message_handler", "service", "ts"]

END = struct.pack("!i", -1)


def prefixed(data: bytes) -> bytes:
    return struct.pack("!i", len(data)) + data


def inference_request(
    id: str, fields: Iterable[tuple[str, str, bytes]] = (), headers: Iterable[tuple[str, str]] = ()
) -> bytes:
    """One request of a message.

    Args:
        id: Its id.
        fields: Name, content type and content of each.
        headers: Name and value of each.
    """
    parts = [prefixed(id.encode())]
    for name, value in headers:
        parts += [prefixed(name.encode()), prefixed(value.encode())]
    parts.append(END)
    for name, kind, content in fields:
        parts += [prefixed(name.encode()), prefixed(kind.encode()), prefixed(content)]
    return b"".join([*parts, END])


def message(*requests: bytes) -> bytes:
    """A message that asks for predictions."""
    return b"".join([b"I", *requests, END])


class Replies:
    """Reads the messages of a worker, each with any number of answers."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream

    def __iter__(self) -> Replies:
        return self

    def __next__(self) -> list[tuple[str, int, str, str, bytes]]:
        """The id, status, phrase, content type and body of each answer of the next message."""
        if not self._stream.peek(1):
            raise StopIteration
        assert self._integer() == 200
        assert self._piece() == b"Prediction success"
        answers = []
        while (length := self._integer()) != -1:
            id = self._exactly(length).decode()
            content_type, status, phrase = self._piece().decode(), self._integer(), self._piece().decode()
            headers = {self._piece(): self._piece() for _ in range(self._integer())}
            assert headers in ({}, {b"content-type": content_type.encode()})  # TorchServe says it twice
            answers.append((id, status, phrase, content_type, self._piece()))
        return answers

    def _exactly(self, length: int) -> bytes:
        data = self._stream.read(length)
        assert len(data) == length
        return data

    def _integer(self) -> int:
        (value,) = struct.unpack("!i", self._exactly(4))
        return int(value)

    def _piece(self) -> bytes:
        return self._exactly(self._integer())
