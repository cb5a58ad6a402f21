"""The zip of an archive: its canonical form, and what holds for one that was packed by hand.

The canonical form is a zip with sorted, uncompressed entries and fixed dates and modes. The same files give the same
bytes on every machine, and a reader can rebuild the bytes and so notice any change, even in the parts of a zip that
no digest of a file covers.

A zip that ``torch-model-archiver`` packed has dates, and may be compressed, so nobody can rebuild it. What can be
known of it is known: every byte of its structure follows from its own directory, there is nothing between, before or
behind its entries, and no entry is followed by bytes that one reader skips and another reads.
"""

from __future__ import annotations

import os
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from export.errors import ArchiveError
from handlers.digests import file_sha256, sha256

# The first moment that a zip can hold.
EPOCH = (1980, 1, 1, 0, 0, 0)
# Above it, a zip needs fields of 64 bits, which torch-model-archiver writes and this module does not check; entries
# get them when they might grow by a twentieth beyond 2 GiB.
MOST_BYTES_BY_HAND = int((2**31 - 1) / 1.05)

_MODE = 0o100644
# Of files that some umask made, and of what Python's zipfile is given as bytes; no program reads them from an archive.
_MODES_BY_HAND = (0o600, *(stat.S_IFREG | mode for mode in (0o600, 0o640, 0o644, 0o660, 0o664, 0o666)))
_UNIX = 3
_CHUNK_BYTES = 1 << 20
# Sources and JSON shrink to a quarter or a tenth; ten-thousandfold needs a file made for it.
_MOST_EXPANSION = 100

_UTF8_NAME = 0x800
_LOCAL_HEADER = struct.Struct("<4sHHHHHIIIHH")
_DIRECTORY_ENTRY = struct.Struct("<4sBBHHHHHIIIHHHHHII")
_END = struct.Struct("<4sHHHHIIH")


def add_entry(target: zipfile.ZipFile, name: str, chunks: Iterator[bytes] | list[bytes], size: int) -> None:
    """Add a file in canonical form; who adds them sorted by name writes a canonical zip.

    Args:
        target: The zip.
        name: Path within it.
        chunks: The file's content.
        size: Its length, by which zipfile chooses the width of its own fields.
    """
    info = zipfile.ZipInfo(name, date_time=EPOCH)
    info.external_attr = _MODE << 16
    info.create_system = _UNIX
    info.file_size = size
    with target.open(info, "w") as entry:
        for chunk in chunks:
            entry.write(chunk)


def entry_chunks(source: zipfile.ZipFile, name: str) -> Iterator[bytes]:
    """The content of one file, in pieces."""
    with source.open(name) as entry:
        while chunk := entry.read(_CHUNK_BYTES):
            yield chunk


def open_file_sha256(file: IO[bytes]) -> str:
    """SHA-256 of all of an open file."""
    file.seek(0)
    return sha256(iter(lambda: file.read(_CHUNK_BYTES), b""))


def check_names(names: list[str], path: Path) -> None:
    """Refuse paths that lead out of the folder, that two readers could take for different ones, or that come twice.

    Raises:
        ArchiveError: If there is one.
    """
    for name in names:
        plain = PurePosixPath(name).as_posix() == name and name != "."
        if not plain or name.startswith("/") or "\\" in name or ".." in PurePosixPath(name).parts:
            raise ArchiveError(
                f"{path} holds the path {name!r}, which is not that of a file inside its folder; do not use it"
            )
    if len(set(names)) != len(names):
        raise ArchiveError(f"{path} holds the same path twice; do not use it")


def check_expansion(source: zipfile.ZipFile, size: int, path: Path) -> None:
    """Refuse what unpacks to far more than it is, before a byte of it is unpacked.

    Raises:
        ArchiveError: If it does.
    """
    if sum(entry.file_size for entry in source.infolist()) > _MOST_EXPANSION * size:
        raise ArchiveError(
            f"{path} unpacks to more than {_MOST_EXPANSION} times its size; do not use it, or, if you packed it "
            "yourself, pack it again with --archive-format zip-store"
        )


def check_canonical(source: zipfile.ZipFile, file: IO[bytes], path: Path) -> str:
    """Compare an archive with the only bytes that its content can have.

    Digests cover what is inside the entries; this covers all the rest: dates, flags, order, comments, gaps.

    Returns:
        SHA-256 of the whole archive.

    Raises:
        ArchiveError: If it has other bytes, or there is no room to rebuild it.
    """
    entries = source.infolist()
    size = os.fstat(file.fileno()).st_size
    stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)
    if not stored or sum(entry.file_size for entry in entries) > size:
        raise changed(path)
    try:
        with tempfile.TemporaryDirectory(prefix="torchport-verify-") as folder:
            rebuilt = Path(folder) / path.name
            with zipfile.ZipFile(rebuilt, "w", zipfile.ZIP_STORED) as target:
                for name in sorted(source.namelist()):
                    add_entry(target, name, entry_chunks(source, name), source.getinfo(name).file_size)
            digest = file_sha256(rebuilt)
    except OSError as error:
        raise ArchiveError(
            f"{path} cannot be verified, for which it is rebuilt in {tempfile.gettempdir()}: "
            f"{error.strerror or error}; name another folder with TMPDIR"
        ) from error
    if open_file_sha256(file) != digest:
        raise changed(path)
    return digest


def check_packed_by_hand(source: zipfile.ZipFile, file: IO[bytes], path: Path) -> str:
    """Compare an archive's structure with the only one that its directory allows.

    Returns:
        SHA-256 of the whole archive.

    Raises:
        ArchiveError: If anything else is in it, or it is larger than torch-model-archiver writes it this way.
    """
    entries = source.infolist()
    if max(os.fstat(file.fileno()).st_size, *(entry.file_size for entry in entries)) > MOST_BYTES_BY_HAND:
        raise ArchiveError(
            f"{path} was packed by hand and is larger than {MOST_BYTES_BY_HAND / 1e9:.1f} GB, which cannot be "
            "verified; export it without --staging-only"
        )
    file.seek(0)
    for entry in entries:
        if entry.header_offset != file.tell() or not _is_regular_file(entry):
            raise changed(path)
        _expect(file, _local_header(entry), path)
        _check_data(file, entry, path)
    start = file.tell()
    directory = b"".join(_directory_entry(entry) for entry in entries)
    end = _END.pack(b"PK\5\6", 0, 0, len(entries), len(entries), len(directory), start, 0)
    _expect(file, directory + end, path)
    if file.read(1):
        raise changed(path)
    return open_file_sha256(file)


def _is_regular_file(entry: zipfile.ZipInfo) -> bool:
    """Whether its attributes are those that torch-model-archiver gives to a file under some umask."""
    mode, rest = divmod(entry.external_attr, 1 << 16)
    return entry.create_system == _UNIX and rest == 0 and mode in _MODES_BY_HAND


def _expect(file: IO[bytes], expected: bytes, path: Path) -> None:
    if file.read(len(expected)) != expected:
        raise changed(path)


def _local_header(entry: zipfile.ZipInfo) -> bytes:
    name = _name_bytes(entry)
    return _LOCAL_HEADER.pack(b"PK\3\4", entry.extract_version, *_common(entry), len(name), 0) + name


def _directory_entry(entry: zipfile.ZipInfo) -> bytes:
    """Its place in the directory, without extra fields and comments, on disk 0, of no special kind."""
    name = _name_bytes(entry)
    versions = (entry.extract_version, entry.create_system, entry.extract_version)
    rest = (len(name), 0, 0, 0, 0, entry.external_attr, entry.header_offset)
    return _DIRECTORY_ENTRY.pack(b"PK\1\2", *versions, *_common(entry), *rest) + name


def _common(entry: zipfile.ZipInfo) -> tuple[int, ...]:
    """The fields that come both before the entry and in the directory."""
    year, month, day, hour, minute, second = entry.date_time
    date = (year - EPOCH[0]) << 9 | month << 5 | day
    time = hour << 11 | minute << 5 | second // 2
    flags = entry.flag_bits & _UTF8_NAME
    sizes = (entry.CRC, entry.compress_size, entry.file_size)
    return (flags, entry.compress_type, time, date, *sizes)


def _name_bytes(entry: zipfile.ZipInfo) -> bytes:
    return entry.orig_filename.encode("utf-8" if entry.flag_bits & _UTF8_NAME else "cp437")


def _check_data(file: IO[bytes], entry: zipfile.ZipInfo, path: Path) -> None:
    """Read an entry's bytes: they must end where its content ends."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS) if entry.compress_type == zipfile.ZIP_DEFLATED else None
    if inflater is None and (entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size):
        raise changed(path)
    left, unpacked = entry.compress_size, 0
    while left and (chunk := file.read(min(left, _CHUNK_BYTES))):
        left -= len(chunk)
        while inflater is not None and chunk and unpacked <= entry.file_size:
            if inflater.eof:  # bytes behind the content's own end
                raise changed(path)
            unpacked += len(inflater.decompress(chunk, _CHUNK_BYTES))
            chunk = inflater.unconsumed_tail + inflater.unused_data
    if left or (inflater is not None and (unpacked != entry.file_size or not inflater.eof)):
        raise changed(path)


def changed(path: Path) -> ArchiveError:
    """The error of an archive that is not what its export wrote."""
    return ArchiveError(f"{path} was changed after its export; export it again or fetch a clean copy")
