"""How well a classifier does: a confusion matrix, counted batch by batch, and what follows from it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from models.errors import EvaluationError


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassReport:
    """How well one class is told from the others; 0 where a ratio has nothing to divide by."""

    name: str
    """From the data set."""

    precision: float
    """Share of the samples predicted as this class that are of it."""

    recall: float
    """Share of the samples of this class that were predicted as it."""

    f1: float
    """Harmonic mean of precision and recall."""

    support: int
    """Samples of this class."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassificationReport:
    """How well a classifier does on a set of samples."""

    accuracy: float
    """Share of samples whose largest logit is the label's."""

    loss: float
    """Mean cross-entropy, in nats."""

    samples: int
    """How many were measured."""

    macro_f1: float
    """Mean F1 of the classes, each as important as the others."""

    weighted_f1: float
    """Mean F1 of the classes, weighted with their supports."""

    classes: tuple[ClassReport, ...]
    """By index."""

    confusion: tuple[tuple[int, ...], ...]
    """[K, K] counts, rows are the true classes and columns the predicted ones."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        values = asdict(self)
        return {
            **values,
            "classes": list(values["classes"]),
            "confusion": [list(row) for row in self.confusion],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> Self:
        """Reads what `as_dict` gave.

        Raises:
            EvaluationError: when it is something else.
        """
        try:
            classes = tuple(ClassReport(**entry) for entry in document["classes"])
            confusion = tuple(tuple(row) for row in document["confusion"])
            return cls(**{**document, "classes": classes, "confusion": confusion})
        except (KeyError, TypeError) as error:
            raise EvaluationError(
                f"This is not a classification report ({error}); evaluate the model again."
            ) from error


class ConfusionMatrix:
    """Counts predictions and adds up the loss, batch by batch (B = batch, K = classes).

    Sums over processes are sums of `counts` and of `loss_sum`: all-reduce both, in place, before `report`.

    Args:
        class_names: [K], index i names class i.
        device: where the batches are; counting there spares a copy for every batch.
    """

    def __init__(self, class_names: Iterable[str], *, device: torch.device | None = None) -> None:
        self.class_names = tuple(class_names)
        self.counts = torch.zeros(len(self.class_names), len(self.class_names), dtype=torch.int64, device=device)
        """[K, K], rows are the true classes and columns the predicted ones."""
        # float64: the sum stays exact enough for any number of samples, in any order of processes.
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        """[], the cross-entropy of all samples, in nats."""

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Counts one batch.

        Args:
            logits: [B, K], of any floating dtype.
            labels: [B] int64.

        Raises:
            EvaluationError: when the shapes do not fit, or a label is none of the classes.
        """
        size = len(self.class_names)
        if logits.shape != (len(labels), size) or labels.ndim != 1:
            raise EvaluationError(
                f"The logits are {list(logits.shape)} and the labels {list(labels.shape)}, where [B, {size}] and [B] "
                f"are expected; give the model {size} outputs."
            )
        if len(labels) == 0:
            return
        lowest, highest = (int(value) for value in torch.aminmax(labels))
        if lowest < 0 or highest >= size:
            raise EvaluationError(
                f"The labels run from {lowest} to {highest}, and there are {size} classes, 0 to {size - 1}; "
                "check the data."
            )
        flat = torch.bincount(labels * size + logits.argmax(dim=1), minlength=size * size)
        self.counts += flat.view(size, size).to(self.counts.device)
        # In half precision the sum of a batch would lose digits, or overflow.
        self.loss_sum += F.cross_entropy(logits.float(), labels, reduction="sum").to(self.loss_sum.device)

    def report(self) -> ClassificationReport:
        """What the counts say.

        Raises:
            EvaluationError: when nothing was counted.
        """
        counts = self.counts.cpu()
        samples = int(counts.sum())
        if samples == 0:
            raise EvaluationError("No sample was evaluated; give the split at least one.")
        classes = tuple(
            _class_report(
                name,
                correct=int(counts[index, index]),
                predicted=int(counts[:, index].sum()),
                support=int(counts[index].sum()),
            )
            for index, name in enumerate(self.class_names)
        )
        return ClassificationReport(
            accuracy=int(counts.diagonal().sum()) / samples,
            loss=self.loss_sum.item() / samples,
            samples=samples,
            macro_f1=_mean_f1(classes, [1] * len(classes)),
            weighted_f1=_mean_f1(classes, [entry.support for entry in classes]),
            classes=classes,
            confusion=tuple(tuple(row) for row in counts.tolist()),
        )


def _class_report(name: str, *, correct: int, predicted: int, support: int) -> ClassReport:
    return ClassReport(
        name=name,
        precision=correct / predicted if predicted else 0.0,
        recall=correct / support if support else 0.0,
        f1=2 * correct / (predicted + support) if predicted + support else 0.0,
        support=support,
    )


def _mean_f1(classes: Sequence[ClassReport], weights: Sequence[int]) -> float:
    return sum(entry.f1 * weight for entry, weight in zip(classes, weights, strict=True)) / sum(weights)
