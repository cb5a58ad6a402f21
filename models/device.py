"""The device that a recipe asks for."""

import torch

from models.errors import DeviceError


def resolve_device(name: str, *, local_rank: int = 0) -> torch.device:
    """Turns "auto", "cpu" or "cuda" into a device this machine has.

    Args:
        name: what the recipe says.
        local_rank: of several processes on this machine, each gets a GPU of its own.

    Raises:
        DeviceError: when CUDA is asked for and absent.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("trainer.device is cuda, and torch finds no CUDA device here; use -s trainer.device=cpu.")
    if name == "cpu":
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise DeviceError(
            f"Process {local_rank} has no GPU of its own, for there are {torch.cuda.device_count()}; lower --nproc."
        )
    return torch.device("cuda", local_rank)
