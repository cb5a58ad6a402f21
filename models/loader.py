"""Batches of tensors that are already in memory."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


class ShuffledBatches:
    """Batches in a new random order each time it is iterated, without the incomplete last one.

    Shapes (N = samples, B = batch): inputs [N, ...] and labels [N] give batches [B, ...] and [B].
    """

    def __init__(self, inputs: Tensor, labels: Tensor, *, batch_size: int, seed: int) -> None:
        self._inputs = inputs
        self._labels = labels
        self._batch_size = batch_size
        # Its own generator: whatever else draws random numbers, the order stays.
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._labels) // self._batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._labels), generator=self._generator)
        for batch in range(len(self)):
            index = order[batch * self._batch_size : (batch + 1) * self._batch_size]
            yield self._inputs[index], self._labels[index]

    def state_dict(self) -> dict[str, Any]:
        """Where the random order stands."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from where `state_dict` was called."""
        self._generator.set_state(state["generator"])


class OrderedBatches:
    """Every sample once, in order; the last batch may be smaller."""

    def __init__(self, inputs: Tensor, labels: Tensor, *, batch_size: int) -> None:
        self._inputs = inputs
        self._labels = labels
        self._batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self._labels) / self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self._labels), self._batch_size):
            batch = slice(start, start + self._batch_size)
            yield self._inputs[batch], self._labels[batch]
