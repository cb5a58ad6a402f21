"""A GPU's memory: a worker that will not have enough does not become ready, and batches that failed stay smaller.

What a worker needs is settled when it loads, where a person can read about it, rather than hours later. Yet other
processes may take memory afterwards; what they left no room for is halved, and remembered.
"""

from __future__ import annotations

import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from handlers.artifact import Artifact
from handlers.errors import BackendError
from handlers.visible_gpus import gpu_name

# What torch, TorchScript (whose errors are text), cuBLAS, cuDNN and ONNX Runtime say.
_SIGNS = (
    "CUDA out of memory",
    "CUDA error: out of memory",
    "CUDA failure 2: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "Failed to allocate memory for requested buffer of size",
)
_REQUESTED = re.compile(r"(?:Tried to allocate|requested buffer of size) ([\d.]+)(?: (GiB|MiB|KiB))?")
_UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
# Of what the warm-up needed: the same batches need a little more in another order, as memory falls to pieces.
_HEADROOM = 0.05
_MOST_CEILINGS = 16


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a runtime failed, or a failure came about, for want of the GPU's memory."""
    torch = sys.modules.get("torch")
    seen: BaseException | None = error
    for _ in range(8):  # chains may be circles
        if seen is None:
            return False
        if torch is not None and isinstance(seen, torch.OutOfMemoryError):
            return True
        text = str(seen)
        if any(sign in text for sign in _SIGNS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def let_go(error: BaseException) -> None:
    """Free the tensors of the calls that an error came from; what a log shows of it stays."""
    traceback.clear_frames(error.__traceback__)


class Gpu(Protocol):
    """What is known about the memory of a GPU, all in bytes."""

    index: int

    def free(self) -> int:
        """What no process has."""
        ...

    def reserved(self) -> int:
        """What torch in this process has, its caches included."""
        ...

    def peak(self) -> int:
        """The most that torch in this process has had since :meth:`forget_peak`."""
        ...

    def forget_peak(self) -> None:
        """Begin to watch for the most."""
        ...

    def limit(self, size: int) -> None:
        """Let torch in this process have no more from now on."""
        ...


class CudaGpu:
    """A GPU that torch sees; see :class:`Gpu`."""

    def __init__(self, index: int) -> None:
        import torch  # noqa: PLC0415  # archives for the CPU may do without

        self.index = index
        self._cuda = torch.cuda

    def free(self) -> int:
        """What the driver says."""
        return int(self._cuda.mem_get_info(self.index)[0])

    def reserved(self) -> int:
        """What torch's allocator says."""
        return int(self._cuda.memory_reserved(self.index))

    def peak(self) -> int:
        """What torch's allocator says."""
        return int(self._cuda.max_memory_reserved(self.index))

    def forget_peak(self) -> None:
        """Start from what is reserved now."""
        self._cuda.reset_peak_memory_stats(self.index)

    def limit(self, size: int) -> None:
        """Tell torch's allocator, which takes a share."""
        total = self._cuda.get_device_properties(self.index).total_memory
        self._cuda.set_per_process_memory_fraction(min(1.0, size / total), self.index)


class MemoryWatch:
    """Compares what a model needs of a GPU's memory with what there was before it was loaded.

    Args:
        gpu: Where the model will be.
        limit_bytes: The most of it that torch may allocate here; None for all that is free.
    """

    def __init__(self, gpu: Gpu, limit_bytes: int | None = None) -> None:
        self._gpu = gpu
        self._limit = limit_bytes
        if limit_bytes is not None:
            gpu.limit(limit_bytes)
        self._free = gpu.free()
        gpu.forget_peak()
        self._reserved = gpu.reserved()

    @contextmanager
    def explaining(self, what: str) -> Iterator[None]:
        """Say what is to be done when the memory does not suffice for what runs inside.

        Args:
            what: In words, such as ``batches of 32``.

        Raises:
            BackendError: If it does not.
        """
        try:
            yield
        except Exception as error:  # runtimes raise types of their own
            if not is_out_of_memory(error):
                raise
            requested = _requested(error)
            raise self._shortage(what, self._needed() + requested, least=not requested) from error

    def check(self, what: str) -> None:
        """Refuse a model that leaves next to no memory, after it was warmed up.

        Args:
            what: It has computed, in words.

        Raises:
            BackendError: If what it needed, and some headroom, is more than was free.
        """
        needed = round(self._needed() * (1 + _HEADROOM))
        if needed > self._room():
            raise self._shortage(what, needed)

    def _room(self) -> int:
        return self._free if self._limit is None else min(self._free, self._limit)

    def _needed(self) -> int:
        """The most that the model has had.

        Torch knows of its own memory, and keeps the peak. What ONNX Runtime and compiled packages have does not shrink;
        it is missing from what is free, as is what other processes have taken since.
        """
        torchs = self._gpu.peak() - self._reserved
        others = (self._free - self._gpu.free()) - (self._gpu.reserved() - self._reserved)
        return torchs + max(0, others)

    def _shortage(self, what: str, needed: int, *, least: bool = False) -> BackendError:
        gpu = f"GPU {gpu_name(self._gpu.index, os.environ)}"
        needs = f"the model needs {'more than ' if least else ''}{_size(needed)} for {what}"
        if self._limit is not None and self._limit < self._free:
            return BackendError(
                f"{needs}, and the worker may take {_size(self._limit)} of {gpu}; set a lower max_batch or a higher "
                "gpu_memory_mib"
            )
        return BackendError(
            f"{needs}, and {gpu} has {_size(self._free)} free; "
            "set a lower max_batch, or serve it on another GPU or with fewer workers on this one"
        )


def watch_memory(artifact: Artifact | None, gpu: int | None, limit_bytes: int | None = None) -> MemoryWatch | None:
    """The watch over an artifact's GPU.

    Args:
        artifact: Not loaded yet.
        gpu: Its number; None for torch's current one.
        limit_bytes: The most that torch may allocate there; None for no limit.

    Returns:
        None if the artifact has no such GPU: there is nothing to watch, or loading it will tell.
    """
    if artifact is None or artifact.device != "cuda":
        return None
    try:
        import torch  # noqa: PLC0415
    except ImportError:  # ONNX Runtime alone
        return None
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device() if gpu is None else gpu
    return MemoryWatch(CudaGpu(index), limit_bytes) if 0 <= index < torch.cuda.device_count() else None


class BatchCeilings:
    """What was learned about batches that the memory did not hold; several threads may."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Most samples of a batch whose samples have at least so many positions.
        self._found: list[tuple[int, int]] = []

    def lower(self, samples: int, positions: int) -> int:
        """Remember that a batch failed.

        Args:
            samples: In it, at least two.
            positions: Of each sample, padding included.

        Returns:
            The most samples that such batches have from now on: half of it, which is tried next.
        """
        most = samples // 2
        with self._lock:
            others = [(count, least) for count, least in self._found if count < most or least < positions]
            self._found = [*others, (most, positions)][-_MOST_CEILINGS:]
        return most

    def cut(self, batches: Sequence[list[int]], positions: Callable[[list[int]], int]) -> list[list[int]]:
        """Cut planned batches into pieces that may be tried.

        Args:
            batches: What runs together.
            positions: Of each sample of a batch, padding included.
        """
        if not self._found:
            return list(batches)
        pieces = []
        for batch in batches:
            most = self._most(positions(batch))
            step = len(batch) if most is None else most
            pieces += [batch[start : start + step] for start in range(0, len(batch), step)]
        return pieces

    def _most(self, positions: int) -> int | None:
        return min((count for count, least in self._found if positions >= least), default=None)


def _requested(error: BaseException) -> int:
    """The bytes that were asked for in vain, as far as the error tells; else 0."""
    seen: BaseException | None = error
    while seen is not None:
        found = _REQUESTED.search(str(seen))
        if found:
            return round(float(found[1]) * _UNITS[found[2] or ""])
        seen = seen.__cause__
    return 0


def _size(size: int) -> str:
    return f"{size / (1 << 30):.1f} GiB" if size >= 1 << 30 else f"{size / (1 << 20):.0f} MiB"
