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
        self._slots: list[int] = []
        self._held: int | None = None
        if not slots:
            return
        files = sorted((folder / _FILES).glob("*.py"))
        if len(files) < 2 * MOST_SLOTS:
            raise LoadError(f"the archive has no {_FILES} to lock; export it again, or set computing to 0")
        try:
            self._number, index = _claim(files[:-MOST_SLOTS])
            # Its own first: the one that it waits for when all are taken, so that workers spread over them.
            order = [(index + i) % slots for i in range(slots)]
            self._slots = [os.open(files[-1 - slot], os.O_RDONLY | os.O_CLOEXEC) for slot in order]
        except OSError as error:
            raise LoadError(
                f"the archive's files cannot be locked ({error.strerror}); set computing to 0 where locks do not work"
            ) from error

    def __enter__(self) -> None:
        """Wait for a slot; other threads of this process run meanwhile."""
        for slot in self._slots:
            try:
                fcntl.flock(slot, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            self._held = slot
            return
        if self._slots:
            fcntl.flock(self._slots[0], fcntl.LOCK_EX)
            self._held = self._slots[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave it."""
        if self._held is not None:
            fcntl.flock(self._held, fcntl.LOCK_UN)
            self._held = None


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
