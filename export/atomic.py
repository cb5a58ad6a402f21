"""Files and folders that appear whole or not at all, in a model store that several exports may write to at once."""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path, *, companion: tuple[Path, bytes | None] | None = None) -> Iterator[IO[bytes]]:
    """Open a hidden file beside ``path`` that takes its place when the block ends well.

    Killed at any moment, it leaves the old file or the new one. Hidden files that killed writers left are removed.

    Args:
        path: The file.
        companion: A file in the same folder that belongs to this content of ``path`` alone, such as its signature, and
            its bytes; None where the new content has no companion. The old one is gone before ``path`` has its new
            content, and the new one comes after it, so that none is ever beside a file that it does not belong to.

    Raises:
        OSError: If the folder or the disk refuses. The old files are then as they were, and the hidden ones gone.
    """
    with ExitStack() as stack:
        part, file = stack.enter_context(_hidden(path))
        with suppress(FileNotFoundError):
            os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
        yield file
        _flush(file)
        if companion is None:
            os.replace(part, path)
            return
        beside, content = companion
        beside_part = None
        if content is not None:
            beside_part, beside_file = stack.enter_context(_hidden(beside))
            beside_file.write(content)
            _flush(beside_file)
        stack.enter_context(_locked(path.parent))
        if path.is_dir():  # os.replace would say so too late
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        beside.unlink(missing_ok=True)
        os.replace(part, path)
        if beside_part is not None:
            os.replace(beside_part, beside)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """Make a hidden folder that is called ``folder`` when the block ends well, and gone when it does not.

    Hidden folders that killed writers left are removed.

    Raises:
        FileExistsError: If ``folder`` is there already, at the beginning or at the end. It is left as it is.
        OSError: If the folder above or the disk refuses.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    _refuse_existing(folder)
    for part in _parts_of(folder):
        with suppress(OSError), _locked(part, wait=False):
            shutil.rmtree(part)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.part")
    part.mkdir()
    try:
        with _locked(part):
            yield part
            _refuse_existing(folder)  # an empty one would be replaced
            os.rename(part, folder)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _refuse_existing(folder: Path) -> None:
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder))


@contextmanager
def _hidden(path: Path) -> Iterator[tuple[Path, IO[bytes]]]:
    """A hidden file beside ``path`` that is gone when the block ends, unless it was given another name."""
    _remove_leftovers(path)
    part, file = _create_part(path)
    try:
        with file:
            yield part, file
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


def _flush(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


@contextmanager
def _locked(folder: Path, *, wait: bool = True) -> Iterator[None]:
    """Be the only one that has a folder locked; it needs no file for that.

    Raises:
        OSError: If somebody has, and there is no waiting.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                raise
            # a file system without locks: no other export can lock it either
        yield
    finally:
        os.close(descriptor)


def _create_part(path: Path) -> tuple[Path, IO[bytes]]:
    """A new file under a name that nobody else has, locked for as long as this process lives and keeps it open.

    A process id would not do for a name: in containers that share a model store, every export is process 1.
    """
    while True:
        part = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
        file = os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), "w+b")
        with suppress(OSError):  # a file system without locks: no other export can lock it either
            fcntl.flock(file, fcntl.LOCK_EX)
        if part.exists():
            return part, file
        file.close()  # between the two calls, another export took it for a leftover


def _remove_leftovers(path: Path) -> None:
    """Remove the hidden files of writers that were killed: those that nobody has locked."""
    for part in _parts_of(path):
        with suppress(OSError), part.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()


def _parts_of(path: Path) -> Iterator[Path]:
    return path.parent.glob(f".{glob.escape(path.name)}.*.part")
