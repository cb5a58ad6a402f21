"""The machine and the software that a measurement was made with."""

import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil


def describe_hardware() -> dict[str, str]:
    """Processor, cores this process may use, memory and operating system of this machine."""
    return {
        "processor": _processor_name(),
        "cores": f"{_usable_cores()} usable of {os.cpu_count()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": platform.platform(),
    }


def describe_versions() -> dict[str, str]:
    """Versions of what sends, times and reports."""
    packages = ("torchport", "locust", "gevent", "geventhttpclient", "hdrhistogram")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
