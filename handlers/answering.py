"""Answers: from one sample's outputs to JSON, by the signature's task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from handlers.classification import Classifier
from handlers.errors import InferenceError
from handlers.signature import TENSOR, Signature
from handlers.tensors import Array

Answerer = Callable[[Mapping[str, Array]], dict[str, Any]]
"""Builds one sample's answer from its outputs; raises InferenceError if they are not finite."""


def build_answerer(signature: Signature) -> Answerer:
    """The answerer of a signature's task."""
    if signature.task == TENSOR:
        return tensor_answer
    classifier = Classifier(signature.labels)
    name = signature.outputs[0].name
    return lambda outputs: classifier.answer(outputs[name])


def tensor_answer(outputs: Mapping[str, Array]) -> dict[str, Any]:
    """All outputs as nested lists.

    Raises:
        InferenceError: If the model gave NaN or infinity, which JSON cannot carry and nobody should trust.
    """
    if not all(np.isfinite(output).all() for output in outputs.values()):
        raise InferenceError("model_output_not_finite", "The model's output holds NaN or infinite values.")
    return {"outputs": {name: output.tolist() for name, output in outputs.items()}}
