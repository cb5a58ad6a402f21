"""The device that a recipe asks for."""

import torch

from models.errors import DeviceError


def resolve_device(name: str) -> torch.device:
    """Turns "auto", "cpu" or "cuda" into a device this machine has.

    Raises:
        DeviceError: when CUDA is asked for and absent.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("trainer.device is cuda, and torch finds no CUDA device here; use -s trainer.device=cpu.")
    return torch.device(name)
