"""What one asks inside a serving container: whether it is ready, and for a token.

    python3 /opt/torchport/container.py ready    exit code 0 when all workers of all archives are READY
    python3 /opt/torchport/container.py token    prints a token for predictions, a new one when the last has expired

The image has neither torchport nor curl, so this file stands alone and needs the standard library only. It runs in
TorchServe's working folder, where the tokens and the effective configuration are.
"""

from __future__ import annotations

import http.client
import json
import sys
import urllib.request
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_KEY_FILE = Path("key_file.json")
_CONFIG_FILE = Path("config.properties")
_TIMEOUT_S = 3.0
_SECONDS_LENGTH = len("2026-01-01T00:00:00")
_MOST_MODELS = 10_000

# Never through a proxy that the environment names: the server is in this container.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class NotReadyError(Exception):
    """The server cannot answer predictions yet, or no longer; the message says what it lacks."""


class Management:
    """TorchServe's management API.

    Args:
        address: Its URL.
    """

    def __init__(self, address: str) -> None:
        self._address = address

    def models(self) -> list[dict[str, Any]]:
        """Every version of every model that is registered, with its workers.

        Raises:
            NotReadyError: If the API does not answer.
        """
        token = self.token("management")
        names = [entry["modelName"] for entry in self._get_json(f"/models?limit={_MOST_MODELS}", token)["models"]]
        return [version for name in names for version in self._get_json(f"/models/{name}/all", token)]

    def token(self, kind: str) -> str:
        """The token of a kind, ``inference`` or ``management``, renewed when it has expired.

        Raises:
            NotReadyError: If there are no tokens yet, or none is given.
        """
        keys = _read_keys()
        if _has_expired(keys[kind]):
            self._get(f"/token?type={kind}", keys["API"]["key"])
            keys = _read_keys()  # the answer does not hold the new token; TorchServe writes it there
        return str(keys[kind]["key"])

    def _get_json(self, path: str, token: str) -> Any:
        try:
            return json.loads(self._get(path, token))
        except ValueError as error:
            raise NotReadyError(f"{self._address}{path} did not answer with JSON: {error}") from error

    def _get(self, path: str, token: str) -> bytes:
        request = urllib.request.Request(self._address + path, headers={"Authorization": f"Bearer {token}"})
        try:
            with _opener.open(request, timeout=_TIMEOUT_S) as response:
                body: bytes = response.read()
        except (OSError, http.client.HTTPException) as error:  # a urllib.error.HTTPError is an OSError
            raise NotReadyError(f"{self._address}{path}: {error}") from error
        return body


def check_ready(archives: list[str], versions: list[dict[str, Any]]) -> None:
    """Compare what should be served with what is.

    Args:
        archives: The archives that the server was started on.
        versions: What the management API says of each registered version.

    Raises:
        NotReadyError: If an archive is not registered, or a worker is missing or not READY.
    """
    if len(versions) < len(archives):
        raise NotReadyError(f"{len(versions)} of {len(archives)} archives are registered; the log says what is wrong")
    for version in versions:
        name = f"{version['modelName']} {version['modelVersion']}"
        workers = version["workers"]
        if len(workers) < max(1, version["minWorkers"]):
            raise NotReadyError(f"{name} has {len(workers)} of {version['minWorkers']} workers")
        for worker in workers:
            if worker["status"] != "READY":
                raise NotReadyError(f"{name}: worker {worker['id']} is {worker['status']}")


def main(arguments: list[str]) -> int:
    """Answer one question; the exit code is 0 when the answer is good."""
    if arguments not in (["ready"], ["token"]):
        print("usage: container.py ready | token", file=sys.stderr)
        return 2
    try:
        config = _read_config()
        management = Management(config["management_address"])
        if arguments == ["token"]:
            print(management.token("inference"))
        else:
            check_ready(config["load_models"].split(","), management.models())
            print("ready")
    except NotReadyError as error:
        print(f"not ready: {error}", file=sys.stderr)
        return 1
    return 0


def _read_config() -> dict[str, str]:
    """The effective configuration; of a key that comes twice the last counts, as for TorchServe."""
    try:
        lines = _CONFIG_FILE.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise NotReadyError(f"TorchServe has not been started in {Path.cwd()} ({error})") from error
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def _read_keys() -> dict[str, dict[str, str]]:
    try:
        keys: dict[str, dict[str, str]] = json.loads(_KEY_FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise NotReadyError(f"TorchServe has not written its tokens yet ({error})") from error
    return keys


def _has_expired(entry: dict[str, str]) -> bool:
    """Whether a key file's entry has expired; TorchServe writes UTC with nanoseconds and a Z."""
    moment = datetime.fromisoformat(entry["expiration time"][:_SECONDS_LENGTH])
    return moment.replace(tzinfo=UTC) <= datetime.now(UTC)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
