"""Several training processes: who is who, how their figures are added up, and how they are started.

Processes are started by torchrun's own launcher and hold the same weights, kept equal by DistributedDataParallel.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from models.errors import LaunchError


@dataclass(frozen=True, kw_only=True, slots=True)
class Processes:
    """This process among those of one training."""

    rank: int = 0
    """From 0; process 0 writes, all of them compute."""

    local_rank: int = 0
    """On this machine: the number of its GPU."""

    world_size: int = 1
    """How many there are."""

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and reports."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all processes, on each of them; `value` stays as it is."""
        total = value.clone()
        if self.world_size > 1:
            dist.all_reduce(total)
        return total

    def gather(self, value: Any) -> list[Any]:
        """One value of each process, by rank, on each of them; anything that can be pickled."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_main(self, value: Any) -> Any:
        """The value of process 0, on each of them."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model whose backward pass averages gradients over all processes; the model itself if there is only one.

        On GPUs batch normalisation then counts the whole batch; on CPUs torch cannot, and each process normalises its
        own share.
        """
        if self.world_size == 1:
            return model
        if device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
        return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


ALONE = Processes()


def read_processes() -> Processes:
    """This process as torchrun's variables describe it; alone without them.

    Launchers for one process a machine leave LOCAL_RANK out.

    Raises:
        LaunchError: naming the variable that is missing or wrong.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return ALONE
    processes = Processes(
        rank=_read_count("RANK"), local_rank=_read_count("LOCAL_RANK", "0"), world_size=_read_count("WORLD_SIZE")
    )
    if processes.rank >= processes.world_size:
        raise LaunchError(
            f"The environment variable RANK is {processes.rank}, and WORLD_SIZE is {processes.world_size}; ranks "
            f"count from 0, so start the processes with torchport train --nproc, or unset both."
        )
    return processes


def _read_count(name: str, default: str | None = None) -> int:
    text = os.environ.get(name, default)
    remedy = "start the processes with torchport train --nproc or torchrun, or unset RANK and WORLD_SIZE"
    if text is None:
        raise LaunchError(f"The environment variable {name} is missing where RANK or WORLD_SIZE is set; {remedy}.")
    if not (text.isascii() and text.isdigit()):
        raise LaunchError(f"The environment variable {name} is {text[:40]!r}, which is no whole number; {remedy}.")
    return int(text)


@contextmanager
def process_group(processes: Processes, device: torch.device) -> Iterator[None]:
    """Connects the processes for the length of the block: NCCL between GPUs, gloo between CPUs."""
    if processes.world_size == 1:
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()
