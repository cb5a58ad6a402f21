"""Gates: an artifact gets into an archive only when it computes what its checkpoint computes.

Every gate compares the *reference* (the eager module with the checkpoint's weights) with the *served model* (the
written artifact, loaded and fed by the very code that runs in a worker). All failures are reported together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from export.errors import CheckpointError
from export.evaluation import LabelledRequest
from handlers.errors import one_line
from handlers.model import ServedModel


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """How far an artifact may differ from its checkpoint.

    Attributes:
        atol: Absolute tolerance of outputs, in units of the output.
        rtol: Relative tolerance of outputs.
        top1_agreement: Least share of samples on which both rank the same class first.
        metric_drop: Most accuracy that may be lost against what training measured, as a share of 1. It allows
            for one borderline sample in a few hundred, where another machine rounds differently.
    """

    atol: float = 1e-4
    rtol: float = 1e-3
    top1_agreement: float = 1.0
    metric_drop: float = 0.005


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """The outcome of one gate.

    Attributes:
        gate: Its name.
        passed: Whether the artifact may go on.
        measured: What was found; None when the comparison itself failed.
        bound: What it was held against.
        detail: One sentence.
    """

    gate: str
    passed: bool
    measured: float | None
    bound: float
    detail: str

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


class Reference:
    """The checkpoint's own answers.

    Args:
        module: In eval mode, on the CPU.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self._module = module

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute one batch, ``[batch, ...]``, with one thread so that the same input gives the same bits.

        Raises:
            CheckpointError: If the module fails, or gives something else than one tensor.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                # A copy: a module that works in place would hand its leavings to the artifact as input.
                output: NDArray[np.float32] = self._module(torch.from_numpy(batch.copy())).numpy()
        except Exception as error:  # the module is the user's code
            raise CheckpointError(
                f"the checkpoint's own model fails on a batch of {len(batch)}, or does not return one tensor: "
                f"{one_line(error)}"
            ) from error
        finally:
            torch.set_num_threads(threads)
        return output


def parity_gate(
    reference: Reference,
    served: ServedModel,
    batches: Sequence[NDArray[np.float32]],
    thresholds: Thresholds,
    *,
    gate: str = "parity",
) -> GateResult:
    """Compare raw outputs on inputs of several batch sizes.

    Args:
        reference: What is right.
        served: What is to be checked.
        batches: Input tensors ``[batch, ...]``.
        thresholds: ``atol`` and ``rtol`` count here.
        gate: Name of the gate, which says what the inputs are.

    Returns:
        The largest difference, as a multiple of what the tolerances allow: at most 1 passes.
    """
    worst = 0.0
    largest = 0.0
    for batch in batches:
        expected = reference.run(batch)
        try:
            actual = served.backend.run(batch)
        except Exception as error:  # a comparison that crashes is a comparison that fails
            return _crashed(gate, 1.0, f"the artifact fails on a batch of {len(batch)}: {one_line(error)}")
        if actual.shape != expected.shape:
            return _crashed(gate, 1.0, f"the artifact gives the shape {actual.shape} instead of {expected.shape}")
        with np.errstate(invalid="ignore"):  # infinity less infinity is a NaN, which fails below
            difference = np.abs(actual.astype(np.float64) - expected)
            excess = difference / (thresholds.atol + thresholds.rtol * np.abs(expected))
        # max() of an array with a NaN is NaN, and no comparison below is true of it: NaN fails.
        worst = float(np.maximum(worst, excess.max()))
        largest = float(np.maximum(largest, difference.max()))
    sizes = ", ".join(map(str, sorted({len(batch) for batch in batches})))
    return GateResult(
        gate=gate,
        passed=worst <= 1.0,
        measured=worst,
        bound=1.0,
        detail=f"largest difference {largest:.2g} (atol {thresholds.atol:g}, rtol {thresholds.rtol:g}) over "
        f"{sum(map(len, batches))} samples at batch sizes {sizes}",
    )


def agreement_gate(
    reference: Reference, served: ServedModel, requests: Sequence[LabelledRequest], thresholds: Thresholds
) -> GateResult:
    """Compare the first-ranked class, request by request, from the bytes that a client sends."""
    bound = thresholds.top1_agreement
    answers = served.answer([request.parts() for request in requests])
    failed = next((answer.error for answer in answers if answer.error is not None), None)
    if failed is not None:
        return _crashed("top-1 agreement", bound, f"a valid request is refused: {failed.message}")
    labels = served.signature.labels
    agreeing = sum(
        answer.body["label"] == labels[int(reference.run(inputs)[0].argmax())]
        for answer, inputs in zip(answers, (served.decode(request.parts()) for request in requests), strict=True)
    )
    share = agreeing / len(requests)
    return GateResult(
        gate="top-1 agreement",
        passed=share >= bound,
        measured=share,
        bound=bound,
        detail=f"the same class ranks first for {agreeing} of {len(requests)} requests",
    )


def accuracy_gate(
    served: ServedModel, requests: Sequence[LabelledRequest], trained_accuracy: float | None, thresholds: Thresholds
) -> GateResult:
    """Compare accuracy through the handlers with what training measured: this catches wrong preprocessing."""
    answers = served.answer([request.parts() for request in requests])
    right = sum(answer.body.get("label") == request.label for answer, request in zip(answers, requests, strict=True))
    accuracy = right / len(requests)
    bound = 0.0 if trained_accuracy is None else trained_accuracy - thresholds.metric_drop
    trained = "unknown to training" if trained_accuracy is None else f"{trained_accuracy:.4f} in training"
    return GateResult(
        gate="accuracy",
        passed=accuracy >= bound,
        measured=accuracy,
        bound=bound,
        detail=f"{right} of {len(requests)} right, {accuracy:.4f}; {trained}",
    )


def _crashed(gate: str, bound: float, detail: str) -> GateResult:
    return GateResult(gate=gate, passed=False, measured=None, bound=bound, detail=detail)
