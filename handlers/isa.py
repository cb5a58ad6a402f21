"""The instruction sets of this machine's processor: what code compiled for one machine must find on another.

torch Inductor compiles with ``-march=native``, so its code may use every instruction of the machine that compiled it,
not only those of the vector width it names (``AVX512``). And it finds that name by compiling and running small
programs, which takes seconds and a compiler. Both speak for asking the processor itself.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable
from pathlib import Path

import torch

# Used only where code asks for them by name: no compiler chooses them for arithmetic.
_NEVER_CHOSEN = frozenset({"aes", "sha", "clflush", "clflushopt", "clwb", "sse4a"})

# What Linux tells of a processor, and the sets of instructions among it.
_CPUINFO = Path("/proc/cpuinfo")
_FLAGS = re.compile(r"^(?:flags|Features)\s*:(.*)$", re.MULTILINE)
_SETS = re.compile(r"(avx|amx|sse|ssse|fma|bmi|sve|sme|asimd|i8mm|bf16)\w*|f16c|popcnt|abm|fphp")


def cpu_isa() -> str:
    """The architecture and its instruction sets, one word each, such as ``x86_64 avx avx2 fma3``.

    Words of different releases of torch differ; whoever compares them compares the releases first.
    """
    if not hasattr(torch.cpu, "get_capabilities"):  # as in 2.9
        return " ".join([platform.machine(), *_sets_of_linux()])
    capabilities = torch.cpu.get_capabilities()
    sets = sorted(name for name, value in capabilities.items() if value is True and name not in _NEVER_CHOSEN)
    return " ".join([str(capabilities.get("architecture", "unknown")), *sets])


def _sets_of_linux() -> Iterable[str]:
    """As the kernel calls them; none on another system."""
    text = _CPUINFO.read_text(encoding="utf-8", errors="replace") if _CPUINFO.is_file() else ""
    flags = _FLAGS.search(text)
    words = set(flags[1].split()) if flags else set()
    return sorted(word for word in words if _SETS.fullmatch(word) and word not in _NEVER_CHOSEN)


def missing_isa(required: str) -> list[str]:
    """What this machine's processor lacks of an instruction set that :func:`cpu_isa` named elsewhere."""
    present = set(cpu_isa().split())
    return [word for word in required.split() if word not in present]


def cuda_capability() -> str | None:
    """The compute capability of this machine's first GPU, such as ``9.0``; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(0)
    return f"{major}.{minor}"
