"""Whether a system's answer is the model's, whatever else the system puts around it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np

from loadtest.answers import UNREADABLE_ANSWER, WRONG_ANSWER, Fault, server_message

# Which of two classes leads may depend on what else is in the batch when they are this close: int8 artifacts scale by
# the batch's largest value.
LABEL_MARGIN = 0.05
# Of the largest expected value, or of an output's usual size where that is more. Enough to tell one request's answer
# from another's; how exact an artifact is, the gates of the export have judged. An int8 artifact differed by 0.11 from
# itself in other company.
OUTPUT_TOLERANCE = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What a right answer says.

    Attributes:
        labels: Classes that may rank first; empty for models without classes.
        outputs: Values by output; empty for classifiers.
        sizes: By output, the root mean square of it over all requests; empty if only this one is known.
    """

    labels: tuple[str, ...] = ()
    outputs: dict[str, Any] | None = None
    sizes: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, prediction: dict[str, Any]) -> Self:
        """What in-process computation predicts, as what to expect.

        Args:
            prediction: One sample's answer by the handlers.
        """
        (prediction,) = prediction.get("predictions", [prediction])
        if "top_k" not in prediction:
            return cls(outputs=prediction["outputs"])
        least = prediction["probability"] - LABEL_MARGIN
        return cls(labels=tuple(each["label"] for each in prediction["top_k"] if each["probability"] >= least))

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """The inverse of `dataclasses.asdict`."""
        return cls(labels=tuple(document["labels"]), outputs=document["outputs"], sizes=document["sizes"])


def expect(predictions: Sequence[dict[str, Any]]) -> tuple[Expected, ...]:
    """What to expect of all requests, given what in-process computation predicts for each."""
    alone = [Expected.of(prediction) for prediction in predictions]
    squares: dict[str, list[float]] = {}
    for one in alone:
        for name, values in (one.outputs or {}).items():
            squares.setdefault(name, []).append(float(np.square(np.asarray(values, dtype=np.float64)).mean()))
    sizes = {name: float(np.sqrt(np.mean(each))) for name, each in squares.items()}
    return tuple(replace(one, sizes=sizes) for one in alone)


def judge_answer(status: int, body: bytes, expected: Expected) -> Fault | None:
    """Judges one HTTP answer.

    Returns:
        None for a right answer, else what is wrong with it.
    """
    if status != 200:
        return Fault(f"HTTP {status}", server_message(body))
    try:
        prediction = _only_prediction(json.loads(body))
        if expected.outputs is None:
            label = prediction["label"]
            if label in expected.labels:
                return None
            return Fault(WRONG_ANSWER, f"label {label!r} instead of {' or '.join(map(repr, expected.labels))}")
        return _judge_outputs(prediction["outputs"], expected.outputs, expected.sizes)
    except (ValueError, KeyError, TypeError):
        return Fault(UNREADABLE_ANSWER, f"no prediction in: {server_message(body)}")


def _only_prediction(document: Any) -> dict[str, Any]:
    """The one prediction of ``{"predictions": [p]}``, of ``p`` itself or, from BentoML, ``[p]``."""
    predictions = document.get("predictions", [document]) if isinstance(document, dict) else document
    (prediction,) = predictions
    return dict(prediction)


def _judge_outputs(found: dict[str, Any], expected: dict[str, Any], sizes: dict[str, float]) -> Fault | None:
    if found.keys() != expected.keys():
        return Fault(WRONG_ANSWER, f"outputs {sorted(found)} instead of {sorted(expected)}")
    for name, values in expected.items():
        right, given = np.asarray(values, dtype=np.float64), np.asarray(found[name], dtype=np.float64)
        if right.shape != given.shape:
            return Fault(WRONG_ANSWER, f"{name} has the shape {given.shape} instead of {right.shape}")
        bound = OUTPUT_TOLERANCE * max(float(np.abs(right).max(initial=0.0)), sizes.get(name, 0.0)) + 1e-6
        difference = np.abs(right - given)
        if not np.all(difference <= bound):  # not `any >`: NaN is wrong
            return Fault(WRONG_ANSWER, f"{name} differs by {float(difference.max()):.3g}, more than {bound:.3g}")
    return None
