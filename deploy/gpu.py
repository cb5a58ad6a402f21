"""The GPUs of this machine and what they are doing, read from NVIDIA's driver.

TorchServe 0.12 reads its GPU metrics with the packages nvgpu and pynvml, which it does not install. Without them its
collector ends in a traceback every minute, and gives no metrics at all, not even the CPU's. ``python -m deploy.gpu``
stands in for that collector (``system_metrics_cmd``). It asks the driver's own library (NVML) through ctypes, or the
command nvidia-smi where that library is not found, and never torch, which would take a context of some hundred MiB on
every GPU.
"""

from __future__ import annotations

import ctypes
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

_LIBRARIES = ("libnvidia-ml.so.1", "/usr/local/nvidia/lib64/libnvidia-ml.so.1")
_NVIDIA_SMI = "nvidia-smi"
_SMI_QUERY = "index,name,utilization.gpu,memory.used,memory.total"
_TIMEOUT_S = 10
_MIB = 2**20
_NAME_LENGTH = 96


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU, as the driver sees it.

    Attributes:
        index: The driver's number, which nvidia-smi shows too. CUDA may count otherwise where GPUs differ.
        name: Its model.
        utilisation_percent: Share of the last moment in which it computed anything; None where it cannot say, as a
            slice of a GPU (MIG) cannot.
        memory_used_mib: Memory in use, by whomever; None where it cannot say.
        memory_total_mib: Memory that it has; None where it cannot say.
    """

    index: int
    name: str
    utilisation_percent: float | None
    memory_used_mib: float | None
    memory_total_mib: float | None


def read_gpus() -> list[Gpu]:
    """All GPUs of this machine; none where there is no driver, or it does not answer."""
    for name in _LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        gpus = _from_nvml(library)
        if gpus is not None:
            return gpus
    return _from_nvidia_smi()


class _Utilisation(ctypes.Structure):
    """nvmlUtilization_t."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _from_nvml(library: Any) -> list[Gpu] | None:
    """What the driver's library says; None if it does not work. Its functions give 0 when they have succeeded."""
    if library.nvmlInit_v2() != 0:
        return None
    try:
        count = ctypes.c_uint()
        if library.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return None
        return [_device(library, index) for index in range(count.value)]
    finally:
        library.nvmlShutdown()


def _device(library: Any, index: int) -> Gpu:
    handle = ctypes.c_void_p()
    name = ctypes.create_string_buffer(_NAME_LENGTH)
    utilisation, memory = _Utilisation(), _Memory()
    found = library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) == 0
    named = found and library.nvmlDeviceGetName(handle, name, ctypes.c_uint(_NAME_LENGTH)) == 0
    used = found and library.nvmlDeviceGetUtilizationRates(handle, ctypes.byref(utilisation)) == 0
    held = found and library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
    return Gpu(
        index=index,
        name=name.value.decode(errors="replace") if named else "",
        utilisation_percent=float(utilisation.gpu) if used else None,
        memory_used_mib=memory.used / _MIB if held else None,
        memory_total_mib=memory.total / _MIB if held else None,
    )


def _from_nvidia_smi() -> list[Gpu]:
    try:
        done = subprocess.run(
            [_NVIDIA_SMI, f"--query-gpu={_SMI_QUERY}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[field.strip() for field in line.split(",")] for line in done.stdout.splitlines()]
    # A warning may stand among the lines.
    return [
        Gpu(
            index=int(row[0]),
            name=row[1],
            utilisation_percent=_number(row[2]),
            memory_used_mib=_number(row[3]),
            memory_total_mib=_number(row[4]),
        )
        for row in rows
        if len(row) == len(_SMI_QUERY.split(",")) and row[0].isdecimal()
    ]


def _number(text: str) -> float | None:
    """A figure of nvidia-smi, which writes ``[N/A]`` for what it cannot say."""
    try:
        return float(text)
    except ValueError:
        return None


def collector_command() -> str:
    """What TorchServe starts its Python with every time it wants metrics. It splits that at every space."""
    path = str(Path(__file__).resolve())
    # By its path: not every checkout is installed, and TorchServe starts it in a folder of its own.
    return "-P -m deploy.gpu" if any(map(str.isspace, path)) else f"-P {path}"


def metric_lines(gpus: Iterable[Gpu], *, host: str, timestamp_s: int) -> Iterator[str]:
    """The metrics as TorchServe's frontend parses them, under the names that its own collector gives them."""
    for gpu in gpus:
        used, total = gpu.memory_used_mib, gpu.memory_total_mib
        share = None if used is None or not total else 100 * used / total
        for name, unit, value in (
            ("GPUUtilization", "Percent", gpu.utilisation_percent),
            ("GPUMemoryUtilization", "Percent", share),
            ("GPUMemoryUsed", "Megabytes", used),
        ):
            if value is not None:
                yield f"{name}.{unit}:{value:.2f}|#Level:Host,device_id:{gpu.index}|#hostname:{host},{timestamp_s}"


def worker_lines(pids: Sequence[str]) -> Iterator[str]:
    """Resident bytes of each worker, which TorchServe shows in its management API."""
    for pid in pids:
        try:
            yield f"{pid}:{psutil.Process(int(pid)).memory_info().rss}"
        except (ValueError, psutil.Error):  # it ended just now
            continue


def main() -> None:
    """Stand in for TorchServe's collector: read the workers' process ids, print metrics and what each worker holds."""
    pids = sys.stdin.readline().strip().split(",")
    for line in metric_lines(read_gpus(), host=socket.gethostname(), timestamp_s=int(time.time())):
        print(line)
    print()
    for line in worker_lines(pids):
        print(line)


if __name__ == "__main__":
    main()
