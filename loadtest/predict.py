"""Turns what the user typed into requests, and sends them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loadtest.client import Client
from loadtest.errors import PayloadError
from loadtest.payloads import Payload, read_files

TEXT = "text/plain; charset=utf-8"
JSON = "application/json"


def read_input(given: str, *, content_type: str | None = None) -> Payload:
    """Makes a payload of one input: an existing file, JSON, or text.

    Args:
        given: A path, a JSON object or array, or text.
        content_type: Overrides the guess, and sends what is no file as it is.

    Raises:
        PayloadError: It looks like a file that does not exist, or like JSON that is malformed.
    """
    path = Path(given)
    if _is_file(path):
        return read_files([path], content_type=content_type)[0]
    if content_type is not None:
        return Payload(body=given.encode(), content_type=content_type)
    if given.lstrip().startswith(("{", "[")):
        try:
            json.loads(given)
        except ValueError as error:
            raise PayloadError(
                f"the input {given!r} is malformed JSON ({error}): correct it, or give a file"
            ) from error
        return Payload(body=given.encode(), content_type=JSON)
    if len(given.split()) == 1 and (path.suffix or len(path.parts) > 1):
        raise PayloadError(
            f"there is no file {given}: give an existing one, or --content-type text/plain to send it as text"
        )
    return Payload(body=given.encode(), content_type=TEXT)


def predict_all(client: Client, model: str, payloads: Sequence[Payload]) -> list[Any]:
    """Sends the payloads in turn and returns their answers in the same order."""
    return [client.predict(model, payload) for payload in payloads]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # too long, or with a null byte: no path
        return False
