"""Answers: from the outputs of a request's samples to the JSON that it gets, by the task and the request's form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from handlers.classification import Classifier, not_finite
from handlers.decoder import Decoded
from handlers.errors import OutOfRangeError
from handlers.open_answer import answer_document, ranked, tensor_document
from handlers.open_inference import BYTES, OpenOutput, OpenReply, output_tensors
from handlers.signature import TENSOR, Signature
from handlers.tensors import Array

_TOP_K = ("top_k_label", "top_k_probability")

Outputs = Mapping[str, Array]
"""One sample's outputs by name, without the batch axis."""


class Answerer:
    """Builds answers.

    Args:
        signature: Its task, outputs and labels.
    """

    def __init__(self, signature: Signature) -> None:
        self._classifier = None if signature.task == TENSOR else Classifier(signature.labels)
        self._labels = signature.labels
        self._logits = signature.outputs[0].name
        self._own = tuple(spec.name for spec in signature.outputs)
        self._datatypes = {name: datatype for name, (datatype, _) in output_tensors(signature).items()}

    def answer(self, decoded: Decoded, rows: Sequence[Outputs], identity: Mapping[str, str]) -> dict[str, Any]:
        """The JSON document of one request; see :func:`handlers.open_answer.binary_form` for what is no JSON in it.

        Args:
            decoded: The request.
            rows: For each of its samples, what the model gave.
            identity: Fields that every answer carries: ``model`` and ``version``.

        Raises:
            RequestError: If an output is not finite, or the outputs of several samples do not fit into one tensor.
        """
        if decoded.reply is not None:
            return self._open_answer(decoded, decoded.reply, rows, identity)
        predictions = [self._prediction(row, decoded.parameters.top_k) for row in rows]
        for position in decoded.truncated:
            predictions[position]["truncated"] = True
        if decoded.many:
            return {"predictions": predictions, **identity}
        return {**predictions[0], **identity}

    def _prediction(self, outputs: Outputs, top_k: int | None) -> dict[str, Any]:
        if self._classifier is not None:
            return self._classifier.answer(outputs[self._logits], top_k)
        _check_finite(outputs)
        return {"outputs": {name: output.tolist() for name, output in outputs.items()}}

    def _open_answer(
        self, decoded: Decoded, reply: OpenReply, rows: Sequence[Outputs], identity: Mapping[str, str]
    ) -> dict[str, Any]:
        for row in rows:
            _check_finite(row)
        wanted = reply.outputs or self._usual(reply, decoded.parameters.top_k)
        tensors = self._classes({output.name for output in wanted}, rows, decoded.parameters.top_k)
        documents = []
        for output in wanted:
            name, datatype = output.name, self._datatypes[output.name]
            values = _joined([row[name] for row in rows], name) if name in self._own else tensors[name]
            if output.classes is not None:
                values = ranked(values, output.classes, self._labels if name == self._logits else ())
                datatype = BYTES
            documents.append(tensor_document(name, values, datatype, binary=output.binary))
        answer = answer_document(documents, reply, identity)
        if decoded.truncated:
            answer["parameters"] = {"truncated": sorted(decoded.truncated)}
        return answer

    def _usual(self, reply: OpenReply, top_k: int | None) -> tuple[OpenOutput, ...]:
        """The outputs of a request that names none."""
        names = self._own
        if self._classifier is not None:
            names = ("label", "probability", *(_TOP_K if top_k is not None else ()), *names)
        return tuple(OpenOutput(name=name, binary=reply.binary) for name in dict.fromkeys(names))

    def _classes(self, names: set[str], rows: Sequence[Outputs], top_k: int | None) -> dict[str, Array]:
        """What an answer says of a classification besides the model's own outputs."""
        if self._classifier is None or names <= set(self._own):
            return {}
        answers = [self._classifier.answer(row[self._logits], top_k) for row in rows]
        tensors = {
            "label": np.array([answer["label"] for answer in answers], dtype=object),
            "probability": np.array([answer["probability"] for answer in answers]),
        }
        for key in ("label", "probability") if names.intersection(_TOP_K) else ():
            listed = [[item[key] for item in answer["top_k"]] for answer in answers]
            tensors[f"top_k_{key}"] = np.array(listed, dtype=object)
        return tensors


def _check_finite(outputs: Outputs) -> None:
    if not all(np.isfinite(output).all() for output in outputs.values()):
        raise not_finite()


def _joined(rows: Sequence[Array], name: str) -> Array:
    """The rows of several samples as one tensor."""
    if any(row.shape != rows[0].shape for row in rows):
        raise OutOfRangeError(
            "ragged_output",
            f"The samples give outputs {name!r} of different sizes, which are no tensor; send one in each request.",
        )
    return np.stack(rows)
