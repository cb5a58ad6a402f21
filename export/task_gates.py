"""Gates on evaluation data, from the bytes that a client sends to the answer that it gets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from export.comparison import Sample
from export.errors import EvaluationError
from export.evaluation import LabelledRequest
from export.gates import Comparison, GateResult, margin
from export.reference import Reference
from export.thresholds import Thresholds
from handlers import batching
from handlers.errors import RequestError
from handlers.model import DEFAULT_MAX_BATCH, Answer, ServedModel
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch

# With fewer samples chance alone may put a good model below the commonest class.
_LEAST_JUDGED = 20
_SHOWN_CLASSES = 3

ON_DATA = " on evaluation data"


def task_gates(
    served: ServedModel,
    reference: Reference,
    requests: Sequence[LabelledRequest],
    thresholds: Thresholds,
    *,
    trained: Mapping[str, Any],
    own_data: bool,
) -> list[GateResult]:
    """Compare on evaluation data.

    Noise alone hardly shows some faults: a transposed image of noise is noise.

    Args:
        served: What is to be checked.
        reference: What is right.
        requests: At least one.
        thresholds: What is allowed.
        trained: What training measured: ``accuracy`` and ``loss``; empty when unknown.
        own_data: Whether ``requests`` are the very samples that training measured on.

    Raises:
        EvaluationError: If a request is not one that the model takes.
    """
    signature = served.signature
    ranked = bool(signature.labels) or requests[0].label is not None
    comparison = Comparison(signature, thresholds, ranked=ranked)
    known = Comparison(signature, thresholds, expected="the evaluation data", actual="the artifact")
    tally = _Tally(signature)
    for chunk in _chunks(requests):
        samples = [_decode(served, request) for request in chunk]
        expected = run_in_groups(reference, samples, signature)
        answers = served.answer([request.parts() for request in chunk])
        for request, right, answer in zip(chunk, expected, answers, strict=True):
            if answer.error is not None:
                comparison.fail(f"a valid request is refused: {answer.error.message}")
            if ranked:
                tally.add(request, right, answer)
        _add_answered(comparison, expected, answers)
        _add_answered(known, [request.outputs for request in chunk], answers)
    results = comparison.results(ON_DATA)
    if requests[0].outputs:
        results += [
            gate
            for gate in (known.outputs_gate("given outputs"), known.noise_gate("noise against given outputs"))
            if gate is not None
        ]
    if ranked:
        results += tally.gates(comparison.tie_width, thresholds, trained, own_data=own_data)
    return results


def run_in_groups(reference: Reference, samples: Sequence[TensorBatch], signature: Signature) -> list[Sample]:
    """The reference's outputs for samples of any sizes, one mapping a sample."""
    rows: dict[int, Sample] = {}
    for indices in batching.group(samples, signature, DEFAULT_MAX_BATCH):
        group = [samples[i] for i in indices]
        outputs = batching.split(reference.run(batching.stack(group, signature)), group, signature)
        rows.update(zip(indices, outputs, strict=True))
    return [rows[i] for i in range(len(samples))]


def _chunks(requests: Sequence[LabelledRequest]) -> Iterator[Sequence[LabelledRequest]]:
    for start in range(0, len(requests), DEFAULT_MAX_BATCH):
        yield requests[start : start + DEFAULT_MAX_BATCH]


def _decode(served: ServedModel, request: LabelledRequest) -> TensorBatch:
    try:
        samples = served.decode(request.parts())
    except RequestError as error:
        raise EvaluationError(f"{request.where} is nothing that the model takes: {error.message}") from error
    return samples[0]


def _add_answered(comparison: Comparison, expected: Sequence[Sample], answers: Sequence[Answer]) -> None:
    pairs = [
        (right, answer.outputs[0]) for right, answer in zip(expected, answers, strict=True) if right and answer.outputs
    ]
    if pairs:
        comparison.add_rows("evaluation data", [right for right, _ in pairs], [row for _, row in pairs])


class _Tally:
    """Classes, counted.

    Args:
        signature: Its one output holds a number a class.
    """

    def __init__(self, signature: Signature) -> None:
        self._labels = signature.labels
        self._output = signature.outputs[0].name
        self._ranked: list[tuple[float, bool]] = []
        self._labelled = 0
        self._right = 0
        self._reference_right = 0
        self._loss = 0.0
        self._confusion: Counter[tuple[int, int]] = Counter()

    def add(self, request: LabelledRequest, expected: Sample, answer: Answer) -> None:
        """Count one request; one that failed counts as wrong."""
        logits = expected[self._output]
        first = int(logits.argmax())
        answered = self._class_of(answer)
        self._ranked.append((margin(logits), answered == first))
        if request.label is not None:
            self._labelled += 1
            self._confusion[request.label, first] += 1
            self._right += answered == request.label
            self._reference_right += first == request.label
            self._loss += _cross_entropy(logits, request.label)

    def gates(
        self, tie_width: float, thresholds: Thresholds, trained: Mapping[str, Any], *, own_data: bool
    ) -> list[GateResult]:
        """The results.

        Args:
            tie_width: A lead of no more than this may be turned round where all ranks must agree.
            thresholds: What is allowed.
            trained: See :func:`task_gates`.
            own_data: See :func:`task_gates`.
        """
        results = [self._agreement(tie_width, thresholds)]
        if self._labelled:
            results.append(self._accuracy(thresholds))
            floor = self._least_accuracy(thresholds)
            if floor is not None:
                results.append(floor)
            if "accuracy" in trained:
                results.append(self._training_accuracy(float(trained["accuracy"]), thresholds, own_data=own_data))
            if own_data and "loss" in trained and trained.get("samples", self._labelled) == self._labelled:
                results.append(self._training_loss(float(trained["loss"]), thresholds))
        return results

    def _class_of(self, answer: Answer) -> int | None:
        """The class that a client reads in an answer."""
        if answer.error is not None:
            return None
        if not self._labels:
            return int(answer.outputs[0][self._output].argmax())
        label = answer.body["label"]
        return self._labels.index(label) if label in self._labels else None

    def _agreement(self, tie_width: float, thresholds: Thresholds) -> GateResult:
        # Where a share may differ, ties are part of it. Where none may, rounding must not decide about an archive.
        tie = tie_width if thresholds.agreement == 1.0 else 0.0
        counted = [same for lead, same in self._ranked if same or lead > tie]
        excused = len(self._ranked) - len(counted)
        share = sum(counted) / len(counted) if counted else 0.0
        return GateResult(
            gate="top-1 agreement",
            passed=share >= thresholds.agreement,
            measured=share,
            bound=thresholds.agreement,
            detail=f"the same class ranks first for {sum(counted)} of {len(counted)} requests"
            + (f"; {excused} more are too close to call" if excused else ""),
        )

    def _accuracy(self, thresholds: Thresholds) -> GateResult:
        accuracy, reference = self._right / self._labelled, self._reference_right / self._labelled
        # A hair for 0.99 - 0.01, which is not 0.98.
        bound = max(0.0, reference - thresholds.metric_drop - 1e-9)
        return GateResult(
            gate="accuracy",
            passed=accuracy >= bound,
            measured=accuracy,
            bound=bound,
            detail=f"{self._right} of {self._labelled} right, {accuracy:.4f}; the checkpoint {reference:.4f}",
        )

    def _least_accuracy(self, thresholds: Thresholds) -> GateResult | None:
        """Whether the checkpoint itself is any good; None where the data cannot tell."""
        classes: Counter[int] = Counter()
        for (label, _), count in self._confusion.items():
            classes[label] += count
        commonest, most = classes.most_common(1)[0]
        accuracy, given = self._reference_right / self._labelled, thresholds.least_accuracy
        if given is None and (len(classes) < 2 or self._labelled < _LEAST_JUDGED):
            return None
        bound = most / self._labelled if given is None else given
        passed = accuracy > bound if given is None else accuracy >= bound
        detail = f"the checkpoint is right for {self._reference_right} of {self._labelled}"
        detail += (
            f", and always answering {self._named(commonest)} would be for {most}"
            if given is None
            else f", {accuracy:.4f}; the least is {bound:g}"
        )
        if not passed:
            detail += f": labels, preprocessing or weights are wrong{self._permutation(bound)}"
        return GateResult(gate="least accuracy", passed=passed, measured=accuracy, bound=bound, detail=detail)

    def _permutation(self, bound: float) -> str:
        """Another order of the labels that would explain the answers, in words; empty if there is none."""
        answers: dict[int, tuple[int, int]] = {}  # by label: how often its commonest answer came, and that answer
        for (label, answer), count in self._confusion.items():
            answers[label] = max(answers.get(label, (0, 0)), (count, answer))
        right = sum(count for count, _ in answers.values())
        moved = [(label, answer) for label, (_, answer) in sorted(answers.items()) if label != answer]
        is_permutation = len({answer for _, answer in answers.values()}) == len(answers)
        if not moved or not is_permutation or right <= max(bound, 0.5) * self._labelled:
            return ""
        shown = ", ".join(f"{self._named(a)} as {self._named(b)}" for a, b in moved[:_SHOWN_CLASSES])
        more = f" and {len(moved) - _SHOWN_CLASSES} more" if len(moved) > _SHOWN_CLASSES else ""
        return f"; with the labels in another order {right} would be right (it answers {shown}{more})"

    def _named(self, label: int) -> str:
        return repr(self._labels[label]) if label < len(self._labels) else f"class {label}"

    def _training_accuracy(self, trained: float, thresholds: Thresholds, *, own_data: bool) -> GateResult:
        accuracy = self._reference_right / self._labelled
        bound = max(0.0, trained - thresholds.training_drop - 1e-9)
        passed = accuracy >= bound
        detail = f"the checkpoint reaches {accuracy:.4f} through the handlers, and {trained:.4f} in training"
        if not passed:
            detail += "; the signature's preprocessing or labels are not those of the training"
            if not own_data:
                detail += ", or this data is harder: then give --thresholds with a larger training_drop"
        return GateResult(gate="accuracy in training", passed=passed, measured=accuracy, bound=bound, detail=detail)

    def _training_loss(self, trained: float, thresholds: Thresholds) -> GateResult:
        loss = self._loss / self._labelled
        # A model that makes no mistakes has a loss near 0, where a share of it means nothing.
        drift = abs(loss - trained) / max(trained, 0.01)
        passed = drift <= thresholds.loss_drift
        detail = f"the checkpoint's mean loss is {loss:.5f} through the handlers, and {trained:.5f} in training"
        if not passed:
            detail += "; the signature's preprocessing or labels are not those of the training"
        return GateResult(
            gate="loss in training", passed=passed, measured=drift, bound=thresholds.loss_drift, detail=detail
        )


def _cross_entropy(logits: Array, label: int) -> float:
    values = logits.astype(np.float64)
    peak = float(values.max())
    return peak + math.log(float(np.exp(values - peak).sum())) - float(values[label])
