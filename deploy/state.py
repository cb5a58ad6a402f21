"""Where a running server keeps what its clients need: one folder a port, in the user's state folder.

It is TorchServe's working folder too, because TorchServe writes its tokens (``key_file.json``) there.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import platformdirs

from deploy.errors import StateError

KEY_FILE = "key_file.json"
SERVER_FILE = "server.json"
LOCK_FILE = "lock"
STATE_VARIABLE = "TORCHPORT_STATE_DIR"

_TOKEN_TIMEOUT_S = 10.0
# A client that looks whether the server runs holds the lock for a moment.
_CLAIM_TIMEOUT_S = 1.0
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
        # Only the process that has claimed the folder writes here; who reads too early finds no complete JSON.
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
        return self._token("inference")

    def management_token(self) -> str:
        """A token for listing models, renewed when it has expired; raises as :meth:`inference_token` does."""
        return self._token("management")

    def _token(self, kind: str) -> str:
        entry = self._keys()[kind]
        return str(entry["key"]) if _is_valid(entry) else self._renew(kind)

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
                trust_env=False,  # a proxy in the environment would stand between us and this machine
            )
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise StateError(f"the server at {self.management_url} gives no new {kind} token: {error}") from error
        return str(self._keys()[kind]["key"])


def state_folder(port: int) -> Path:
    """Where the state folder of the server on a port is, or would be."""
    root = os.environ.get(STATE_VARIABLE)
    return (Path(root).absolute() if root else platformdirs.user_state_path("torchport")) / f"serve-{port}"


def make_private(folder: Path) -> None:
    """Make a state folder if need be, for its owner alone: tokens lie in it.

    Raises:
        StateError: If it cannot be made, or belongs to somebody else.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = folder.stat()
        if found.st_uid != os.geteuid():
            raise StateError(
                f"the state folder {folder} belongs to another user; name one of your own with {STATE_VARIABLE}"
            )
        if found.st_mode & 0o077:
            folder.chmod(0o700)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise StateError(
            f"the state folder {folder} cannot be used ({error.strerror}); name another with {STATE_VARIABLE}"
        ) from error


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Be the only server that uses a state folder, for as long as the block lasts.

    A lock and not a process id: the system lets go of it whatever ends the process, and gives ids out again.

    Raises:
        StateError: If another server has the folder, or it cannot be locked.
    """
    deadline = time.monotonic() + _CLAIM_TIMEOUT_S
    with _open_lock(folder, "a") as lock:
        while not _try_lock(lock, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise StateError(
                    f"another `torchport serve` is using {folder}; stop it, or choose another port with --port"
                )
            time.sleep(0.05)
        yield


def _is_claimed(folder: Path) -> bool:
    try:
        with _open_lock(folder, "r") as lock:
            return not _try_lock(lock, fcntl.LOCK_SH)
    except StateError:
        return False


def _open_lock(folder: Path, mode: str) -> IO[str]:
    try:
        return (folder / LOCK_FILE).open(mode, encoding="utf-8")
    except OSError as error:
        raise StateError(f"the state folder {folder} cannot be used ({error.strerror})") from error


def _try_lock(lock: IO[str], kind: int) -> bool:
    """Take a lock that is free; it is held until the file is closed."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StateError(
            f"{lock.name} cannot be locked ({error.strerror}); name a folder on a local disk with {STATE_VARIABLE}"
        ) from error
    return True


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
    if not _is_claimed(folder):
        raise StateError(f"the server on port {port} is gone; start it again with `torchport serve`")
    return state


def _is_valid(entry: dict[str, Any]) -> bool:
    """Whether a key file's entry has not expired; TorchServe writes UTC with nanoseconds and a Z."""
    try:
        moment = datetime.datetime.fromisoformat(str(entry.get("expiration time"))[:_EXPIRY_FORMAT_LENGTH])
    except ValueError:
        return False
    return moment.replace(tzinfo=datetime.UTC) > datetime.datetime.now(datetime.UTC)
