"""Labelled images in memory, split for training, normalised batch by batch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from models.batch import Batch
from models.dataset import Dataset
from models.digest import sample_digest
from models.errors import DataError
from models.signature import image_classification_signature


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LabelledImages:
    """Images and their classes, index by index."""

    images: npt.NDArray[np.uint8]
    """[N, H, W] for grey images, [N, H, W, 3] for RGB; pixels 0..255."""

    labels: npt.NDArray[np.int64]
    """[N], each an index into the class names."""

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[tuple[npt.NDArray[np.uint8], int]]:
        return zip(self.images, self.labels.tolist(), strict=True)


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


class ImageSample(NamedTuple):
    """One image, as `ImageCollate` takes it."""

    id: int
    """Its place in the split."""

    pixels: npt.NDArray[np.uint8]
    """[H, W] or [H, W, 3]."""

    label: int
    """An index into the class names."""


class ImageSplit:
    """Images in memory; a `models.dataset.Split`.

    They stay bytes until they are in a batch: a quarter of the memory, and normalising takes a few microseconds.
    """

    in_memory = True
    lengths: npt.NDArray[np.int64] | None = None

    def __init__(self, images: LabelledImages) -> None:
        self.labels = images.labels
        self._images = images.images

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> ImageSample:
        return ImageSample(index, self._images[index], int(self.labels[index]))


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageCollate:
    """Makes a normalised batch of samples of one size."""

    mean: tuple[float, ...]
    """Per channel, of pixel / 255."""

    std: tuple[float, ...]
    """Per channel, of pixel / 255."""

    def __call__(self, samples: Sequence[ImageSample]) -> Batch:
        """Stacks and normalises (B = batch, C = channels).

        Returns:
            The input image [B, C, H, W] float32, (pixel / 255 - mean) / std.
        """
        pixels = np.stack([sample.pixels for sample in samples])
        return Batch(
            inputs={"image": normalise(pixels, mean=self.mean, std=self.std)},
            labels=torch.tensor([sample.label for sample in samples], dtype=torch.int64),
            ids=torch.tensor([sample.id for sample in samples], dtype=torch.int64),
        )


def to_dataset(images: ImageDataset, *, evaluation: Mapping[str, Any]) -> Dataset:
    """Makes a trainable data set of images in memory.

    Args:
        images: the splits and their normalisation.
        evaluation: see `Dataset.evaluation`.
    """
    header = [images.class_names, images.height, images.width, images.channels]
    splits = (images.train, images.validation, images.held_out)
    return Dataset(
        train=ImageSplit(images.train),
        validation=ImageSplit(images.validation),
        held_out=ImageSplit(images.held_out),
        class_names=images.class_names,
        collate=ImageCollate(mean=images.mean, std=images.std),
        model_arguments={"in_channels": images.channels, "num_classes": len(images.class_names)},
        signature=image_classification_signature(images),
        evaluation=evaluation,
        digest=sample_digest(header, (((image.tobytes(), label) for image, label in split) for split in splits)),
    )


def normalise(images: npt.NDArray[np.uint8], *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Turns pixels into what models take.

    Args:
        images: [N, H, W], or [N, H, W, C], uint8.
        mean: per channel, of pixel / 255.
        std: per channel, of pixel / 255.

    Returns:
        [N, C, H, W] float32, (pixel / 255 - mean) / std.
    """
    pixels = torch.from_numpy(images).to(torch.float32)
    channels_last = pixels.reshape(*images.shape[:3], len(mean))
    scaled = channels_last.permute(0, 3, 1, 2).contiguous() / 255
    offset = torch.tensor(mean, dtype=torch.float32).view(1, -1, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32).view(1, -1, 1, 1)
    return (scaled - offset) / scale


def pixel_statistics(images: npt.NDArray[np.uint8]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of pixel / 255, per channel.

    Args:
        images: [N, H, W] or [N, H, W, C] uint8.

    Raises:
        DataError: when all pixels of a channel are the same, so that there is nothing to learn from.
    """
    counter = PixelCounter(channels=images.shape[3] if images.ndim == 4 else 1)
    for image in images:
        counter.add(image)
    return counter.statistics()


class PixelCounter:
    """Counts pixel values, image by image: exact statistics of more images than memory holds.

    Args:
        channels: 1 for grey, 3 for RGB.
    """

    def __init__(self, *, channels: int) -> None:
        self._counts = np.zeros((channels, 256), dtype=np.int64)

    def add(self, image: npt.NDArray[np.uint8]) -> None:
        """Counts an image [H, W] or [H, W, C]."""
        for channel, pixels in enumerate(image.reshape(-1, len(self._counts)).T):
            self._counts[channel] += np.bincount(pixels, minlength=256)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of pixel / 255, per channel; raises as `pixel_statistics` does."""
        values = np.arange(256) / 255
        total = self._counts.sum(axis=1)
        mean = self._counts @ values / total
        variance = (self._counts * (values - mean[:, np.newaxis]) ** 2).sum(axis=1) / total
        if (np.count_nonzero(self._counts, axis=1) < 2).any():
            raise DataError("All pixels of the training images are the same; check the images and their colour mode.")
        return tuple(mean.tolist()), tuple(np.sqrt(variance).tolist())
