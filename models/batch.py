"""A batch: what a loader yields, a trainer consumes, and a dump of a diverged step holds."""

import itertools
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Batch:
    """Samples side by side (B = batch)."""

    inputs: dict[str, Tensor]
    """The model's arguments by name, [B, ...] each."""

    labels: Tensor
    """[B] int64, each an index into the class names."""

    ids: Tensor
    """[B] int64, the samples' places in their split, from 0: they name the samples of a step that went wrong."""

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Self:
        """The same batch on another device; `ids` stay on the CPU."""
        # non_blocking: from pinned memory the copy overlaps with what the device still computes.
        return type(self)(
            inputs={name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()},
            labels=self.labels.to(device, non_blocking=True),
            ids=self.ids,
        )

    def split(self, parts: int) -> list[Self]:
        """The batch in parts whose sizes differ by one at most, fewer when it has fewer samples."""
        bounds = [-(-len(self) * number // parts) for number in range(parts + 1)]
        return [
            type(self)(
                inputs={name: tensor[start:end] for name, tensor in self.inputs.items()},
                labels=self.labels[start:end],
                ids=self.ids[start:end],
            )
            for start, end in itertools.pairwise(bounds)
            if start < end
        ]

    def twice(self) -> Self:
        """Every sample twice: all of them, then all of them again."""
        return type(self)(
            inputs={name: torch.cat((tensor, tensor)) for name, tensor in self.inputs.items()},
            labels=torch.cat((self.labels, self.labels)),
            ids=torch.cat((self.ids, self.ids)),
        )

    def pin_memory(self) -> Self:
        """DataLoader's hook for a type of its own."""
        return type(self)(
            inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()},
            labels=self.labels.pin_memory(),
            ids=self.ids,
        )
