"""What all compilers need: quiet, a module they can take apart, and one sentence when they fail."""

from __future__ import annotations

import contextlib
import logging
import re
import traceback
import warnings
from collections.abc import Iterator

import torch

from export.errors import ConversionError
from handlers.errors import BackendError

# The root is ONNX Runtime's quantiser, which has none of its own.
_LOGGERS = (
    *("root", "torch.onnx", "torch.export", "torch._export", "torch._dynamo", "torch._inductor", "torch.fx"),
    # What torchao says while it is imported: which of its GPU kernels it does without.
    *("torchao", "torch.utils._pytree"),
)

# Lines that frame what went wrong without saying it.
_NOISE = re.compile(
    r"^(\s*$|Traceback|File \"|The above exception|During handling|Failed to export the model|❌|"
    r"The following (call|operation|error)|[\s~^<>-]+$|- *$)"
)
_DATA_DEPENDENT = ("data-dependent", "data dependent", "Dynamic control flow")
_LONGEST_REASON = 300
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Silence the compilers, record no gradients, and keep PyTorch's transformer layers in one visible piece.

    Its own encoder layers take a short cut in eval mode, a single operator that neither ONNX nor int8 layers know.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    short_cut = torch.backends.mha.get_fastpath_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        torch.backends.mha.set_fastpath_enabled(False)
        with warnings.catch_warnings(), torch.no_grad():
            # torch.jit's deprecation and the exporters' remarks are for their developers, not for our users.
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(short_cut)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def conversion_error(error: Exception, *, format: str, method: str, precision: str = "fp32") -> ConversionError:
    """One sentence for whatever a compiler raised about a user's model.

    Args:
        error: What it raised.
        format: The format asked for.
        method: ``trace``, ``script``, or the name of the exporter.
        precision: The precision asked for.
    """
    if isinstance(error, ConversionError):
        return error
    if isinstance(error, BackendError):  # it knows the model's outputs, and says what to do
        return ConversionError(str(error))
    hint = _remedy(error, format=format, method=method, precision=precision)
    sentence = f"the model cannot be converted to {format} ({method}): {first_line(error)}"
    return ConversionError(f"{sentence}; {hint}" if hint else sentence)


def first_line(error: BaseException) -> str:
    """The first line of an error that says what went wrong."""
    lines = [_ADDRESS.sub("", line).strip() for line in str(error).splitlines() if not _NOISE.match(line)]
    # torch.export announces its constraints, and lists them below that.
    listed = [line.removeprefix("- ") for line in lines if line.startswith("- ")]
    if lines and lines[0].startswith("Constraints violated") and listed:
        lines = listed
    # One sentence of it: what follows is advice to callers of the compiler.
    if not lines:
        return f"{type(error).__name__}{_place(error)}"
    return re.split(r"(?<=[a-z)])\. ", lines[0])[0][:_LONGEST_REASON].rstrip(" .;:")


def _place(error: BaseException) -> str:
    """Where an error without words was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" in {frames[-1].name}" if frames else ""


def _remedy(error: Exception, *, format: str, method: str, precision: str) -> str | None:
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.errno is not None:  # the system's: TorchScript raises some of its own
        return None
    if method == "script":
        return "TorchScript compiles only a part of Python: use --method trace"
    if any(phrase in text for phrase in _DATA_DEPENDENT):
        return (
            "the model's control flow depends on the values of its inputs: write it with torch.where or torch.cond, "
            "or use --format eager"
        )
    if precision == "int8":  # which an eager artifact cannot be
        others = [other for other in ("torchscript", "onnx") if other != format]
        return f"use --format {' or --format '.join(others)}, or --precision fp32"
    if format in ("onnx", "pt2"):
        return "use --format torchscript or --format eager"
    return "use --format eager"
