"""Between NumPy arrays and torch tensors on the device of an artifact."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from handlers.errors import BackendError
from handlers.tensors import Array, TensorBatch, TensorSpec
from handlers.visible_gpus import VARIABLE


def torch_device(name: str, gpu: int | None = None) -> torch.device:
    """The device that an artifact names.

    Args:
        name: ``cpu`` or ``cuda``.
        gpu: Which GPU, as torch numbers them; None for torch's current one. Nothing to a CPU.

    Returns:
        The device; that of a GPU has an index. This process computes fp32 on GPUs without TF32 from then on, and
        attention without cuDNN.

    Raises:
        BackendError: If it is a GPU and there is none, or none of that number.
    """
    if name != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        hidden = f" ({VARIABLE} is {os.environ[VARIABLE]})" if os.environ.get(VARIABLE) else ""
        raise BackendError(
            f"the artifact runs on a CUDA GPU, and torch finds none here{hidden}; "
            "export it with --device cpu, or serve it where there is one"
        )
    index = torch.cuda.current_device() if gpu is None else gpu
    count = torch.cuda.device_count()
    if not 0 <= index < count:
        raise BackendError(
            f"this worker is to run on GPU {index}, and torch finds {count} here, numbered from 0; "
            "correct deviceIds in model-config.yaml, number_of_gpu in config.properties or CUDA_VISIBLE_DEVICES"
        )
    compute_fp32_exactly()
    # cuDNN plans attention for every new shape, for some ten milliseconds, and has none for one key. The others do not.
    torch.backends.cuda.enable_cudnn_sdp(False)
    return torch.device(name, index)


def compute_fp32_exactly() -> None:
    """Let this process compute fp32 on GPUs without TF32.

    By default convolutions round their inputs to 10 bits, which no gate of fp32 would pass.
    """
    with warnings.catch_warnings():
        # Some releases ask for another way to say it, which is not to be mixed with this one; torch itself reads these.
        warnings.simplefilter("ignore", UserWarning)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False


def check_device(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Refuse a module whose weights have not gone where they were sent, the number of the GPU included.

    Raises:
        BackendError: If one lies elsewhere.
    """
    astray = next((tensor.device for tensor in tensors if tensor.device != device), None)
    if astray is not None:
        raise BackendError(
            f"the artifact's weights lie on {astray} instead of {device}; export it for {device.type} again"
        )


def free_cached(device: torch.device) -> None:
    """Give the memory of a GPU back that torch keeps for later tensors."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def to_torch(batch: TensorBatch, specs: Sequence[TensorSpec], device: torch.device) -> list[torch.Tensor]:
    """The arrays of a batch as tensors, in the order of the signature.

    They are copies: a module that works in place must not change what a retry would run on. Their rows lie one after
    the other, whatever the arrays' do (pictures come with their channels last): compiled code takes no other layout.
    """
    return [torch.from_numpy(np.array(batch[spec.name], order="C")).to(device) for spec in specs]


def to_numpy(outputs: Sequence[torch.Tensor], specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """The tensors that a model gave as arrays, by name.

    Raises:
        BackendError: If there are fewer or more than the signature says.
    """
    check_count(outputs, specs)
    return {spec.name: _array(tensor) for spec, tensor in zip(specs, outputs, strict=True)}


def check_count(outputs: Sequence[torch.Tensor], specs: Sequence[TensorSpec]) -> None:
    """Refuse what a model gave, if it is not one tensor for each output.

    Raises:
        BackendError: If there are fewer or more than the signature says.
    """
    if len(outputs) != len(specs):
        raise BackendError(
            f"the artifact gives {len(outputs)} tensors and the signature names {len(specs)}; export it again"
        )


def widened(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, as float32 if it holds halves: NumPy has no bfloat16, and all precisions give one dtype."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


def _array(tensor: torch.Tensor) -> Array:
    array: Array = widened(tensor).detach().cpu().numpy()
    return array
