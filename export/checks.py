"""All checks of an artifact against its checkpoint, on random inputs and on evaluation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from export.cases import MAX_POSITIONS, extreme_cases, random_cases, samples_of_size
from export.comparison import is_finite
from export.errors import CheckpointError, ExportError
from export.evaluation import LabelledRequest
from export.gates import Comparison, GateResult
from export.inputs import SEED, random_samples
from export.reference import Reference
from export.task_gates import task_gates
from export.thresholds import Thresholds
from handlers import batching
from handlers.errors import RequestError, one_line
from handlers.model import ServedModel
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch

_PADDED_SAMPLES = 32
_SAMPLES_OF_ONE_SIZE = 16
# Of the checkpoint's own model: eager float32 differs by 1e-6 between batches of other shapes.
_INVARIANT = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What an artifact is held against.

    Attributes:
        reference: The checkpoint's own answers.
        requests: Evaluation data; may be empty.
        trained: What training measured: ``accuracy`` and ``loss``; empty when unknown.
        own_data: Whether ``requests`` are the very samples that training measured on.
    """

    reference: Reference
    requests: Sequence[LabelledRequest] = ()
    trained: Mapping[str, Any] = field(default_factory=dict)
    own_data: bool = False


def check_artifact(served: ServedModel, evidence: Evidence, thresholds: Thresholds) -> list[GateResult]:
    """Run every gate; the results come together, whatever fails.

    Raises:
        CheckpointError: If the checkpoint's own model fails.
        EvaluationError: If a request of the evaluation data is not valid.
    """
    checks: list[tuple[str, Callable[[], list[GateResult]]]] = [
        ("random inputs", lambda: random_gates(served, evidence, thresholds)),
        ("company", lambda: company_gates(served, evidence, thresholds)),
    ]
    if evidence.requests:
        checks.append(
            (
                "evaluation data",
                lambda: task_gates(
                    served,
                    evidence.reference,
                    evidence.requests,
                    thresholds,
                    trained=evidence.trained,
                    own_data=evidence.own_data,
                ),
            )
        )
    return [result for name, check in checks for result in _guarded(name, check)]


def _guarded(name: str, check: Callable[[], list[GateResult]]) -> list[GateResult]:
    try:
        return check()
    except ExportError:
        raise
    except Exception as error:  # a comparison that crashes is a comparison that fails
        detail = f"the comparison itself fails: {type(error).__name__}: {one_line(error)}"
        return [GateResult(gate=name, passed=False, detail=detail)]


def random_gates(served: ServedModel, evidence: Evidence, thresholds: Thresholds) -> list[GateResult]:
    """Compare on random inputs of every shape that the signature allows."""
    signature = served.signature
    noise = thresholds.random_noise if evidence.requests else min(thresholds.random_noise, 2 * thresholds.noise)
    comparison = Comparison(signature, thresholds, noise=noise, ranked=bool(signature.labels))
    for case in random_cases(signature):
        batch = batching.stack(case.samples, signature)
        expected = evidence.reference.run(batch)
        actual = run_artifact(served, batch, comparison, case.name)
        if actual is not None:
            comparison.add(case.name, case.samples, expected, actual)
    ranking = comparison.ranking_gate("top-1 on random inputs")
    extremes = extremes_gate(served, evidence.reference, thresholds, comparison.sizes)
    return [*comparison.results(), *([ranking] if ranking is not None else []), extremes]


def extremes_gate(
    served: ServedModel, reference: Reference, thresholds: Thresholds, sizes: Mapping[str, float]
) -> GateResult:
    """Compare on inputs that random ones do not hit, where a branch on values may go the other way.

    Outputs there have no spread that means anything, and rounding may be amplified, as in the normalisation of a
    constant: differences count as a share of the outputs' size, and ranks and whole numbers do not count.

    Args:
        served: What is to be checked.
        reference: What is right. Where it fails or is not finite, nothing is.
        thresholds: What is allowed.
        sizes: Root mean square of each output that has distances, on random inputs.
    """
    signature = served.signature
    gate, bound = "extreme inputs", _extreme_bound(thresholds)
    worst, where, compared = 0.0, "", 0
    faults = Comparison(signature, thresholds)
    for case in extreme_cases(signature):
        batch = batching.stack(case.samples, signature)
        try:
            expected = reference.run(batch)
        except CheckpointError:
            continue
        if not is_finite(expected):
            continue
        compared += 1
        actual = run_artifact(served, batch, faults, case.name)
        if actual is not None:
            faults.add(case.name, case.samples, expected, actual)
        found = _largest_share(expected, actual or {}, sizes)
        if found > worst:
            worst, where = found, f" ({case.name})"
    if compared:
        outputs = faults.outputs_gate(gate)
        if not outputs.passed:
            return outputs
    passed = worst <= bound
    detail = f"differences are up to {worst:.2g} of the outputs' size in {compared} batches at the limits{where}"
    if not passed:
        detail += (
            "; if the model branches on the values of its inputs, use --method script or --format eager, or write the "
            "branch with torch.where"
        )
    return GateResult(gate=gate, passed=passed, measured=worst, bound=bound, detail=detail)


def _extreme_bound(thresholds: Thresholds) -> float:
    """Far more than clean artifacts differ by, and less than a branch that went the other way."""
    return 2 * thresholds.random_noise if thresholds.atol is None else 10 * (thresholds.atol + thresholds.rtol)


def _largest_share(expected: TensorBatch, actual: Mapping[str, Array], sizes: Mapping[str, float]) -> float:
    """Root mean square of the differences of the worst output, as a share of its size here or on random inputs."""
    shares = [0.0]
    for name, size in sizes.items():
        right, found = expected[name].astype(np.float64), actual.get(name)
        if found is None or found.shape != right.shape or not right.size:
            continue
        scale = max(size, float(np.sqrt(np.square(right).mean()))) or 1.0
        shares.append(float(np.sqrt(np.square(found.astype(np.float64) - right).mean())) / scale)
    return max(shares)


def run_artifact(
    served: ServedModel, batch: TensorBatch, comparison: Comparison, case: str
) -> Mapping[str, Array] | None:
    """The artifact's outputs; None, and a fault of the comparison, if it crashes."""
    try:
        return served.backend.run(batch)
    except Exception as error:  # runtimes raise types of their own
        comparison.fail(f"the artifact fails ({case}): {one_line(error)}")
        return None


def company_gates(served: ServedModel, evidence: Evidence, thresholds: Thresholds) -> list[GateResult]:
    """Whether a sample's answer depends on the company that it keeps: each alone, against its row in a batch.

    Where inputs have padding, samples of all sizes share that batch; else those of one size.
    """
    signature = served.signature
    padded = can_pad(signature)
    name = "padding" if padded else "batching"
    company = "a batch with longer ones" if padded else "a batch with others"
    remedy = (
        "mask padding in the model, or remove `padding` from the signature, so that only samples of one size share a "
        "batch"
        if padded
        else "servers put the samples of many requests into one batch, so let the model compute each on its own"
    )
    samples = _samples_to_pad(served, evidence) if padded else _samples_of_one_size(signature)
    batch = batching.stack(samples, signature)

    def compare(who: str, run: Callable[[TensorBatch], Mapping[str, Array]], bound: float) -> Comparison:
        comparison = Comparison(signature, thresholds, noise=bound, expected=f"{who} alone", actual=f"{who} in a batch")
        try:
            together = run(batch)
            alone = [run(batching.stack([sample], signature)) for sample in samples]
            comparison.add_rows(
                "padded" if padded else "together",
                [batching.split(one, [sample], signature)[0] for one, sample in zip(alone, samples, strict=True)],
                batching.split(together, samples, signature),
            )
        except ExportError:
            raise
        except Exception as error:  # runtimes raise types of their own
            comparison.fail(f"{who} fails: {one_line(error)}")
        return comparison

    return [
        _company_gate(
            f"{name} of the checkpoint",
            compare("the checkpoint's own model", evidence.reference.run, _INVARIANT),
            f"the checkpoint's own model answers otherwise when a sample shares {company}: {remedy}",
        ),
        _company_gate(
            name,
            compare("the artifact", served.backend.run, 2 * thresholds.noise),
            f"the artifact answers otherwise when a sample shares {company}",
        ),
    ]


def can_pad(signature: Signature) -> bool:
    """Whether samples of different sizes may share a batch."""
    return bool(signature.axes) and all(spec.padding is not None for spec in signature.inputs if spec.dynamic_axes)


def _company_gate(gate: str, comparison: Comparison, failure: str) -> GateResult:
    outputs = comparison.outputs_gate(gate)
    if not outputs.passed:
        return outputs
    result = comparison.noise_gate(gate) or comparison.equality_gate(gate) or outputs
    if result.passed:
        return result
    return GateResult(
        gate=gate, passed=False, measured=result.measured, bound=result.bound, detail=f"{failure}; {result.detail}"
    )


def _samples_of_one_size(signature: Signature) -> list[TensorBatch]:
    """Random samples that share a batch as they are."""
    sizes = {name: max(axis.minimum, axis.maximum // 2) for name, axis in signature.axes.items()}
    count = max(2, min(_SAMPLES_OF_ONE_SIZE, MAX_POSITIONS // math.prod(sizes.values())))
    return samples_of_size(signature, count, sizes, seed=SEED + 2)


def _samples_to_pad(served: ServedModel, evidence: Evidence) -> list[TensorBatch]:
    """Random samples, the shortest and the longest among them, and some of the evaluation data."""
    signature = served.signature
    samples = random_samples(signature, _PADDED_SAMPLES // 2, seed=SEED + 2)
    for request in evidence.requests[: _PADDED_SAMPLES - len(samples)]:
        try:
            samples.extend(served.decode(request.parts()))
        except RequestError:  # for the gates of the evaluation data to report
            continue
    longest = 1
    for axis in signature.axes.values():
        longest *= axis.maximum
    # The shortest and the longest random sample come first, and stay.
    return samples[: max(2, min(len(samples), MAX_POSITIONS // longest))]
