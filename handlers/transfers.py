"""Copies between the host and a GPU that go on while Python does: which stream waits for which."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor


class Transfers(Protocol):
    """Copies between host and device that go on while Python does; those of one lane."""

    def on_device(self) -> AbstractContextManager[object]:
        """Make the device the current one of this thread."""
        ...

    def pinned(self, size: int) -> Tensor:
        """So many bytes of the host that the device reads and writes by itself: ``[size]`` uint8."""
        ...

    def room(self, size: int) -> Tensor:
        """So many bytes on the device, of whatever values: ``[size]`` uint8. What computed before may still use it."""
        ...

    def arrive(self) -> None:
        """Wait until all of it was copied in, and the host's memory may be written again."""
        ...

    def begin(self) -> None:
        """Let what is copied in come after what was computed before."""
        ...

    def copy_in(self, target: Tensor, source: Tensor) -> None:
        """Start to copy from pinned memory to the device."""
        ...

    def join(self) -> None:
        """Let what is computed from now on see what was copied in."""
        ...

    def copy_out(self, target: Tensor, source: Tensor) -> None:
        """Start to copy to pinned memory, once what was computed before is there."""
        ...

    def leave(self) -> None:
        """Wait until all of it was copied out."""
        ...


class CudaTransfers:
    """The transfers of a CUDA device, with a stream of their own for what is copied in; see :class:`Transfers`.

    No tensor needs ``record_stream``. What is copied in lies in memory that a lane keeps: it is freed only when the
    host has waited for the copies (:meth:`arrive`), and new memory is written only after what computed before
    (:meth:`begin`).
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Waiting for an event that nothing was recorded for returns at once.
        self._copied_in = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied_out = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def on_device(self) -> AbstractContextManager[object]:
        """Make the device the current one: without it, pinned memory would take room on the first GPU."""
        return torch.cuda.device(self._device)

    def pinned(self, size: int) -> Tensor:
        """Pinned memory."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def room(self, size: int) -> Tensor:
        """Memory that belongs to the stream that computes."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def arrive(self) -> None:
        """Wait for the copies in."""
        self._copied_in.synchronize()

    def begin(self) -> None:
        """Put the copies behind what computes: it may still use memory that was just allocated."""
        self._copying.wait_stream(torch.cuda.current_stream(self._device))

    def copy_in(self, target: Tensor, source: Tensor) -> None:
        """Copy on the stream of the copies."""
        with torch.cuda.stream(self._copying):
            target.copy_(source, non_blocking=True)
            self._copied_in.record(self._copying)

    def join(self) -> None:
        """Put what computes behind the copies."""
        torch.cuda.current_stream(self._device).wait_event(self._copied_in)

    def copy_out(self, target: Tensor, source: Tensor) -> None:
        """Copy on the stream that computes."""
        target.copy_(source, non_blocking=True)
        self._copied_out.record(torch.cuda.current_stream(self._device))

    def leave(self) -> None:
        """Wait for the copies out; other threads of Python go on meanwhile."""
        self._copied_out.synchronize()
