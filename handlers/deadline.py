"""When a client gives up, as far as the headers of its request tell."""

from __future__ import annotations

from collections.abc import Mapping

# Relative to when the request is read; who gives up earlier than the model answers need not be computed.
_TIMEOUT_HEADERS = ("x-request-timeout-ms", "x-envoy-expected-rq-timeout-ms")
# The frontend's class writes it, over whatever a client wrote.
_QUEUED_HEADER = "torchport-queued-ms"


def deadline(headers: Mapping[str, object], arrived: float) -> float:
    """The moment at which the client gives up; the time in the frontend's queue is gone already.

    Args:
        headers: Of the request, by name; others than texts count for nothing.
        arrived: When it arrived here, in seconds.

    Returns:
        On the clock of ``arrived``; infinite when the client named none.
    """
    timeouts = [
        milliseconds
        for name, value in headers.items()
        if name.lower() in _TIMEOUT_HEADERS and (milliseconds := _milliseconds(value)) is not None
    ]
    if not timeouts:
        return float("inf")
    queued = _milliseconds(headers.get(_QUEUED_HEADER)) or 0
    return arrived + (min(timeouts) - queued) / 1000


def _milliseconds(value: object) -> int | None:
    text = value.strip() if isinstance(value, str) else ""
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 9 else None
