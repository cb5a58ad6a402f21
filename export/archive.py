"""Archives: packing with ``torch-model-archiver``, the canonical form, and reading back.

The canonical form of a ``.mar`` is a zip with sorted, uncompressed entries and fixed dates and modes. The same files
give the same bytes on every machine, and a reader can rebuild the bytes and so notice any change, even in the parts
of a zip that no digest of a file covers.
"""

from __future__ import annotations

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import handlers
from export.atomic import replacing
from export.errors import ArchiveError
from handlers.digests import DIGESTS_FILE, compare_digests, digests_document, file_sha256, parse_digests, sha256
from handlers.document import shown
from handlers.errors import DigestError

SUFFIX = ".mar"
MANIFEST_FILE = "MAR-INF/MANIFEST.json"
CONFIG_FILE = "model-config.yaml"
ENTRY_FILE = "entry.py"

# The first moment that a zip can hold, and the default of SOURCE_DATE_EPOCH here.
_EPOCH = (1980, 1, 1, 0, 0, 0)
_MODE = 0o100644
_UNIX = 3
_CHUNK_BYTES = 1 << 20
# What torch-model-archiver accepts, and what stays one word in a URL, a shell and a metric label.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchiveFiles:
    """What goes into an archive beside the handlers.

    Attributes:
        artifact: The artifact file.
        documents: Other files: bytes by path within the archive.
        config: Bytes of ``model-config.yaml``.
    """

    artifact: Path
    documents: Mapping[str, bytes]
    config: bytes


def check_name(name: str, what: str) -> str:
    """Refuse names and versions that do not fit into a file name and a URL.

    Raises:
        ArchiveError: If ``name`` does not fit.
    """
    if not _NAME.fullmatch(name):
        raise ArchiveError(
            f"the {what} {shown(name)} is not usable: write letters, digits, '-', '_' and '.', "
            "beginning with a letter or digit"
        )
    return name


def write_archive(files: ArchiveFiles, *, name: str, version: str, out: Path) -> Path:
    """Pack an archive and put it, whole or not at all, into a model store.

    Args:
        files: Its content.
        name: Model name; the file is ``NAME.mar``.
        version: Model version.
        out: The model store; it is made if need be.

    Returns:
        The archive's path.

    Raises:
        ArchiveError: If it cannot be packed or written.
    """
    destination = out / f"{check_name(name, 'model name')}{SUFFIX}"
    check_name(version, "model version")
    try:
        with tempfile.TemporaryDirectory(prefix="torchport-pack-") as staging:
            packed = _run_archiver(files, name=name, version=version, staging=Path(staging))
            out.mkdir(parents=True, exist_ok=True)
            with replacing(destination) as file:
                write_canonical(packed, file)
    except OSError as error:
        raise ArchiveError(f"{destination} cannot be written: {error.strerror or error}") from error
    return destination


def check_store(out: Path) -> None:
    """Refuse a model store that nothing can be written to, before the slow steps.

    Raises:
        ArchiveError: If it, or the folder that it would be made in, is a file or read-only.
    """
    nearest = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not nearest.is_dir():
        raise ArchiveError(f"the model store {out} cannot be made, for {nearest} is a file; choose another --out")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ArchiveError(f"the model store {out} cannot be written; choose another --out")


def created_on() -> str:
    """The manifest's date, in its own format, from SOURCE_DATE_EPOCH (seconds since 1970, UTC).

    Raises:
        ArchiveError: If the variable is set to something else.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH")
    try:
        moment = (
            datetime.datetime(*_EPOCH, tzinfo=datetime.UTC)
            if not text
            else datetime.datetime.fromtimestamp(int(text), tz=datetime.UTC)
        )
    except (ValueError, OverflowError, OSError) as error:
        raise ArchiveError(f"SOURCE_DATE_EPOCH is {shown(text)}; it must be a number of seconds since 1970") from error
    return moment.strftime("%d/%m/%Y %H:%M:%S")


def _run_archiver(files: ArchiveFiles, *, name: str, version: str, staging: Path) -> Path:
    """Stage everything in a folder of its own and call torch-model-archiver there.

    The archiver stages in the system's temporary folder under the model's name and deletes what was there, so two at
    once destroy each other: give it a temporary folder that nobody else has.
    """
    extra = staging / "extra"
    scratch = staging / "tmp"
    scratch.mkdir()
    package = Path(handlers.__file__).parent
    for module in sorted(package.glob("*.py")):
        if module.name != ENTRY_FILE:
            _put(extra / package.name / module.name, module.read_bytes())
    for path, content in files.documents.items():
        _put(extra / path, content)
    config = staging / CONFIG_FILE
    config.write_bytes(files.config)
    command = [
        *(sys.executable, "-m", "model_archiver.model_packaging", "--force"),
        *("--model-name", name, "--version", version),
        *("--serialized-file", str(files.artifact), "--handler", str(package / ENTRY_FILE)),
        *("--extra-files", str(extra), "--config-file", str(config), "--export-path", str(staging)),
    ]
    done = subprocess.run(
        command, env={**os.environ, "TMPDIR": str(scratch)}, cwd=staging, capture_output=True, text=True, check=False
    )
    packed = staging / f"{name}{SUFFIX}"
    if done.returncode != 0 or not packed.is_file():
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise ArchiveError(f"torch-model-archiver failed: {reason[0]}")
    return packed


def _put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_canonical(packed: Path, destination: IO[bytes]) -> None:
    """Copy an archive into canonical form, with its manifest dated and its digests recorded.

    Args:
        packed: What ``torch-model-archiver`` wrote.
        destination: An empty file, open for writing.
    """
    with zipfile.ZipFile(packed) as source, zipfile.ZipFile(destination, "w", zipfile.ZIP_STORED) as target:
        manifest = json.loads(source.read(MANIFEST_FILE))
        manifest["createdOn"] = created_on()
        manifest_bytes = (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode()
        names = sorted(name for name in source.namelist() if not name.endswith("/"))
        digests = {name: sha256([manifest_bytes] if name == MANIFEST_FILE else _chunks(source, name)) for name in names}
        for name in sorted([*names, DIGESTS_FILE]):
            if name == MANIFEST_FILE:
                _add(target, name, [manifest_bytes], len(manifest_bytes))
            elif name == DIGESTS_FILE:
                document = digests_document(digests)
                _add(target, name, [document], len(document))
            else:
                _add(target, name, _chunks(source, name), source.getinfo(name).file_size)


def _add(target: zipfile.ZipFile, name: str, chunks: Iterator[bytes] | list[bytes], size: int) -> None:
    info = zipfile.ZipInfo(name, date_time=_EPOCH)
    info.external_attr = _MODE << 16
    info.create_system = _UNIX
    info.file_size = size  # zipfile chooses zip64 by it
    with target.open(info, "w") as entry:
        for chunk in chunks:
            entry.write(chunk)


def _chunks(source: zipfile.ZipFile, name: str) -> Iterator[bytes]:
    with source.open(name) as entry:
        while chunk := entry.read(_CHUNK_BYTES):
            yield chunk


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """A verified archive.

    Attributes:
        path: The ``.mar`` file.
        name: Model name.
        version: Model version.
        digests: SHA-256 by path within the archive.
    """

    path: Path
    name: str
    version: str
    digests: dict[str, str]

    def read(self, file: str) -> bytes:
        """The bytes of one of the files in ``digests``.

        Raises:
            KeyError: If it is none of them.
            ArchiveError: If another archive has taken its place since it was verified.
        """
        with zipfile.ZipFile(self.path) as source:
            content = source.read(file)
        if sha256([content]) != self.digests[file]:
            raise _replaced(self.path)
        return content

    def read_json(self, file: str) -> Any:
        """One JSON document.

        Raises:
            KeyError: If the archive holds no such file.
            ValueError: If it is not JSON; NaN and Infinity are not.
            ArchiveError: As :meth:`read`.
        """
        return json.loads(self.read(file), parse_constant=_refuse_constant)

    def extract(self, folder: Path) -> None:
        """Unpack everything into a folder.

        Raises:
            ArchiveError: If another archive has taken its place since it was verified.
        """
        with zipfile.ZipFile(self.path) as source:
            source.extractall(folder)
            actual = {name: file_sha256(folder / name) for name in source.namelist() if name != DIGESTS_FILE}
        if actual != self.digests:
            raise _replaced(self.path)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def open_archive(path: Path) -> Archive:
    """Open an archive and verify it: its structure, and every file against its digest.

    Raises:
        ArchiveError: If it is missing, not an archive of torchport, or differs from what its export wrote by as much
            as one byte.
    """
    if not path.is_file():
        raise ArchiveError(f"there is no archive at {path}; `torchport export` writes one")
    try:
        # Opened once: another export may put another archive in its place at any moment.
        with path.open("rb") as file, zipfile.ZipFile(file) as source:
            names = source.namelist()
            _check_names(names, path)
            _check_sizes(source, os.fstat(file.fileno()).st_size, path)
            if DIGESTS_FILE not in names or MANIFEST_FILE not in names:
                raise ArchiveError(f"{path} is not an archive that torchport wrote: it has no {DIGESTS_FILE}")
            expected = parse_digests(source.read(DIGESTS_FILE))
            actual = {name: sha256(_chunks(source, name)) for name in names if name != DIGESTS_FILE}
            compare_digests(expected, actual)
            _check_canonical(source, file, path)
            model = json.loads(source.read(MANIFEST_FILE))["model"]
            # They become file names, URLs and lines of TorchServe's configuration.
            check_name(model["modelName"], "model name")
            check_name(model["modelVersion"], "model version")
    except DigestError as error:
        raise ArchiveError(f"{path}: {error}") from error
    except ArchiveError:
        raise
    except OSError as error:
        raise ArchiveError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # zipfile raises a dozen unrelated types on damaged files
        raise ArchiveError(f"{path} is damaged or not an archive; export it again or fetch a clean copy") from error
    return Archive(path=path, name=model["modelName"], version=model["modelVersion"], digests=expected)


def _check_names(names: list[str], path: Path) -> None:
    for name in names:
        plain = PurePosixPath(name).as_posix() == name and name != "."
        if not plain or name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
            raise ArchiveError(
                f"{path} holds the path {name!r}, which is not that of a file inside its folder; do not use it"
            )
    if len(set(names)) != len(names):
        raise ArchiveError(f"{path} holds the same path twice; do not use it")


def _check_sizes(source: zipfile.ZipFile, size: int, path: Path) -> None:
    """Refuse what unpacks to more than it is, before a byte of it is unpacked."""
    entries = source.infolist()
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > size:
        raise _changed(path)


def _changed(path: Path) -> ArchiveError:
    return ArchiveError(f"{path} was changed after its export; export it again or fetch a clean copy")


def _replaced(path: Path) -> ArchiveError:
    return ArchiveError(f"another archive took the place of {path} while it was read; try again")


def _check_canonical(source: zipfile.ZipFile, file: IO[bytes], path: Path) -> None:
    """Compare the file with the only bytes that its content can have.

    Digests cover what is inside the entries; this covers all the rest: dates, flags, order, comments, gaps.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="torchport-verify-") as folder:
            rebuilt = Path(folder) / path.name
            with zipfile.ZipFile(rebuilt, "w", zipfile.ZIP_STORED) as target:
                for name in sorted(source.namelist()):
                    _add(target, name, _chunks(source, name), source.getinfo(name).file_size)
            digest = file_sha256(rebuilt)
    except OSError as error:
        raise ArchiveError(
            f"{path} cannot be verified, for which it is rebuilt in {tempfile.gettempdir()}: "
            f"{error.strerror or error}; name another folder with TMPDIR"
        ) from error
    file.seek(0)
    if sha256(iter(lambda: file.read(_CHUNK_BYTES), b"")) != digest:
        raise _changed(path)
