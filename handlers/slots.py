"""Compute slots: so many of a model's workers compute at the same time; the others read and answer meanwhile.

TorchServe keeps one batch in flight for each worker: while a worker parses requests and writes answers, its core idles.
With one worker more than slots, another batch is ready by then. Who holds a slot is settled by ``flock`` on files of
the extracted archive, which all workers of a model share: nothing has to be writable, and the kernel frees what a
killed worker held.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from handlers.errors import LoadError

# More would need more files to lock, and no machine has use for them.
MOST_SLOTS = 8
# Files of every archive; the first ones tell workers apart, the others are the slots.
_FILES = "handlers"


class ComputeSlot:
    """A place for one batch that computes; a context manager that waits for it.

    Args:
        folder: The extracted archive.
        slots: How many of its workers compute at the same time; 0 for all of them, without waiting.

    Raises:
        LoadError: If the archive's files cannot be locked.
    """

    def __init__(self, folder: Path, slots: int) -> None:
        self._slot: int | None = None
        if not slots:
            return
        files = sorted((folder / _FILES).glob("*.py"))
        if len(files) < 2 * MOST_SLOTS:
            raise LoadError(f"the archive has no {_FILES} to lock; export it again, or set computing to 0")
        try:
            self._number, index = _claim(files[:-MOST_SLOTS])
            self._slot = os.open(files[-1 - index % slots], os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise LoadError(
                f"the archive's files cannot be locked ({error.strerror}); set computing to 0 where locks do not work"
            ) from error

    def __enter__(self) -> None:
        """Wait for the slot; other threads of this process run meanwhile."""
        if self._slot is not None:
            fcntl.flock(self._slot, fcntl.LOCK_EX)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave it."""
        if self._slot is not None:
            fcntl.flock(self._slot, fcntl.LOCK_UN)


def _claim(files: list[Path]) -> tuple[int, int]:
    """The first file that no other worker has, locked as long as this process lives, and its index."""
    for index, path in enumerate(files):
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
        else:
            return descriptor, index
    # Two workers with one number share a slot that they could have had each; nothing worse.
    return -1, os.getpid()
