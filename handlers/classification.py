"""Classification answers: from logits to labels and probabilities."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.errors import InferenceError

TOP_K = 5
# Up to so many classes, Python's own arithmetic takes less than the ten calls of numpy that more of them need.
_FEW_CLASSES = 32


class Classifier:
    """Turns one sample's logits into its answer.

    Args:
        labels: Class names in the order of the logits.
        top_k: How many classes an answer lists unless its request says otherwise, the likeliest first.
    """

    def __init__(self, labels: tuple[str, ...], *, top_k: int = TOP_K) -> None:
        self._labels = labels
        self._top_k = min(top_k, len(labels))

    def answer(self, logits: NDArray[np.floating[Any]], top_k: int | None = None) -> dict[str, Any]:
        """Build one answer.

        Args:
            logits: Shape ``[classes]``.
            top_k: How many classes to list, at least one; None for the usual number.

        Returns:
            ``label`` and ``probability`` of the likeliest class, and ``top_k``, a list of both.

        Raises:
            InferenceError: If the model gave NaN or infinity, which JSON cannot carry and nobody should trust.
        """
        ranked = _rank_few if len(logits) <= _FEW_CLASSES else _rank_many
        top = [
            {"label": self._labels[i], "probability": round(probability, 6)}
            for i, probability in ranked(logits, self._top_k if top_k is None else top_k)
        ]
        return {**top[0], "top_k": top}


# Both: softmax in float64, shifted by the maximum, so exp cannot overflow; and a stable sort, which breaks ties by
# class order, so the same logits always give the same answer.
def _rank_few(logits: NDArray[np.floating[Any]], count: int) -> list[tuple[int, float]]:
    values = logits.tolist()
    if not all(map(math.isfinite, values)):
        raise not_finite()
    largest = max(values)
    weights = [math.exp(value - largest) for value in values]
    total = math.fsum(weights)
    order = sorted(range(len(values)), key=values.__getitem__, reverse=True)  # which keeps the order of equals
    return [(i, weights[i] / total) for i in order[:count]]


def _rank_many(logits: NDArray[np.floating[Any]], count: int) -> list[tuple[int, float]]:
    largest = float(logits.max())  # NaN if there is one
    if not (math.isfinite(largest) and math.isfinite(logits.min())):
        raise not_finite()
    weights = np.exp(logits.astype(np.float64) - largest)
    order = np.argsort(-logits, kind="stable")[:count]
    return list(zip(order.tolist(), (weights[order] / weights.sum()).tolist(), strict=True))


def not_finite() -> InferenceError:
    """The error for a model that gave what JSON cannot carry."""
    return InferenceError("model_output_not_finite", "The model's output holds NaN or infinite values.")
