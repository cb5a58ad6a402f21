"""Content encodings and charsets of request bodies: TorchServe hands over bodies as they came."""

from __future__ import annotations

import zlib

from handlers.errors import MalformedError, TooLargeError, UnsupportedTypeError

# By the name in the header, zlib's number for the format.
_FORMATS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
_UTF8 = ("utf-8", "utf8", "us-ascii", "ascii")
# Charsets that clients declare unasked, and that agree with UTF-8 as long as there are no other characters.
_LIKE_ASCII = ("iso-8859-", "windows-125", "latin")


def decompress(data: bytes, encoding: str, *, limit: int) -> bytes:
    """Undo a content encoding.

    Args:
        data: The body.
        encoding: What its header ``Content-Encoding`` says, in lower case.
        limit: Of bytes; a body that would become longer is refused before it does.

    Raises:
        RequestError: If the encoding is unknown, the data are damaged, or they become too many.
    """
    if encoding in ("", "identity"):
        return data
    if encoding not in _FORMATS:
        raise UnsupportedTypeError(
            "unsupported_encoding",
            f"The content encoding {encoding[:40]!a} is not supported; send gzip, deflate, or no encoding at all.",
        )
    stream = zlib.decompressobj(_FORMATS[encoding])
    try:
        plain = stream.decompress(data, limit + 1)
    except zlib.error as error:
        raise _broken(encoding) from error
    if len(plain) > limit:
        raise TooLargeError(
            "request_too_large", f"The request has more than {limit} bytes once it is decompressed, which is the limit."
        )
    if not stream.eof or stream.unused_data:
        raise _broken(encoding)
    return plain


def check_charset(data: bytes, charset: str) -> None:
    """Refuse text that is declared to be no UTF-8.

    Args:
        data: The text.
        charset: What its type says, in lower case; empty if nothing.

    Raises:
        UnsupportedTypeError: If it may mean other characters than UTF-8 would make of it.
    """
    if not charset or charset in _UTF8 or (charset.startswith(_LIKE_ASCII) and data.isascii()):
        return
    raise UnsupportedTypeError(
        "unsupported_charset", f"The charset {charset[:40]!a} is not supported; send the text as UTF-8."
    )


def _broken(encoding: str) -> MalformedError:
    return MalformedError(
        "broken_encoding", f"The body is not whole {encoding} data, although the header Content-Encoding says so."
    )
