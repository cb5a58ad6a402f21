"""Digests: every file of an archive has its SHA-256 recorded in ``digests.json``, which lists no other file's.

A mismatch means that the archive was changed after its gates passed, so nothing in it can be trusted.

Of an archive that is packed by hand the manifest alone is not recorded: the archiver writes it, with a date, when the
digests are long there. Then ``digests.json`` says which files the manifest must name, and its meaning is checked
instead of its bytes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from handlers.document import Section
from handlers.errors import DigestError, SignatureError
from handlers.manifest import FILE_FIELDS, MANIFEST_FILE, check_manifest

DIGESTS_FILE = "digests.json"

# Python writes these beside the modules it imports from the extracted archive.
_BYTECODE_FOLDER = "__pycache__"
# The header of bytecode, after its magic number: how it is validated (0: by the next two), the source's time and size.
_BYTECODE_HEADER = struct.Struct("<4xIII")
_CHUNK_BYTES = 1 << 20


def sha256(chunks: Iterable[bytes]) -> str:
    """SHA-256 of some bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return sha256(iter(lambda: file.read(_CHUNK_BYTES), b""))


@dataclass(frozen=True, kw_only=True, slots=True)
class Digests:
    """What ``digests.json`` records.

    Attributes:
        files: SHA-256 by path within the archive.
        manifest: What the manifest must say of its files, by the fields of ``handlers.manifest.FILE_FIELDS``, where
            its bytes are not recorded because the archive is packed by hand; None where they are.
    """

    files: Mapping[str, str]
    manifest: Mapping[str, str] | None = None

    def check(self, actual: Mapping[str, str], read_manifest: Callable[[], bytes]) -> None:
        """Compare what was found with what is recorded.

        Args:
            actual: SHA-256 of every file found but ``digests.json``.
            read_manifest: Gives the manifest's bytes; called only when they are not recorded.

        Raises:
            DigestError: If a file is missing, changed, or not recorded at all.
        """
        if self.manifest is None:
            compare_digests(self.files, actual)
            return
        found = dict(actual)
        if found.pop(MANIFEST_FILE, None) is None:
            raise DigestError(f"{MANIFEST_FILE} is missing; pack the folder again with its pack.sh")
        compare_digests(self.files, found)
        check_manifest(read_manifest(), self.manifest)


def digests_document(files: Mapping[str, str], manifest: Mapping[str, str] | None = None) -> bytes:
    """The bytes of ``digests.json`` for digests by path and, if packed by hand, the files that the manifest names."""
    document: dict[str, object] = {"sha256": dict(sorted(files.items()))}
    if manifest is not None:
        document["manifest"] = dict(sorted(manifest.items()))
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()


def parse_digests(data: bytes) -> Digests:
    """Read the bytes of ``digests.json``.

    Raises:
        DigestError: If they are not such a document.
    """
    try:
        root = Section(json.loads(data), DIGESTS_FILE)
        table = root.section("sha256")
        files = {name: table.string(name) for name in table.names()}
        manifest = _manifest_files(root.section("manifest"), files) if root.has("manifest") else None
        root.finish()
    except (ValueError, RecursionError, SignatureError) as error:
        raise DigestError(f"{DIGESTS_FILE} cannot be read: {error}") from error
    return Digests(files=files, manifest=manifest)


def _manifest_files(section: Section, files: Mapping[str, str]) -> dict[str, str]:
    """What the manifest must say; every file that it names has a digest, and the manifest itself has none."""
    named = {field: section.string(field) for field in FILE_FIELDS}
    section.finish()
    for field, file in named.items():
        if file not in files:
            raise SignatureError(f"manifest.{field} names {file!r}, which has no digest")
    if MANIFEST_FILE in files:
        raise SignatureError(f"{MANIFEST_FILE} has a digest and a description; it can have only one of them")
    return named


def compare_digests(expected: Mapping[str, str], actual: Mapping[str, str]) -> None:
    """Compare recorded digests with those found.

    Raises:
        DigestError: If a file is missing, changed, or not recorded at all; it names the first few.
    """
    faults = [f"{name} is missing" for name in sorted(expected.keys() - actual.keys())]
    faults += [f"{name} is not recorded" for name in sorted(actual.keys() - expected.keys())]
    faults += [
        f"{name} has changed" for name in sorted(expected.keys() & actual.keys()) if expected[name] != actual[name]
    ]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise DigestError(
            f"the archive differs from its digests ({'; '.join(faults[:3])}{more}); "
            "export it again or fetch a clean copy"
        )


def verify_folder(folder: Path) -> None:
    """Check an extracted archive against its digests.

    Raises:
        DigestError: If a file is missing, changed, or was added.
    """
    digests_path = folder / DIGESTS_FILE
    if not digests_path.is_file():
        raise DigestError(f"{DIGESTS_FILE} is missing; this is not a whole torchport archive")
    recorded = parse_digests(digests_path.read_bytes())
    actual = {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != digests_path and not _is_harmless_bytecode(path)
    }
    recorded.check(actual, (folder / MANIFEST_FILE).read_bytes)


def _is_harmless_bytecode(path: Path) -> bool:
    """Whether a file is what Python itself left beside a module that it imported, or what it will never import.

    Bytecode that came in the archive would run instead of the module whose digest is right. Python takes it for the
    module's only if it gives the source's time, which is that of the extraction, or asks not to be validated at all.
    """
    if path.parent.name != _BYTECODE_FOLDER:
        return False
    if path.suffix != ".pyc":  # a worker beside this one is just writing it
        return True
    try:
        source = Path(importlib.util.source_from_cache(str(path))).stat()
        with path.open("rb") as file:
            flags, modified, size = _BYTECODE_HEADER.unpack(file.read(_BYTECODE_HEADER.size))
    except (OSError, ValueError, struct.error):
        return False
    return bool((flags, modified, size) == (0, int(source.st_mtime) & 0xFFFFFFFF, source.st_size & 0xFFFFFFFF))
