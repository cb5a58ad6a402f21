"""Loaders: from a split to batches, with workers where they pay."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from models.batch import Batch
from models.dataset import Split

_MOST_WORKERS = 4


def build_loader(
    split: Split,
    sampler: Sampler[list[int]],
    collate: Callable[[Sequence[Any]], Batch],
    *,
    device: torch.device,
    workers: int | None = None,
) -> "DataLoader[Any]":
    """Builds the loader of one split.

    What is dropped, shuffled and resumed is the sampler's affair; here it is only about moving samples fast.

    Args:
        split: the samples.
        sampler: yields the indices of each batch.
        collate: makes a batch of samples.
        device: where batches go; for CUDA they are put into pinned memory, from which copies overlap with computing.
        workers: processes that prepare batches; None chooses, see `choose_workers`.

    Returns:
        Yields `Batch`es on the CPU. Its workers live as long as it does: starting them anew for each epoch costs
        seconds.
    """
    count = choose_workers(split) if workers is None else workers
    return DataLoader(
        split,  # type: ignore[arg-type]  # any map-style data set will do
        batch_sampler=sampler,
        collate_fn=collate,
        num_workers=count,
        # Each pass over a loader draws a seed for its workers. Out of torch's global generator it would change the
        # dropout of a training that is resumed inside an epoch.
        generator=torch.Generator().manual_seed(0),
        pin_memory=device.type == "cuda",
        persistent_workers=count > 0,
    )


def choose_workers(split: Split) -> int:
    """None for samples that lie ready in memory: handing them from process to process costs more than making a batch.

    For samples that are read and decoded one by one: the cores that training leaves free, four at most.
    """
    if split.in_memory:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(_MOST_WORKERS, cores - 1))
