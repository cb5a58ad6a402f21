"""Whether an answer is right."""

import json
from dataclasses import dataclass

WRONG_ANSWER = "wrong answer"
UNREADABLE_ANSWER = "unreadable answer"
TIMED_OUT = "timed out"
CONNECTION_REFUSED = "connection refused"
CONNECTION_LOST = "connection lost"
IN_FLIGHT_LIMIT = "in-flight limit"

EXCERPT_CHARS = 200


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a request failed.

    Attributes:
        kind: What the failure is counted under.
        detail: What happened to this one request.
    """

    kind: str
    detail: str


def check_answer(*, status: int, body: bytes, expected_label: str | None) -> Fault | None:
    """Judges one HTTP answer.

    Args:
        status: HTTP status.
        body: The answer's bytes.
        expected_label: Top-1 label of a right answer; None to check the status alone.

    Returns:
        None for a right answer, else what is wrong with it.
    """
    if status != 200:
        return Fault(f"HTTP {status}", server_message(body))
    if expected_label is None:
        return None
    try:
        label = json.loads(body)["label"]
    except (ValueError, KeyError, TypeError):
        return Fault(UNREADABLE_ANSWER, f"no label in: {_excerpt(body)}")
    if str(label) != expected_label:
        return Fault(WRONG_ANSWER, f"label {label!r} instead of {expected_label!r}")
    return None


def judge_failure(error: BaseException | None) -> Fault:
    """Names the failure of a request that got no whole answer."""
    error = getattr(error, "original", error)  # geventhttpclient wraps time-outs in its RetriesExceeded
    detail = f"{type(error).__name__}: {error}"
    if isinstance(error, TimeoutError):
        return Fault(TIMED_OUT, detail)
    if isinstance(error, ConnectionRefusedError):
        return Fault(CONNECTION_REFUSED, detail)
    return Fault(CONNECTION_LOST, detail)


def server_message(body: bytes) -> str:
    """The message in an error answer: torchport's form, else TorchServe's own, else the start of the body."""
    try:
        document = json.loads(body)
    except ValueError:
        return _excerpt(body)
    error = document.get("error", document) if isinstance(document, dict) else None
    message = error.get("message") if isinstance(error, dict) else None
    return str(message) if message else _excerpt(body)


def _excerpt(body: bytes) -> str:
    text = " ".join(body.decode("utf-8", errors="replace").split())
    if not text:
        return "(empty answer)"
    return text if len(text) <= EXCERPT_CHARS else text[:EXCERPT_CHARS] + "…"
