"""Memory: what a block of code uses, what there is, and how to give some back."""

import ctypes
import gc
import resource
import sys
import threading
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Self

import psutil
import torch

from models.errors import DeviceError

_SAMPLE_INTERVAL_S = 0.005
# getrusage counts in KiB on Linux and in bytes on macOS.
_MAX_RSS_UNIT = 1 if sys.platform == "darwin" else 1024


class MemoryTracker:
    """Measures the memory of a block, in bytes, on one device.

        with MemoryTracker() as memory:
            output = model(inputs)
        print(memory.peak, memory.used)

    On a GPU: what torch's allocator has handed out to this process, exactly; the queue is drained first and last. On a
    CPU: the resident memory of the whole process, other threads included. A peak above all earlier ones of the process
    is exact there, since the kernel keeps the highest; a lower one is the highest of samples, one every 5 ms, and may
    miss a shorter spike.

    Args:
        device: what to measure; by default the current GPU, or the CPU where there is none.
        verbose: print one line when the block ends.

    Raises:
        DeviceError: for a GPU that is absent.
    """

    _open_on_gpu: ClassVar[list["MemoryTracker"]] = []

    def __init__(self, device: torch.device | str | None = None, *, verbose: bool = False) -> None:
        self.device = _resolve(device)
        self.start = 0
        """Bytes in use when the block began."""
        self.end = 0
        """Bytes in use when the block ended."""
        self.peak = 0
        """The most bytes in use at once in the block, including those of the start."""
        self._verbose = verbose
        self._probe: _ResidentPeak | None = None

    @property
    def used(self) -> int:
        """Bytes that the block has not given back; negative when it freed more than it took."""
        return self.end - self.start

    def __enter__(self) -> Self:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            # There is one high-water mark per GPU: whoever measures already must read it before it is reset.
            self._read_gpu_peak()
            torch.cuda.reset_peak_memory_stats(self.device)
            self._open_on_gpu.append(self)
            self.start = self.peak = torch.cuda.memory_allocated(self.device)
        else:
            self._probe = _ResidentPeak()
            self.start = self._probe.start
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._probe is not None:
            self.end, self.peak = self._probe.finish()
        else:
            try:
                torch.cuda.synchronize(self.device)
                self._read_gpu_peak()
                self.end = torch.cuda.memory_allocated(self.device)
            finally:
                self._open_on_gpu.remove(self)
        if self._verbose:
            print(self)

    def __str__(self) -> str:
        return (
            f"memory on {self.device}: {_readable(self.start)} before, {_readable(self.end)} after, "
            f"{_readable(self.peak)} at most"
        )

    def _read_gpu_peak(self) -> None:
        peak = torch.cuda.max_memory_allocated(self.device)
        for tracker in self._open_on_gpu:
            if tracker.device == self.device:
                tracker.peak = max(tracker.peak, peak)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuMemory:
    """One GPU, in bytes."""

    name: str
    """Such as "NVIDIA H100"."""

    allocated: int
    """In this process's tensors."""

    reserved: int
    """Held by torch's allocator for this process, allocated or not."""

    free: int
    """Of no process."""

    total: int
    """Of the whole GPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryUsage:
    """What is in use and what is left, in bytes."""

    rss: int
    """Resident memory of this process."""

    available: int
    """What the machine can still give without swapping; a container's limit may leave less."""

    total: int
    """Of the machine."""

    gpu: GpuMemory | None
    """None on a CPU."""

    def __str__(self) -> str:
        text = f"process {_readable(self.rss)}, {_readable(self.available)} of {_readable(self.total)} available"
        if self.gpu is None:
            return text
        return (
            f"{text}; {self.gpu.name}: {_readable(self.gpu.allocated)} allocated, {_readable(self.gpu.reserved)} "
            f"reserved, {_readable(self.gpu.free)} of {_readable(self.gpu.total)} free"
        )


def monitor_memory(device: torch.device | str | None = None) -> MemoryUsage:
    """What is in use now; `print` it or read its fields.

    Args:
        device: a GPU to include; by default the current one, if there is any.

    Raises:
        DeviceError: for a GPU that is absent.
    """
    resolved = _resolve(device)
    machine = psutil.virtual_memory()
    return MemoryUsage(
        rss=_resident(),
        available=machine.available,
        total=machine.total,
        gpu=_gpu_memory(resolved) if resolved.type == "cuda" else None,
    )


def clear_memory(device: torch.device | str | None = None) -> int:
    """Frees what nobody refers to any more, and hands it back to the GPU's driver and the operating system.

    Call it between phases, not in a loop: what is handed back has to be asked for again.

    Args:
        device: whose gain is returned; by default the current GPU's, or the CPU's where there is none.

    Returns:
        Bytes given back: reserved memory of a GPU, or resident memory of this process.

    Raises:
        DeviceError: for a GPU that is absent.
    """
    resolved = _resolve(device)
    before = _held(resolved)
    # In this order: only the blocks of tensors that are gone can be handed back.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    _trim_heap()
    return max(0, before - _held(resolved))


class _ResidentPeak:
    """Watches the resident memory of this process, from a thread."""

    def __init__(self) -> None:
        self._highest_before = _highest_resident()
        self.start = self._highest = _resident()
        self._done = threading.Event()
        # A daemon: a block that is never left must not keep the process alive.
        self._thread = threading.Thread(target=self._sample, name="memory-tracker", daemon=True)
        self._thread.start()

    def finish(self) -> tuple[int, int]:
        """Returns what is resident now and the most that was."""
        end = _resident()
        self._done.set()
        self._thread.join()
        highest = _highest_resident()
        recorded = highest if highest > self._highest_before else 0
        return end, max(self._highest, end, recorded)

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._done.wait(_SAMPLE_INTERVAL_S):
            self._highest = max(self._highest, process.memory_info().rss)


def _resolve(device: torch.device | str | None) -> torch.device:
    available = torch.cuda.is_available()
    resolved = torch.device(device if device is not None else "cuda" if available else "cpu")
    if resolved.type == "cuda" and not available:
        raise DeviceError(f"Memory of {resolved} is asked for, and torch finds no CUDA device here; ask for cpu.")
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def _gpu_memory(device: torch.device) -> GpuMemory:
    free, total = torch.cuda.mem_get_info(device)
    return GpuMemory(
        name=torch.cuda.get_device_name(device),
        allocated=torch.cuda.memory_allocated(device),
        reserved=torch.cuda.memory_reserved(device),
        free=free,
        total=total,
    )


def _held(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else _resident()


def _resident() -> int:
    return int(psutil.Process().memory_info().rss)


def _highest_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAX_RSS_UNIT


def _trim_heap() -> None:
    """Has glibc return its free pages.

    It keeps them otherwise: of 100,000 freed tensors of 4 KB each, 420 MB in all, 413 MB stayed resident.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)


def _readable(size: int) -> str:
    amount = float(size)
    for unit in ("B", "KiB", "MiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.2f} GiB"
