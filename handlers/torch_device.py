"""Between NumPy arrays and torch tensors on the device of an artifact."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from handlers.errors import BackendError
from handlers.tensors import Array, TensorBatch, TensorSpec


def torch_device(name: str) -> torch.device:
    """The device that an artifact names.

    Raises:
        BackendError: If it is a GPU and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            "the artifact runs on a CUDA GPU, and torch finds none here; "
            "export it with --device cpu, or serve it where there is one"
        )
    return torch.device(name)


def check_device(tensors: Iterable[torch.Tensor], device: torch.device) -> None:
    """Refuse a module whose weights have not gone where they were sent.

    Raises:
        BackendError: If one lies elsewhere.
    """
    astray = next((tensor.device for tensor in tensors if tensor.device.type != device.type), None)
    if astray is not None:
        raise BackendError(f"the artifact's weights lie on {astray} instead of {device}; export it for {device} again")


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
    if len(outputs) != len(specs):
        raise BackendError(
            f"the artifact gives {len(outputs)} tensors and the signature names {len(specs)}; export it again"
        )
    return {spec.name: _array(tensor) for spec, tensor in zip(specs, outputs, strict=True)}


def _array(tensor: torch.Tensor) -> Array:
    # NumPy has no bfloat16; halves are cast as well, so that all precisions give one dtype.
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    array: Array = tensor.detach().cpu().numpy()
    return array
