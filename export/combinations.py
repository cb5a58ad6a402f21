"""What is offered: formats by precision and device. The rest is refused with the reason and what to use instead."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass

import torch

from export.torch_release import TORCH
from handlers.artifact import DEVICES, FORMATS, PRECISIONS

TRACE = "trace"
SCRIPT = "script"
METHODS = (TRACE, SCRIPT)

_CUDA_PROVIDER = "CUDAExecutionProvider"
_X86 = ("x86_64", "AMD64")
# Packages of earlier releases refuse batches of one; quantised ones have no int8 layers.
_FIRST_WITH_PT2, _FIRST_WITH_INT8_PT2 = (2, 11), (2, 13)

# Precisions by device and format, as measured on the CPU; those of the CUDA side follow what its kernels exist for.
_OFFERED = {
    "cpu": {
        "torchscript": ("fp32", "bf16", "int8"),
        "onnx": ("fp32", "int8"),
        "pt2": ("fp32", "bf16", "int8"),
        "eager": ("fp32", "bf16"),
    },
    "cuda": {
        "torchscript": ("fp32", "fp16", "bf16"),
        "onnx": ("fp32", "fp16"),
        "pt2": ("fp32", "fp16", "bf16"),
        "eager": ("fp32", "fp16", "bf16"),
    },
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Combination:
    """One way to export a model.

    Attributes:
        format: One of :data:`handlers.artifact.FORMATS`.
        precision: One of :data:`handlers.artifact.PRECISIONS`.
        device: One of :data:`handlers.artifact.DEVICES`: where the artifact is made, checked and served.
    """

    format: str
    precision: str
    device: str = "cpu"

    def __str__(self) -> str:
        return f"{self.format} {self.precision} on {self.device}"


def allowed(device: str) -> tuple[Combination, ...]:
    """Every combination that is offered on a device, whether or not this machine has one."""
    return tuple(
        Combination(format=format, precision=precision, device=device)
        for format, precisions in _OFFERED[device].items()
        for precision in precisions
    )


def refusal(combination: Combination, *, method: str = TRACE) -> str | None:
    """Why a combination cannot be had on this machine, and what to use instead.

    What depends on the model, such as whether it has layers that can be quantised, is for the conversion to refuse.

    Args:
        combination: What is asked for.
        method: ``trace`` or ``script``.

    Returns:
        One sentence; None if it can be had.
    """
    return (
        _unknown(combination, method)
        or _wrong_method(combination, method)
        or _not_offered(combination)
        or _too_old(combination)
        or _no_quantiser(combination)
        or (_no_cuda(combination) if combination.device == "cuda" else None)
    )


def _unknown(combination: Combination, method: str) -> str | None:
    for what, value, known in (
        ("format", combination.format, FORMATS),
        ("precision", combination.precision, PRECISIONS),
        ("device", combination.device, DEVICES),
        ("method", method, METHODS),
    ):
        if value not in known:
            return f"the {what} {value!r} is not known; choose one of: {', '.join(known)}"
    return None


def _wrong_method(combination: Combination, method: str) -> str | None:
    if method != SCRIPT or combination.format == "torchscript":
        return None
    how = "keeps the Python module itself" if combination.format == "eager" else "goes through torch.export"
    return (
        f"--method script is a way to make TorchScript, and {combination.format} {how}; "
        "leave --method away or use --format torchscript"
    )


def _not_offered(combination: Combination) -> str | None:
    format, precision, device = combination.format, combination.precision, combination.device
    if precision in _OFFERED[device][format]:
        return None
    if precision == "fp16":
        return (
            "fp16 on a CPU is not offered: processors convert every fp16 number to fp32 and back, so it is slower "
            f"than fp32; use --precision {'int8' if format == 'onnx' else 'bf16'}, or --device cuda"
        )
    if precision == "bf16":
        instead = "fp16" if device == "cuda" else "int8"
        return (
            "bf16 ONNX is not offered: ONNX Runtime lacks bf16 kernels for most operators; "
            f"use --precision {instead}, or --format torchscript for bf16"
        )
    if device == "cuda":
        return (
            "int8 on CUDA is not offered: dynamic quantisation has no CUDA kernels and would silently run on the CPU, "
            "and static quantisation pays only with TensorRT; "
            f"use --precision {'fp16' if format == 'onnx' else 'fp16 or bf16'}, or --device cpu"
        )
    return (
        f"int8 {format} is not offered: PyTorch's int8 layers cannot be loaded as a state_dict; "
        "use --format torchscript, onnx or pt2 for int8, or --precision bf16"
    )


def _too_old(combination: Combination) -> str | None:
    first = _FIRST_WITH_INT8_PT2 if combination.precision == "int8" else _FIRST_WITH_PT2
    if combination.format != "pt2" or first <= TORCH:
        return None
    what, instead = ("int8 pt2", " for int8") if combination.precision == "int8" else ("pt2", " or --format eager")
    return (
        f"{what} needs torch {first[0]}.{first[1]} or newer, and this is {torch.__version__}; "
        f"use --format torchscript or --format onnx{instead}"
    )


def _no_quantiser(combination: Combination) -> str | None:
    if (combination.format, combination.precision) != ("pt2", "int8"):
        return None
    if platform.machine() not in _X86:
        return (
            f"int8 pt2 is made of kernels for x86 processors, and this machine's is {platform.machine()}; "
            "use --format torchscript or --format onnx for int8"
        )
    if importlib.util.find_spec("torchao") is None:
        return (
            "int8 pt2 is quantised by torchao, which is not installed here; run `pip install 'torchport[pt2e]'`, or "
            "use --format torchscript or --format onnx for int8"
        )
    return None


def _no_cuda(combination: Combination) -> str | None:
    if not torch.cuda.is_available():
        return (
            f"--device cuda asks for a GPU, and torch {torch.__version__} finds none on this machine; "
            "use --device cpu, or export where the GPU is"
        )
    if combination.format == "onnx" and not _has_cuda_provider():
        return (
            "--device cuda asks for ONNX Runtime on a GPU, and the one installed here has no CUDA provider; "
            "install onnxruntime-gpu in place of onnxruntime, or use --format torchscript"
        )
    return None


def _has_cuda_provider() -> bool:
    if importlib.util.find_spec("onnxruntime") is None:
        return False
    import onnxruntime  # noqa: PLC0415  # slow to import, and only this question needs it

    return _CUDA_PROVIDER in onnxruntime.get_available_providers()
