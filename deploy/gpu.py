"""The GPUs of this machine and what they are doing, read from NVIDIA's driver.

TorchServe 0.12 reads its GPU metrics with the packages nvgpu and pynvml, which it does not install. Without them its
collector ends in a traceback every minute, and gives no metrics at all, not even the CPU's. ``python -m deploy.gpu``
stands in for that collector (``system_metrics_cmd``). It asks the driver's own library (NVML) through ctypes, or the
command nvidia-smi where that library is not found, and never torch, which would take a context of some hundred MiB on
every GPU.

A driver in trouble may never return from a call, and its processes may not even be killed. So a server asks the library
in a process of its own, ``python deploy/gpu.py --list``, and goes on without it when its time is over.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

_LIBRARIES = ("libnvidia-ml.so.1", "/usr/local/nvidia/lib64/libnvidia-ml.so.1")
_NVIDIA_SMI = "nvidia-smi"
_SMI_QUERY = "index,name,utilization.gpu,memory.used,memory.total"
_LIST = "--list"
# The collector's, which is started every 15 s.
_TIMEOUT_S = 10.0
# A server's: without NVIDIA's persistence daemon a driver initialises every GPU when it is asked, some seconds each.
_PATIENCE_S = 30.0
_KILL_TIMEOUT_S = 1.0
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
    """All GPUs of this machine; none where there is no driver, or nvidia-smi does not answer.

    The driver's library runs in this process, which waits for it for ever: see :func:`read_gpus_in_time`.
    """
    gpus = _from_libraries(_LIBRARIES)
    if gpus is None:
        with contextlib.suppress(TimeoutError):
            gpus = _from_nvidia_smi(_TIMEOUT_S)
    return gpus or []


def read_gpus_in_time(timeout_s: float = _PATIENCE_S) -> list[Gpu]:
    """All GPUs of this machine, asked from outside of this process; none where there is no driver.

    Args:
        timeout_s: For the driver's library, and as long again for nvidia-smi, which is asked when it says nothing.

    Raises:
        TimeoutError: If one of them is silent for so long, and the other says nothing either: there may be a GPU.
    """
    late: TimeoutError | None = None
    for ask in (_from_child, _from_nvidia_smi):
        try:
            gpus = ask(timeout_s)
        except TimeoutError as error:
            late = error
            continue
        if gpus is not None:
            return gpus
    if late is not None:
        raise late
    return []


class _Utilisation(ctypes.Structure):
    """nvmlUtilization_t."""

    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _from_libraries(names: Sequence[str]) -> list[Gpu] | None:
    """What the first of the driver's libraries that works says; None if none does."""
    for name in names:
        try:
            gpus = _from_nvml(ctypes.CDLL(name))
        except (OSError, AttributeError):  # it is not there; it lacks a function
            continue
        if gpus is not None:
            return gpus
    return None


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


def _from_child(timeout_s: float) -> list[Gpu] | None:
    """What the libraries say in a process of their own; None if none works.

    Raises:
        TimeoutError: If they do not return in time.
    """
    printed = _output([sys.executable, "-P", str(Path(__file__).resolve()), _LIST, *_LIBRARIES], timeout_s)
    listed = None if printed is None else json.loads(printed)
    return None if listed is None else [Gpu(**fields) for fields in listed]


def _from_nvidia_smi(timeout_s: float) -> list[Gpu] | None:
    """What nvidia-smi says; None if it is not there, or fails.

    Raises:
        TimeoutError: If it does not end in time.
    """
    printed = _output([_NVIDIA_SMI, f"--query-gpu={_SMI_QUERY}", "--format=csv,noheader,nounits"], timeout_s)
    if printed is None:
        return None
    rows = [[field.strip() for field in line.split(",")] for line in printed.splitlines()]
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


def _output(command: Sequence[str], timeout_s: float) -> str | None:
    """What a command prints; None if it is not there, or fails.

    Raises:
        TimeoutError: If it does not end in time.
    """
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
    except OSError:
        return None
    try:
        printed, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired as error:
        process.kill()
        # Inside the driver it cannot be killed: subprocess.run would wait for its end.
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_KILL_TIMEOUT_S)
        raise TimeoutError(f"NVIDIA's driver has not answered within {timeout_s:g} s") from error
    return printed if process.returncode == 0 else None


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


def main(arguments: Sequence[str]) -> None:
    """Stand in for TorchServe's collector: read the workers' process ids, print metrics and what each worker holds.

    Args:
        arguments: None; or ``--list`` and the names of libraries, to print in JSON what these say of the GPUs instead.
    """
    if arguments[:1] == [_LIST]:
        gpus = _from_libraries(arguments[1:])
        print(json.dumps(None if gpus is None else [asdict(gpu) for gpu in gpus]))
        return
    pids = sys.stdin.readline().strip().split(",")
    for line in metric_lines(read_gpus(), host=socket.gethostname(), timestamp_s=int(time.time())):
        print(line)
    print()
    for line in worker_lines(pids):
        print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
