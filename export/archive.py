"""Archives: packing with ``torch-model-archiver``, and reading back what can be trusted."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

import handlers
from export.atomic import replacing
from export.errors import ArchiveError
from export.zip_form import (
    EPOCH,
    add_entry,
    check_canonical,
    check_expansion,
    check_names,
    check_packed_by_hand,
    entry_chunks,
)
from handlers.digests import DIGESTS_FILE, Digests, digests_document, file_sha256, parse_digests, sha256
from handlers.document import shown
from handlers.errors import DigestError
from handlers.manifest import MANIFEST_FILE, is_usable_name

SUFFIX = ".mar"
SIGNATURE_SUFFIX = ".sig"
CONFIG_FILE = "model-config.yaml"
ENTRY_FILE = "entry.py"
PROVENANCE_FILE = "provenance.json"
MODEL_CARD_FILE = "MODEL_CARD.md"
LICENCE_FILE = "LICENSE"

_CHUNK_BYTES = 1 << 20
# Far more than the documents of an archive have; read whole, so bounded.
_MOST_DOCUMENT_BYTES = 16 << 20

# Signs a finished archive: takes its path, gives the bytes of its signature.
Signer = Callable[[Path], bytes]


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
    if not is_usable_name(name):
        raise ArchiveError(
            f"the {what} {shown(name)} is not usable: write letters, digits, '-', '_' and '.', "
            "beginning with a letter or digit"
        )
    return name


def signature_path(archive: Path) -> Path:
    """Where the signature of an archive is: beside it."""
    return archive.with_name(archive.name + SIGNATURE_SUFFIX)


def write_archive(files: ArchiveFiles, *, name: str, version: str, out: Path, sign: Signer | None = None) -> Path:
    """Pack an archive and put it, whole or not at all, into a model store.

    The signature of an archive that was there before goes with it.

    Args:
        files: Its content.
        name: Model name; the file is ``NAME.mar``.
        version: Model version.
        out: The model store; it is made if need be.
        sign: Signs the archive; its signature is put beside it.

    Returns:
        The archive's path.

    Raises:
        ArchiveError: If it cannot be packed or written.
        SigningError: If it cannot be signed.
    """
    destination = out / f"{check_name(name, 'model name')}{SUFFIX}"
    check_name(version, "model version")
    try:
        with tempfile.TemporaryDirectory(prefix="torchport-pack-") as staging:
            packed = _run_archiver(files, name=name, version=version, staging=Path(staging))
            signature = None
            if sign is not None:
                packed = _signable(packed, Path(staging))
                signature = sign(packed)
            out.mkdir(parents=True, exist_ok=True)
            with replacing(destination, companion=(signature_path(destination), signature)) as file:
                if signature is None:
                    write_canonical(packed, file)
                else:
                    with packed.open("rb") as source:
                        shutil.copyfileobj(source, file, _CHUNK_BYTES)
    except OSError as error:
        raise ArchiveError(f"{destination} cannot be written: {error.strerror or error}") from error
    return destination


def _signable(packed: Path, staging: Path) -> Path:
    """The canonical form of an archive as a file of the right name, which signatures record."""
    path = staging / "canonical" / packed.name
    path.parent.mkdir()
    with path.open("wb") as file:
        write_canonical(packed, file)
    return path


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
            datetime.datetime(*EPOCH, tzinfo=datetime.UTC)
            if not text
            else datetime.datetime.fromtimestamp(int(text), tz=datetime.UTC)
        )
    except (ValueError, OverflowError, OSError) as error:
        raise ArchiveError(f"SOURCE_DATE_EPOCH is {shown(text)}; it must be a number of seconds since 1970") from error
    return moment.strftime("%d/%m/%Y %H:%M:%S")


def stage_extra_files(files: ArchiveFiles, folder: Path) -> None:
    """Put everything but the artifact, the entry file and the configuration into a folder: the handlers, and documents.

    Raises:
        ArchiveError: If the archiver would leave one of them out.
    """
    for module in sorted(handlers_folder().glob("*.py")):
        if module.name != ENTRY_FILE:
            _put(folder / handlers_folder().name / module.name, module.read_bytes())
    for path, content in files.documents.items():
        folders = PurePosixPath(path).parts[:-1]
        if any(part.startswith(".") or part in ("__pycache__", "__MACOSX") for part in folders):
            raise ArchiveError(f"torch-model-archiver leaves {path!r} out; give its folder another name")
        _put(folder / path, content)


def handlers_folder() -> Path:
    """Where the handlers' own source is."""
    return Path(handlers.__file__).parent


def archiver_arguments(*, name: str, version: str, artifact: str, handler: str, extra: str, config: str) -> list[str]:
    """What ``torch-model-archiver`` is told; the files are paths from where it is run."""
    return [
        *("--model-name", name, "--version", version, "--serialized-file", artifact, "--handler", handler),
        *("--extra-files", extra, "--config-file", config, "--archive-format", "zip-store"),
    ]


def _run_archiver(files: ArchiveFiles, *, name: str, version: str, staging: Path) -> Path:
    """Stage everything in a folder of its own and call torch-model-archiver there.

    The archiver stages in the system's temporary folder under the model's name and deletes what was there, so two at
    once destroy each other: give it a temporary folder that nobody else has.
    """
    scratch = staging / "tmp"
    scratch.mkdir()
    stage_extra_files(files, staging / "extra")
    (staging / CONFIG_FILE).write_bytes(files.config)
    arguments = archiver_arguments(
        name=name,
        version=version,
        artifact=str(files.artifact.absolute()),
        handler=str(handlers_folder() / ENTRY_FILE),
        extra="extra",
        config=CONFIG_FILE,
    )
    done = subprocess.run(
        [sys.executable, "-m", "model_archiver.model_packaging", *arguments, "--export-path", str(staging)],
        env={**os.environ, "TMPDIR": str(scratch)},
        cwd=staging,
        capture_output=True,
        text=True,
        check=False,
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
        digests = {
            name: sha256([manifest_bytes] if name == MANIFEST_FILE else entry_chunks(source, name)) for name in names
        }
        for name in sorted([*names, DIGESTS_FILE]):
            if name == MANIFEST_FILE:
                add_entry(target, name, [manifest_bytes], len(manifest_bytes))
            elif name == DIGESTS_FILE:
                document = digests_document(digests)
                add_entry(target, name, [document], len(document))
            else:
                add_entry(target, name, entry_chunks(source, name), source.getinfo(name).file_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
    """A verified archive.

    Attributes:
        path: The ``.mar`` file.
        name: Model name.
        version: Model version.
        sha256: SHA-256 of the whole file.
        digests: SHA-256 by path within the archive, of every file but ``digests.json``.
        packed_by_hand: Whether its manifest was written after its digests: see :mod:`handlers.digests`.
    """

    path: Path
    name: str
    version: str
    sha256: str
    digests: Mapping[str, str]
    packed_by_hand: bool = False

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

    def copy(self, destination: Path) -> None:
        """Copy the archive, and make sure that it is this one that was copied.

        Raises:
            ArchiveError: If another archive has taken its place since it was verified.
            OSError: If it cannot be read or written.
        """
        digest = hashlib.sha256()
        with self.path.open("rb") as source, destination.open("wb") as target:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
        if digest.hexdigest() != self.sha256:
            destination.unlink()
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
            recorded = _read_digests(source, os.fstat(file.fileno()).st_size, path)
            names = [name for name in source.namelist() if name != DIGESTS_FILE]
            actual = {name: sha256(entry_chunks(source, name)) for name in names}
            recorded.check(actual, lambda: _read_document(source, MANIFEST_FILE))
            by_hand = recorded.manifest is not None
            digest = (check_packed_by_hand if by_hand else check_canonical)(source, file, path)
            model = json.loads(_read_document(source, MANIFEST_FILE))["model"]
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
    return Archive(
        path=path,
        name=model["modelName"],
        version=model["modelVersion"],
        sha256=digest,
        digests=actual,
        packed_by_hand=by_hand,
    )


def _read_digests(source: zipfile.ZipFile, size: int, path: Path) -> Digests:
    """What an archive of ``size`` bytes records, after a look at what else it holds."""
    names = source.namelist()
    check_names(names, path)
    check_expansion(source, size, path)
    if DIGESTS_FILE not in names or MANIFEST_FILE not in names:
        raise ArchiveError(f"{path} is not an archive that torchport wrote: it has no {DIGESTS_FILE}")
    return parse_digests(_read_document(source, DIGESTS_FILE))


def _read_document(source: zipfile.ZipFile, name: str) -> bytes:
    if source.getinfo(name).file_size > _MOST_DOCUMENT_BYTES:
        raise ValueError(f"{name} is too large")
    return source.read(name)


def _replaced(path: Path) -> ArchiveError:
    return ArchiveError(f"another archive took the place of {path} while it was read; try again")
