"""What one asks inside a serving container: whether it is ready, and for a token; and what it asks of its archives.

    python3 /opt/torchport/container.py ready    exit code 0 when all workers of all archives are READY
    python3 /opt/torchport/container.py token    prints a token for predictions, a new one when the last has expired
    python3 /opt/torchport/container.py check ARCHIVE...
                                                 exit code 0 when every archive is whole and no two are the same model
    python3 /opt/torchport/container.py install  puts torchport's classes where TorchServe's Java looks first
    python3 /opt/torchport/container.py continuous FOLDER ARCHIVE...
                                                 writes copies of checked archives for continuous serving

The image has neither torchport nor curl, so this file stands alone; only the last needs more than the standard library,
which is PyYAML, as TorchServe does. The first two and the fourth run in TorchServe's working folder, where the tokens
and the effective configuration are.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import shutil
import struct
import sys
import urllib.request
import zipfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

_USAGE = "usage: container.py ready | token | check ARCHIVE... | install | continuous FOLDER ARCHIVE..."
_KEY_FILE = Path("key_file.json")
_CONFIG_FILE = Path("config.properties")
_TIMEOUT_S = 3.0
_SECONDS_LENGTH = len("2026-01-01T00:00:00")
_MOST_MODELS = 10_000

_MANIFEST_FILE = "MAR-INF/MANIFEST.json"
_DIGESTS_FILE = "digests.json"
_SETTINGS_FILE = "model-config.yaml"
_WORKER_LOOP = "handlers/continuous.py"
_OTHER_WAYS = ("useJobTicket", "continuousBatching", "sequenceBatching")
_CLASSES = Path(__file__).parent / "classes"
# As in torchport's deploy/continuous.py.
_IN_FLIGHT = 256
_LEAST_OF_A_WORKER = 64
_CHUNK_BYTES = 1 << 20
# A zip entry's own header, up to its sizes: flags, method, (date,) CRC, packed and unpacked size.
_ENTRY_HEADER = struct.Struct("<6xHH4xIII")
_SIZES_FOLLOW = 0x08  # the flag of an entry whose CRC and sizes come after its data
_ZIP64_SIZE = 0xFFFFFFFF

# Never through a proxy that the environment names: the server is in this container.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class NotReadyError(Exception):
    """The server cannot answer predictions yet, or no longer; the message says what it lacks."""


class ArchiveFaultError(Exception):
    """An archive cannot be served; the message says which, why, and what to do."""


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
            if worker["status"] != "READY":  # TorchServe calls it UNLOADING
                raise NotReadyError(f"{name}: worker {worker['id']} is still loading, or has failed")


def check_archives(paths: list[Path]) -> None:
    """Read archives from end to end: TorchServe meets a damaged one with a stack trace and stays up without it.

    Args:
        paths: The archives. Those without torchport's digests have only the checksums of their zip.

    Raises:
        ArchiveFaultError: If one is damaged, or two hold the same version of the same model.
    """
    served: dict[tuple[str, str], Path] = {}
    for path in paths:
        try:
            model = _read_archive(path)
        except Exception as error:  # there is no end to what damage makes zipfile raise
            reason = error.args[0] if isinstance(error, KeyError) else error
            raise ArchiveFaultError(
                f"{path} is damaged or no archive ({reason}); export it again or fetch a clean copy"
            ) from error
        if model in served:
            raise ArchiveFaultError(
                f"{served[model].name} and {path.name} both hold {' '.join(model)}; name the archives to serve, "
                "or export one of them with another name or version"
            )
        served[model] = path


def install_classes(folder: Path) -> None:
    """Put torchport's classes of the frontend into a folder that is first on Java's class path.

    Args:
        folder: TorchServe's working folder.
    """
    for place in _CLASSES.iterdir():
        shutil.rmtree(folder / place.name, ignore_errors=True)  # what an earlier start left
        shutil.copytree(place, folder / place.name)


def copy_for_continuous(paths: list[Path], folder: Path) -> None:
    """Copy checked archives; those that can be served continuously get the settings for it, and their digest.

    Args:
        paths: The archives.
        folder: Where the copies go, under the same names.
    """
    for path in paths:
        with zipfile.ZipFile(path) as source:
            obstacle = _obstacle(source)
            if obstacle is None:
                _copy(source, folder / path.name, _continuous_settings(source))
                continue
        print(f"torchport: {path.name} is served in batches: {obstacle}", file=sys.stderr)
        shutil.copyfile(path, folder / path.name)


def _copy(source: zipfile.ZipFile, path: Path, replaced: dict[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w") as target:
        for entry in source.infolist():
            if entry.filename in replaced:
                target.writestr(entry.filename, replaced[entry.filename])
                continue
            copied = zipfile.ZipInfo(entry.filename, entry.date_time)
            copied.file_size = entry.file_size  # which chooses the width of the copy's own fields
            with source.open(entry) as content, target.open(copied, "w") as written:
                shutil.copyfileobj(content, written, _CHUNK_BYTES)


def main(arguments: list[str]) -> int:
    """Answer one question; the exit code is 0 when the answer is good."""
    match arguments:
        case ["check", _, *_]:
            return _about_archives(lambda: check_archives([Path(argument) for argument in arguments[1:]]))
        case ["install"]:
            return _about_archives(lambda: install_classes(Path.cwd()))
        case ["continuous", folder, _, *_]:
            return _about_archives(lambda: copy_for_continuous([Path(path) for path in arguments[2:]], Path(folder)))
        case ["ready"] | ["token"]:
            return _about_server(arguments[0])
    print(_USAGE, file=sys.stderr)
    return 2


def _about_archives(act: Callable[[], object]) -> int:
    try:
        act()
    except (ArchiveFaultError, OSError) as error:
        print(f"torchport: {error}", file=sys.stderr)
        return 2
    return 0


def _about_server(question: str) -> int:
    try:
        config = _read_config()
        management = Management(config["management_address"])
        if question == "token":
            print(management.token("inference"))
        else:
            check_ready(config["load_models"].split(","), management.models())
            print("ready")
    except NotReadyError as error:
        print(f"not ready: {error}", file=sys.stderr)
        return 1
    return 0


def _obstacle(source: zipfile.ZipFile) -> str | None:
    """Why an archive cannot be served continuously; None where it can."""
    if not {_WORKER_LOOP, _SETTINGS_FILE, _DIGESTS_FILE} <= set(source.namelist()):
        return "it has no continuous worker; export it again"
    config = _read_settings(source)
    other = next((way for way in _OTHER_WAYS if config.get(way) is True), None)
    return None if other is None else f"its {_SETTINGS_FILE} sets {other}"


def _read_settings(source: zipfile.ZipFile) -> dict[str, Any]:
    import yaml  # noqa: PLC0415  # the health check would load it every ten seconds

    return dict(yaml.safe_load(source.read(_SETTINGS_FILE)) or {})


def _continuous_settings(source: zipfile.ZipFile) -> dict[str, bytes]:
    """The files that differ in a copy for continuous serving: the settings, and the digests with theirs."""
    import yaml  # noqa: PLC0415  # of use here alone

    config = _read_settings(source)
    section = dict(config.get("torchport") or {})
    section.setdefault("max_batch", config.get("batchSize") or 0)
    in_flight = max(_LEAST_OF_A_WORKER, _IN_FLIGHT // (config.get("maxWorkers") or 1))
    config |= {"asyncCommunication": True, "batchSize": in_flight, "torchport": section}
    settings = yaml.safe_dump(config, sort_keys=False).encode()
    document = json.loads(source.read(_DIGESTS_FILE))
    document["sha256"][_SETTINGS_FILE] = hashlib.sha256(settings).hexdigest()
    return {_SETTINGS_FILE: settings, _DIGESTS_FILE: json.dumps(document).encode()}


def _read_archive(path: Path) -> tuple[str, str]:
    """Read all of an archive; give its model's name and version."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        digests = {}
        for entry in archive.infolist():
            _check_header(file, entry)
            digest = hashlib.sha256()
            with archive.open(entry) as content:  # its end compares the checksum
                while chunk := content.read(_CHUNK_BYTES):
                    digest.update(chunk)
            if not entry.is_dir():
                digests[entry.filename] = digest.hexdigest()
        model = json.loads(archive.read(_MANIFEST_FILE))["model"]
        if digests.pop(_DIGESTS_FILE, None):
            document = json.loads(archive.read(_DIGESTS_FILE))
            recorded = document["sha256"]
            named = document.get("manifest")
            if named is not None:  # packed by hand: the manifest came after the digests; workers look at all of it
                digests.pop(_MANIFEST_FILE)
                if any(model.get(field) != file for field, file in named.items()):
                    raise ValueError(f"{_MANIFEST_FILE} names other files than {_DIGESTS_FILE}")
            for name in sorted(digests.keys() | recorded.keys()):
                if digests.get(name) != recorded.get(name):
                    raise ValueError(f"{name} differs from its digest")
        return str(model["modelName"]), str(model["modelVersion"])


def _check_header(file: BinaryIO, entry: zipfile.ZipInfo) -> None:
    """Compare an entry's own header, which Java reads, with the directory at the end, which Python reads."""
    file.seek(entry.header_offset)
    flags, method, checksum, *sizes = _ENTRY_HEADER.unpack(file.read(_ENTRY_HEADER.size))
    same = flags == entry.flag_bits and method == entry.compress_type
    if not flags & _SIZES_FOLLOW:
        same = same and checksum == entry.CRC
        for size, listed in zip(sizes, (entry.compress_size, entry.file_size), strict=True):
            same = same and size in (listed, _ZIP64_SIZE)
    if not same:
        raise ValueError(f"the header of {entry.filename} is damaged")


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
