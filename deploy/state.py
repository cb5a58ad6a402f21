"""Where a running server keeps what its clients need: one folder a port, in the user's state folder.

It is TorchServe's working folder too, because TorchServe writes its tokens (``key_file.json``) there.
"""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
import platformdirs
import psutil

from deploy.errors import StateError

KEY_FILE = "key_file.json"
SERVER_FILE = "server.json"
STATE_VARIABLE = "TORCHPORT_STATE_DIR"

_TOKEN_TIMEOUT_S = 10.0
_EXPIRY_FORMAT_LENGTH = len("2026-01-01T00:00:00")


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerState:
    """A server that ``torchport serve`` started.

    Attributes:
        folder: Its state folder.
        pid: Process id of ``torchport serve``.
        inference_url: Where predictions are asked for.
        management_url: Where models are listed.
        metrics_url: Where Prometheus reads.
        models: Version by model name.
    """

    folder: Path
    pid: int
    inference_url: str
    management_url: str
    metrics_url: str
    models: dict[str, str]

    def write(self) -> None:
        """Put the state where :func:`find_server` looks."""
        document = {**asdict(self), "folder": str(self.folder)}
        # Only the process that holds the port writes here; a reader that comes too early finds no complete JSON.
        (self.folder / SERVER_FILE).write_text(json.dumps(document, indent=1), encoding="utf-8")

    def remove(self) -> None:
        """Forget the server and its tokens."""
        for name in (SERVER_FILE, KEY_FILE):
            (self.folder / name).unlink(missing_ok=True)

    def inference_token(self) -> str:
        """A token for predictions, renewed when it has expired.

        Raises:
            StateError: If the key file is unreadable, or the server gives no new token.
        """
        entry = self._keys()["inference"]
        if _is_valid(entry):
            return str(entry["key"])
        return self._renew("inference")

    def management_token(self) -> str:
        """A token for listing models, renewed when it has expired.

        Raises:
            StateError: If the key file is unreadable, or the server gives no new token.
        """
        entry = self._keys()["management"]
        if _is_valid(entry):
            return str(entry["key"])
        return self._renew("management")

    def _keys(self) -> dict[str, dict[str, Any]]:
        path = self.folder / KEY_FILE
        try:
            keys: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
            for kind in ("inference", "management", "API"):
                str(keys[kind]["key"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StateError(
                f"the tokens in {path} cannot be read ({error}); give --token, or restart the server"
            ) from error
        return keys

    def _renew(self, kind: str) -> str:
        """Ask the management API for a new token; TorchServe writes it into the key file too."""
        api_key = self._keys()["API"]["key"]
        try:
            response = httpx.get(
                f"{self.management_url}/token",
                params={"type": kind},
                headers={"Authorization": f"Bearer {api_key}"},
                timeout=_TOKEN_TIMEOUT_S,
            )
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise StateError(f"the server at {self.management_url} gives no new {kind} token: {error}") from error
        return str(self._keys()[kind]["key"])


def state_folder(port: int) -> Path:
    """The state folder of the server on a port, made if need be, for its owner alone."""
    root = os.environ.get(STATE_VARIABLE)
    folder = (Path(root) if root else platformdirs.user_state_path("torchport")) / f"serve-{port}"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


def find_server(port: int) -> ServerState:
    """Find the server that this user runs on a port.

    Raises:
        StateError: If there is none.
    """
    folder = state_folder(port)
    try:
        document = json.loads((folder / SERVER_FILE).read_text(encoding="utf-8"))
        state = ServerState(**{**document, "folder": Path(document["folder"])})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise StateError(
            f"torchport serves nothing on port {port}; start it with `torchport serve`, "
            "or give --url and --token for a server started otherwise"
        ) from error
    if not psutil.pid_exists(state.pid):
        raise StateError(f"the server on port {port} is gone; start it again with `torchport serve`")
    return state


def _is_valid(entry: dict[str, Any]) -> bool:
    """Whether a key file's entry has not expired; TorchServe writes UTC with nanoseconds and a Z."""
    try:
        moment = datetime.datetime.fromisoformat(str(entry.get("expiration time"))[:_EXPIRY_FORMAT_LENGTH])
    except ValueError:
        return False
    return moment.replace(tzinfo=datetime.UTC) > datetime.datetime.now(datetime.UTC)
