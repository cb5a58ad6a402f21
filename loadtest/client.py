"""A small HTTP client for a running model."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx

from loadtest.answers import server_message
from loadtest.errors import PlanError, RefusedError, UnreachableError
from loadtest.payloads import Payload
from loadtest.plan import check_url, prediction_path

DEFAULT_URL = "http://127.0.0.1:8080"
DEFAULT_TIMEOUT_S = 60.0


class Client:
    """Sends predictions to one server.

    Args:
        url: Where the server answers predictions.
        token: Bearer token, or None for a server that asks for none.
        timeout_s: Longest wait for any one step of a request.

    Raises:
        PlanError: The URL is none, or the token can be none.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S) -> None:
        check_url(url)
        if token is not None and not _fits_header(token):
            raise PlanError("--token (or TORCHPORT_TOKEN) can be no token: give one word of printable ASCII")
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        # trust_env is off: a proxy in the environment would stand between us and what we ask about, and the
        # load generator does not use it either.
        self._http = httpx.Client(base_url=self._url, headers=headers, timeout=timeout_s, trust_env=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._http.close()

    def predict(self, model: str, payload: Payload) -> Any:
        """Sends one request and returns the parsed answer.

        Raises:
            PlanError: The content type can be none.
            UnreachableError: No answer came.
            RefusedError: The answer is an error, or no JSON.
        """
        if not _fits_header(payload.content_type):
            raise PlanError(f"the content type {payload.content_type!r} can be none: give one like image/png")
        response = self._post(prediction_path(model), payload.body, {"Content-Type": payload.content_type})
        if not response.is_success:
            raise RefusedError(self._refusal(model, response), status=response.status_code)
        try:
            return response.json()
        except ValueError as error:
            raise RefusedError(
                f"{model} at {self._url} answered, but not with JSON: {server_message(response.content)}",
                status=response.status_code,
            ) from error

    def _post(self, path: str, body: bytes, headers: Mapping[str, str]) -> httpx.Response:
        try:
            return self._http.post(path, content=body, headers=headers)
        except httpx.ConnectError as error:
            port = urlsplit(self._url).port or 80
            raise UnreachableError(
                f"nothing is listening at {self._url} ({error}); "
                f"start it with `torchport serve ARCHIVE --port {port}`, or name another server with --url"
            ) from error
        except httpx.TimeoutException as error:
            raise UnreachableError(
                f"{self._url} gave no answer within {self._timeout_s:g} s; is the model overloaded?"
            ) from error
        except httpx.HTTPError as error:
            raise UnreachableError(f"the connection to {self._url} broke: {error}; see the server's log") from error

    def _refusal(self, model: str, response: httpx.Response) -> str:
        """One sentence for an error answer, with the remedy for the two errors that are about the request's address."""
        message = server_message(response.content).rstrip(".")
        remedy = ""
        if response.status_code == 404:
            remedy = f"; is {model!r} the name it is served under?"
        elif response.status_code in (401, 403) or "token" in message.lower():
            remedy = "; give a valid token with --token or TORCHPORT_TOKEN"
        return f"{model} at {self._url} answered {response.status_code}: {message}{remedy}"


def _fits_header(value: str) -> bool:
    return bool(value) and value.isascii() and value.isprintable() and value == value.strip()
