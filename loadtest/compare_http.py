"""HTTP/1.1 answers, read as cheaply as a load generator has to."""

from dataclasses import dataclass

_HEAD_END = b"\r\n\r\n"
_MOST_HEAD_BYTES = 1 << 16


class MalformedAnswerError(Exception):
    """What arrived is no HTTP answer that has an end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpAnswer:
    """One whole answer.

    Attributes:
        status: HTTP status.
        body: All of its body.
        closes: Whether the server closes the connection after it.
    """

    status: int
    body: bytes
    closes: bool


class AnswerReader:
    """Puts the answers of one connection together; at most one is on its way at a time."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> HttpAnswer | None:
        """Takes bytes, and gives the answer when it is whole.

        Raises:
            MalformedAnswerError: They are no answer, or one whose end only the end of the connection tells.
        """
        self._data += data
        end = self._data.find(_HEAD_END)
        if end < 0:
            if len(self._data) > _MOST_HEAD_BYTES:
                raise MalformedAnswerError("the answer's headers have no end")
            return None
        status, headers = _parse_head(bytes(self._data[:end]))
        start = end + len(_HEAD_END)
        if headers.get(b"transfer-encoding") == b"chunked":
            body = self._chunks(start)
        elif b"content-length" in headers:
            body = self._counted(start, headers[b"content-length"])
        else:
            raise MalformedAnswerError("the answer has neither a Content-Length nor chunks")
        if body is None:
            return None
        self._data.clear()
        return HttpAnswer(status=status, body=body, closes=headers.get(b"connection", b"").lower() == b"close")

    def _counted(self, start: int, length: bytes) -> bytes | None:
        if not length.isdigit():
            raise MalformedAnswerError(f"the Content-Length is {length!r}")
        stop = start + int(length)
        if len(self._data) > stop:
            raise MalformedAnswerError("more bytes than the Content-Length says")
        return bytes(self._data[start:]) if len(self._data) == stop else None

    def _chunks(self, start: int) -> bytes | None:
        """The body of a chunked answer without trailers; None while it is not whole."""
        body = bytearray()
        while (end := self._data.find(b"\r\n", start)) >= 0:
            try:
                size = int(self._data[start:end].partition(b";")[0], 16)
            except ValueError as error:
                raise MalformedAnswerError(f"a chunk has the size {bytes(self._data[start:end][:20])!r}") from error
            start = end + 2
            if len(self._data) < start + size + 2:
                return None
            body += self._data[start : start + size]
            start += size + 2
            if size == 0:
                return bytes(body)
        return None


def _parse_head(head: bytes) -> tuple[int, dict[bytes, bytes]]:
    first, *lines = head.split(b"\r\n")
    words = first.split(b" ", 2)
    if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
        raise MalformedAnswerError(f"it begins with {first[:40]!r}")
    pairs = (line.partition(b":") for line in lines)
    return int(words[1]), {name.strip().lower(): value.strip() for name, _, value in pairs}
