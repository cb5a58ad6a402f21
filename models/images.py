"""Labelled images in memory, split for training."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelledImages:
    """Images and their classes, index by index."""

    images: npt.NDArray[np.uint8]
    """[N, H, W] for grey images, [N, H, W, 3] for RGB; pixels 0..255."""

    labels: npt.NDArray[np.int64]
    """[N], each an index into the class names."""

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ImageDataset:
    """Three disjoint splits of one data set, and how its pixels are normalised."""

    train: LabelledImages
    """What the weights learn from."""

    validation: LabelledImages
    """What chooses the best epoch."""

    held_out: LabelledImages
    """What measures the finished model, and nothing else."""

    class_names: tuple[str, ...]
    """Index i names class i."""

    mean: tuple[float, ...]
    """Per channel, of pixel / 255 over `train`."""

    std: tuple[float, ...]
    """Per channel, of pixel / 255 over `train`."""

    @property
    def height(self) -> int:
        """Pixels."""
        return int(self.train.images.shape[1])

    @property
    def width(self) -> int:
        """Pixels."""
        return int(self.train.images.shape[2])

    @property
    def channels(self) -> int:
        """1 for grey, 3 for RGB."""
        return len(self.mean)

    def to_tensors(self, split: LabelledImages) -> tuple[Tensor, Tensor]:
        """Normalises a split for the model.

        Returns:
            Images [N, C, H, W] float32, (pixel / 255 - mean) / std, and labels [N] int64.
        """
        pixels = torch.from_numpy(split.images).to(torch.float32)
        channels_last = pixels.reshape(len(split), self.height, self.width, self.channels)
        scaled = channels_last.permute(0, 3, 1, 2).contiguous() / 255
        mean = torch.tensor(self.mean, dtype=torch.float32).view(1, -1, 1, 1)
        std = torch.tensor(self.std, dtype=torch.float32).view(1, -1, 1, 1)
        return (scaled - mean) / std, torch.from_numpy(split.labels)


def pixel_statistics(images: npt.NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixel / 255, per channel.

    Args:
        images: [N, H, W] or [N, H, W, C] uint8.
    """
    channels = images.shape[3] if images.ndim == 4 else 1
    scaled = images.reshape(-1, channels).astype(np.float64) / 255
    return tuple(scaled.mean(axis=0).tolist()), tuple(scaled.std(axis=0).tolist())
