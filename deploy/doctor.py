"""The doctor: what this machine has, what is missing, and how to get it. Everything it says it has tried."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from deploy.errors import JavaError
from deploy.java import REMEDY, find_java
from deploy.ports import is_free
from deploy.provider_probe import TORCH

_MINIMUM_PYTHON = (3, 11)
_PACKAGES = ("torch", "torchserve", "torch-model-archiver", "onnx", "onnxscript", "tokenizers", "locust")
_PORTS = {8080: "inference", 8081: "management", 8082: "metrics", 8083: "gRPC inference", 8084: "gRPC management"}
_PROBE_TIMEOUT_S = 120
_INSTALL = "run `make install` in torchport's folder"
_TOO_LATE = "it did not start within"
_DRIVER = "check with `nvidia-smi` that the driver works and supports this torch's CUDA; everything works on the CPU"
_GIB = 2**30
# Providers of the onnxruntime-gpu wheel that torchport has no use for are listed by ONNX Runtime too.
_PROVIDERS = ("CPUExecutionProvider", "CUDAExecutionProvider")
# A library that the dynamic linker misses, or what CUDA itself answered.
_CAUSE = re.compile(r"lib[\w.+-]+: cannot open shared object file[^\n]*|CUDA failure \d+: [^;\n]*")
_COLOUR_CODES = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing looked at.

    Attributes:
        what: What was looked at.
        status: ``ok``, ``absent`` (works without), or ``missing`` (torchport cannot do its work).
        detail: What was found, or why not.
        remedy: How to get it; empty when nothing is to be done.
    """

    what: str
    status: str
    detail: str
    remedy: str = ""

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def examine() -> Iterator[Finding]:
    """Look at everything, one finding after the other."""
    yield _python()
    for package in _PACKAGES:
        yield _package(package)
    yield _java()
    gpu = _gpu()
    yield gpu
    if gpu.status == "ok":
        yield from _each_gpu()
    yield from _onnx_runtime()
    for port, purpose in _PORTS.items():
        yield _port(port, purpose)


def _python() -> Finding:
    detail = f"{platform.python_version()} ({platform.system()} {platform.machine()}, {os.cpu_count()} cores)"
    if sys.version_info >= _MINIMUM_PYTHON:
        return Finding(what="Python", status="ok", detail=detail)
    return Finding(what="Python", status="missing", detail=detail, remedy="install Python 3.11 or newer")


def _package(name: str) -> Finding:
    try:
        return Finding(what=name, status="ok", detail=metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(what=name, status="missing", detail="not installed", remedy=_INSTALL)


def _java() -> Finding:
    try:
        java = find_java()
    except JavaError as error:
        return Finding(what="Java", status="missing", detail=str(error), remedy=f"run `{REMEDY}`")
    return Finding(what="Java", status="ok", detail=f"{java.version}, from {java.source}")


def _gpu() -> Finding:
    try:
        import torch  # noqa: PLC0415  # takes seconds to import, and may be missing
    except Exception as error:  # a broken installation fails in any way
        return _does_not_import("torch", error)
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return Finding(what="GPU", status="ok", detail=f"{', '.join(names)} (CUDA {torch.version.cuda})")
    if torch.version.cuda is None:
        return Finding(
            what="GPU",
            status="absent",
            detail=f"torch {torch.__version__} is a build for CPUs only",
            remedy="on a machine with an NVIDIA GPU, install a CUDA build of torch",
        )
    return Finding(
        what="GPU",
        status="absent",
        detail=f"torch {torch.__version__} finds no NVIDIA driver or device",
        remedy="check with `nvidia-smi`; everything works on the CPU meanwhile",
    )


def _each_gpu() -> Iterator[Finding]:
    """Let torch compute something on each GPU; see :mod:`deploy.provider_probe`."""
    answer, reason = _probe(TORCH)
    if answer is None:
        yield Finding(what="GPU 0", status="absent", detail=f"torch computes nothing there: {reason}", remedy=_DRIVER)
        return
    for index, gpu in enumerate(answer["gpus"]):
        memory = f"{gpu['free'] / _GIB:.1f} of {gpu['total'] / _GIB:.1f} GiB free"
        found = f"{gpu['name']}, compute capability {gpu['capability']}, {memory}"
        if gpu["right"]:
            yield Finding(what=f"GPU {index}", status="ok", detail=f"{found}; computes a matrix product")
        else:
            yield Finding(
                what=f"GPU {index}",
                status="absent",
                detail=f"{found}; a matrix product came out WRONG",
                remedy="serve nothing on it: leave it out of CUDA_VISIBLE_DEVICES, and have the card looked at",
            )


def _onnx_runtime() -> Iterator[Finding]:
    try:
        import onnxruntime  # noqa: PLC0415  # slow, and may be missing
    except Exception as error:  # a broken installation fails in any way
        yield _does_not_import("ONNX Runtime", error)
        return
    yield Finding(what="ONNX Runtime", status="ok", detail=str(onnxruntime.__version__))
    for provider in _PROVIDERS:
        if provider in onnxruntime.get_available_providers():
            yield _provider(provider)
        else:
            yield _failed_provider(provider, "this build of ONNX Runtime does not contain it")


def _does_not_import(what: str, error: Exception) -> Finding:
    return Finding(what=what, status="missing", detail=f"does not import: {error}", remedy=_INSTALL)


def _provider(provider: str) -> Finding:
    """Start a provider for real; see :mod:`deploy.provider_probe`."""
    answer, reason = _probe(provider)
    if reason is not None and reason.startswith(_TOO_LATE):
        return _failed_provider(provider, reason)
    providers = [] if answer is None else answer["providers"]
    if answer is None or providers[:1] != [provider]:
        instead = f"; ONNX Runtime would silently use {providers[0]} instead" if providers else ""
        return _failed_provider(provider, f"cannot start: {reason}{instead}")
    if answer.get("wrong"):
        places = ", ".join(f"GPU {index}" for index in answer["wrong"]) if answer.get("gpus") else "here"
        return _failed_provider(provider, f"computes a tiny graph WRONG ({places})")
    everywhere = f" on each of {answer['gpus']} GPUs" if answer.get("gpus", 0) > 1 else ""
    return Finding(what=provider, status="ok", detail=f"computes a tiny graph{everywhere}")


def _probe(name: str) -> tuple[dict[str, Any] | None, str | None]:
    """Run a probe in a process of its own.

    Returns:
        Its answer, None if it gave none; and what it wrote of a failure, whether or not there is an answer.
    """
    try:
        done = subprocess.run(
            # -P: a folder deploy/ where the user stands must not be taken for ours.
            [sys.executable, "-P", "-m", "deploy.provider_probe", name],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"{_TOO_LATE} {_PROBE_TIMEOUT_S} s"
    lines = done.stdout.strip().splitlines()
    crash = f" (its process ended by {_signal_name(-done.returncode)})" if done.returncode < 0 else ""
    answer = json.loads(lines[-1]) if done.returncode == 0 and lines else None
    return answer, f"{_reason(done.stderr)}{crash}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _failed_provider(provider: str, detail: str) -> Finding:
    if provider == "CPUExecutionProvider":
        return Finding(what=provider, status="missing", detail=detail, remedy=_INSTALL)
    return Finding(
        what=provider,
        status="absent",
        detail=detail,
        remedy="needs an NVIDIA GPU and driver, onnxruntime-gpu, and the CUDA libraries of a CUDA build of torch",
    )


def _reason(stderr: str) -> str:
    """The cause among what the probe wrote: a library that is missing, else Python's error, else its first line."""
    text = _COLOUR_CODES.sub("", stderr)
    match = _CAUSE.search(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if match:
        return match.group(0)
    if not lines:
        return "it gave no reason"
    return lines[-1] if any(line.startswith("Traceback") for line in lines) else lines[0]


def _port(port: int, purpose: str) -> Finding:
    what = f"port {port} ({purpose})"
    if is_free(port):
        return Finding(what=what, status="ok", detail="free")
    return Finding(what=what, status="absent", detail="in use", remedy="choose another with `torchport serve --port`")
