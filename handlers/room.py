"""Room for what a worker holds: bytes, so that requests are bounded by what they take and not by their number."""

from __future__ import annotations

import threading


class Room:
    """So many bytes may be held at once; whoever brings more waits until others have gone.

    Args:
        limit: Bytes. What is larger than that by itself gets in when nothing else is there.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._changed = threading.Condition()

    @property
    def held(self) -> int:
        """Bytes that are held now."""
        return self._held

    @property
    def is_full(self) -> bool:
        """Whether whoever comes next has to wait."""
        return self._held >= self._limit

    def enter(self, size: int) -> None:
        """Wait until there is room for so many bytes, and take it."""
        with self._changed:
            while self._held and self._held + size > self._limit:
                self._changed.wait()
            self._held += size

    def change(self, before: int, after: int) -> None:
        """What took some bytes takes others now; it does not wait, as it is inside already."""
        with self._changed:
            self._held += after - before
            if after < before:
                self._changed.notify_all()

    def leave(self, size: int) -> None:
        """Give bytes back."""
        self.change(size, 0)
