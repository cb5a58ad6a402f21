"""Digests: every file of an archive has its SHA-256 recorded in ``digests.json``, which lists no other file's.

A mismatch means that the archive was changed after its gates passed, so nothing in it can be trusted.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

from handlers.document import Section
from handlers.errors import DigestError, SignatureError

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


def digests_document(digests: Mapping[str, str]) -> bytes:
    """The bytes of ``digests.json`` for a mapping of file names to digests."""
    return (json.dumps({"sha256": dict(sorted(digests.items()))}, indent=1) + "\n").encode()


def parse_digests(data: bytes) -> dict[str, str]:
    """Read the bytes of ``digests.json``.

    Raises:
        DigestError: If they are not such a document.
    """
    try:
        root = Section(json.loads(data), DIGESTS_FILE)
        table = root.section("sha256")
        root.finish()
        return {name: table.string(name) for name in table.names()}
    except (ValueError, SignatureError) as error:
        raise DigestError(f"{DIGESTS_FILE} cannot be read: {error}") from error


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
    expected = parse_digests(digests_path.read_bytes())
    actual = {
        path.relative_to(folder).as_posix(): file_sha256(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != digests_path and not _is_harmless_bytecode(path)
    }
    compare_digests(expected, actual)


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
