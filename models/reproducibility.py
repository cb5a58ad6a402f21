"""One seed, one result: the random generators and the algorithms of torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def reproducible(seed: int, device: torch.device, *, threads: int) -> Iterator[None]:
    """Seeds torch, allows deterministic algorithms only, and fixes the threads; undoes it afterwards.

    Args:
        seed: of all of torch's global generators.
        device: where the block computes.
        threads: the number decides in what order a sum is added up, and so its last bits.
    """
    cuda = [torch.cuda.current_device() if device.index is None else device.index] if device.type == "cuda" else []
    if cuda:
        # cuBLAS is deterministic only with a fixed workspace, and reads this when it starts:
        # https://docs.nvidia.com/cuda/cublas/#results-reproducibility
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    enabled = torch.are_deterministic_algorithms_enabled()
    threads_before = torch.get_num_threads()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(seed)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(True)
        try:
            yield
        finally:
            torch.set_num_threads(threads_before)
            torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Where torch's global generators stand."""
    on_cuda = device.type == "cuda"
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state(device) if on_cuda else None}


def restore_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Continues from where `rng_state` was called."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
