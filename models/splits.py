"""Stratified, seeded splits: each holds the classes in the same proportions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import train_test_split

from models.errors import DataError

IntArray = npt.NDArray[np.int64]

SplitName = Literal["train", "validation", "held_out"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SplitIndices:
    """Which samples make up each split; no sample is in two."""

    train: IntArray

    validation: IntArray

    held_out: IntArray


def stratified_splits(
    labels: IntArray, class_names: Sequence[str], *, seed: int, held_out_fraction: float, validation_fraction: float
) -> SplitIndices:
    """Splits samples in three.

    Args:
        labels: [N], each an index into `class_names`.
        class_names: for messages.
        seed: chooses the splits; the same seed gives the same splits.
        held_out_fraction: share of all samples kept for the final measurement.
        validation_fraction: share of the rest that chooses the best epoch.

    Raises:
        DataError: when a class has too few samples to be split, or a split would be too small to hold every class.
    """
    everything = np.arange(len(labels))
    development, held_out = divide(everything, labels, class_names, share=held_out_fraction, seed=seed)
    train, validation = divide(development, labels, class_names, share=validation_fraction, seed=seed)
    return SplitIndices(train=train, validation=validation, held_out=held_out)


def divide(
    indices: IntArray, labels: IntArray, class_names: Sequence[str], *, share: float, seed: int
) -> tuple[IntArray, IntArray]:
    """Takes a stratified share of some samples.

    Args:
        indices: the samples to divide.
        labels: [N] of all samples, each an index into `class_names`.
        class_names: for messages.
        share: of `indices`, in (0, 1).
        seed: chooses which.

    Returns:
        The rest, and the share taken.

    Raises:
        DataError: as in `stratified_splits`.
    """
    if not 0 < share < 1:
        raise DataError(f"A split's share is {share}; it must lie between 0 and 1.")
    counts = np.bincount(labels[indices], minlength=len(class_names))
    rarest = int(counts.argmin())
    if counts[rarest] < 2:
        raise DataError(
            f"The class {class_names[rarest]!r} has too few samples to be split ({counts[rarest]} left); add some, "
            "leave the class out, or check which column holds the labels."
        )
    smaller = min(int(np.ceil(share * len(indices))), int((1 - share) * len(indices)))
    if smaller < len(class_names):
        raise DataError(
            f"{share:.0%} of {len(indices)} samples cannot hold all {len(class_names)} classes; "
            "add samples or change the fractions."
        )
    rest, taken = train_test_split(indices, test_size=share, random_state=seed, stratify=labels[indices])
    return rest, taken
