"""Scikit-learn's 1,797 real handwritten digits: 8x8 grey images, embedded in the library.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository
(the test part). Each pixel counts the dark dots, 0..16, of a 4x4 cell of the scanned digit.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from models.dataset import Dataset
from models.images import ImageDataset, LabelledImages, pixel_statistics, to_dataset

EVALUATION_SOURCE = "models.digits:evaluation_samples"
"""Import path of `evaluation_samples`, as a checkpoint names it."""

Split = Literal["train", "validation", "held_out"]

_MAX_DOTS = 16


def load_digits_dataset(*, seed: int, held_out_fraction: float = 0.2, validation_fraction: float = 0.1) -> ImageDataset:
    """Loads the digits, scaled to 0..255, in three stratified splits.

    Args:
        seed: chooses the splits; the same seed gives the same splits.
        held_out_fraction: share of all digits kept for the final measurement.
        validation_fraction: share of the rest that chooses the best epoch.
    """
    raw = load_digits()
    pixels = np.rint(raw.images * (255 / _MAX_DOTS)).astype(np.uint8)
    labels = raw.target.astype(np.int64)

    def divide(indices: npt.NDArray[np.int64], share: float) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        rest, taken = train_test_split(indices, test_size=share, random_state=seed, stratify=labels[indices])
        return rest, taken

    def select(indices: npt.NDArray[np.int64]) -> LabelledImages:
        return LabelledImages(images=pixels[indices], labels=labels[indices])

    development, held_out = divide(np.arange(len(labels)), held_out_fraction)
    train, validation = divide(development, validation_fraction)
    mean, std = pixel_statistics(pixels[train])
    return ImageDataset(
        train=select(train),
        validation=select(validation),
        held_out=select(held_out),
        class_names=tuple(str(name) for name in raw.target_names),
        mean=mean,
        std=std,
    )


def build_digits_dataset(*, seed: int, held_out_fraction: float = 0.2, validation_fraction: float = 0.1) -> Dataset:
    """Loads the digits as training takes them; arguments as in `load_digits_dataset`."""
    options = {"seed": seed, "held_out_fraction": held_out_fraction, "validation_fraction": validation_fraction}
    images = load_digits_dataset(
        seed=seed, held_out_fraction=held_out_fraction, validation_fraction=validation_fraction
    )
    return to_dataset(images, evaluation={"source": EVALUATION_SOURCE, "options": options})


def evaluation_samples(
    *,
    seed: int,
    held_out_fraction: float = 0.2,
    validation_fraction: float = 0.1,
    split: Split = "held_out",
) -> Iterator[tuple[npt.NDArray[np.uint8], int]]:
    """Yields the samples a checkpoint's metrics were measured on.

    Args:
        seed: as in `load_digits_dataset`.
        held_out_fraction: as in `load_digits_dataset`.
        validation_fraction: as in `load_digits_dataset`.
        split: the split to yield; only `last.pt` names another than "held_out".

    Yields:
        An image [8, 8] uint8 and its label's index.
    """
    dataset = load_digits_dataset(
        seed=seed, held_out_fraction=held_out_fraction, validation_fraction=validation_fraction
    )
    samples: LabelledImages = getattr(dataset, split)
    for image, label in zip(samples.images, samples.labels, strict=True):
        yield image, int(label)
