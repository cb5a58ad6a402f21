"""Errors of the handlers.

HandlerError
├── SignatureError            a signature, golden or digest document breaks its schema
├── LoadError                 a worker must not become ready (also a RuntimeError: TorchServe reports those)
│   ├── DigestError           a file of the archive is missing, changed or unexpected
│   ├── BackendError          the artifact does not load on the device and runtime at hand
│   └── GoldenError           the loaded model does not repeat its golden answers
└── RequestError              one request gets an error answer; its neighbours in the batch do not
    ├── MalformedError        400  the body cannot be read as what it claims to be
    ├── TooLargeError         413  more bytes, pixels or samples than the limits allow
    ├── UnsupportedTypeError  415  a content type or file format that the model does not take
    ├── OutOfRangeError       422  readable, but outside the signature
    ├── InferenceError        500  the model failed on a valid sample: our own defect
    └── OverloadedError       503  the answer would come too late to be of use
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar


class HandlerError(Exception):
    """Base of all errors raised by handlers."""

    user_facing = True


class SignatureError(HandlerError):
    """A document in an archive, or one meant for an archive, breaks its schema."""


class LoadError(HandlerError, RuntimeError):
    """The worker must not become ready."""


class DigestError(LoadError):
    """A file differs from the digest recorded for it."""


class BackendError(LoadError):
    """The artifact cannot run here."""


class GoldenError(LoadError):
    """The model answers its golden samples differently from when it was exported."""


class RequestError(HandlerError):
    """One request, or one sample of it, cannot be answered.

    Args:
        code: Stable machine-readable word, such as ``malformed_json``.
        message: One sentence for the person who sent the request. It never quotes the request's contents
            at length.

    Attributes:
        open_protocol: Whether the request is known to be one of the Open Inference Protocol; see
            :func:`as_open_protocol`.
    """

    status: ClassVar[int] = 500

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.open_protocol = False

    def document(self, *, open_protocol: bool = False) -> dict[str, Any]:
        """The answer of the request: an object with the code and the message.

        The Open Inference Protocol has a string in its place, and its clients fail over anything else; members beside
        it do not disturb them.

        Args:
            open_protocol: Whether the request is one of that protocol, whatever the error itself knows.
        """
        if open_protocol or self.open_protocol:
            return {"error": f"{self.code}: {self.message}", "code": self.code}
        return {"error": {"code": self.code, "message": self.message}}


@contextmanager
def as_open_protocol() -> Iterator[None]:
    """Give the errors of what runs inside the form that the Open Inference Protocol has."""
    try:
        yield
    except RequestError as error:
        error.open_protocol = True
        raise


class MalformedError(RequestError):
    """The body cannot be read as what it claims to be."""

    status = 400


class TooLargeError(RequestError):
    """The request holds more than the limits allow."""

    status = 413


class UnsupportedTypeError(RequestError):
    """The content type or file format is not one that the model takes."""

    status = 415


class OutOfRangeError(RequestError):
    """The request is readable, but outside the model's signature."""

    status = 422


class InferenceError(RequestError):
    """The model failed on a valid sample."""

    status = 500


class OverloadedError(RequestError):
    """There is more to do than time."""

    status = 503


def one_line(error: BaseException) -> str:
    """What an error of a runtime says, on one line of at most 300 characters: they quote tracebacks of their own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if any(line.startswith("Traceback") for line in lines):
        lines = lines[-1:]
    return " ".join(lines)[:300] or type(error).__name__


def defect(code: str, message: str, cause: Exception) -> InferenceError:
    """An error of ours, which the log shows with its cause."""
    failure = InferenceError(code, message)
    failure.__cause__ = cause
    return failure
