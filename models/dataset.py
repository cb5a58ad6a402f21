"""A data set in three splits, and all that a training needs to know of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from models.batch import Batch


class Split(Protocol):
    """Labelled samples, by index; a map-style data set for `torch.utils.data.DataLoader`."""

    labels: npt.NDArray[np.int64]
    """[N], each an index into the class names."""

    lengths: npt.NDArray[np.int64] | None
    """[N] tokens a sample, for batches of similar lengths; None when all samples have the same size."""

    in_memory: bool
    """Whether a sample lies ready in memory, or is read and decoded when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """One sample, as the data set's `collate` takes it."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Dataset:
    """What a training needs to know of its data."""

    train: Split
    """What the weights learn from."""

    validation: Split
    """What chooses the best epoch."""

    held_out: Split
    """What measures the finished model, and nothing else."""

    class_names: tuple[str, ...]
    """Index i names class i."""

    collate: Callable[[Sequence[Any]], Batch]
    """Makes one batch of some samples; it can be pickled, for loader workers."""

    model_arguments: Mapping[str, Any]
    """What the data decides about the model: channels and classes, or vocabulary and longest text."""

    signature: Mapping[str, Any]
    """What a model trained on it takes and returns; see `models.signature`."""

    evaluation: Mapping[str, Any]
    """`source`, an import path, and `options`: a function that yields the held-out samples as a client has them."""

    digest: str
    """SHA-256 of the samples and labels of all splits: two runs with the same digest saw the same data."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    """What has to be kept beside the weights, by file name: a text data set's tokenizer.json."""

    skipped_rows: int = 0
    """Rows left out because they were bad, when the recipe allows it."""
