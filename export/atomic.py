"""Archives that appear whole or not at all, in a model store that several exports may write to at once."""

from __future__ import annotations

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a hidden file beside ``path`` that takes its place when the block ends well.

    Killed at any moment, it leaves the old file or the new one. Hidden files that killed writers left are removed.

    Raises:
        OSError: If the folder or the disk refuses. The old file is then as it was, and the hidden one gone.
    """
    _remove_leftovers(path)
    part, file = _create_part(path)
    try:
        with file:
            with suppress(FileNotFoundError):
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(part, path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


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
    for part in path.parent.glob(f".{path.name}.*.part"):
        with suppress(OSError), part.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            part.unlink()
