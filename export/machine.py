"""The machine that measured: what a reader needs to judge its times."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch

from handlers.isa import cpu_isa

_CPUINFO = Path("/proc/cpuinfo")


def describe_machine(device: str) -> dict[str, str]:
    """Processor, instruction sets, cores this process may use, memory, operating system and, if it counts, the GPU."""
    machine = {
        "processor": _processor(),
        "instruction sets": cpu_isa(),
        "cores": f"{_usable_cores()} usable of {os.cpu_count()}",
        "memory": f"{psutil.virtual_memory().total / 2**30:.1f} GiB",
        "system": platform.platform(),
    }
    if device == "cuda":
        machine["GPU"] = torch.cuda.get_device_name()
    return machine


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    if _CPUINFO.exists():
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
