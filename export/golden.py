"""Choice of golden samples: a few requests whose right answers travel with the archive.

A worker that does not repeat them does not become ready, so they must fail on a wrong machine, and only there.

fp32 archives record what the *checkpoint* answers, and allow ``rtol``, and ``atol`` as a share of each output's root
mean square. At lower precisions that would allow the whole distance between the artifact and its checkpoint, or fail
at once; so those archives record what the *artifact* answered when it had passed the gates. Another processor rounds
otherwise (other vector widths sum in another order, and one tie in a quantised activation moves a value by a whole
step), and each such rounding is another draw from the same noise that parts the artifact from its checkpoint: so twice
that noise's largest value is allowed.

Every output has a tolerance of its own: one model may answer with a probability and a frequency in hertz.

Samples whose first class leads by less than both values together can move are left out, and so a label never flips by
rounding.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.comparison import Sample
from export.errors import GateError
from export.evaluation import LabelledRequest
from export.gates import margin
from export.reference import Reference
from export.task_gates import run_in_groups
from export.thresholds import Thresholds
from handlers.golden import GoldenSample, GoldenSet
from handlers.model import ServedModel
from handlers.tensors import Array, TensorSpec

MAX_SAMPLES = 16
# How many to look at for samples with a clear first class.
_CANDIDATES = 64
# Outputs are rounded to a power of two of about a millionth of their scale: far finer than the tolerances, and it hides
# the last bit in which machines differ. float32 and float64 hold the rounded values exactly.
_ROUNDED_BITS = 20
_EXTENSIONS = {"image/png": "png", "image/jpeg": "jpg", "application/json": "json", "text/plain": "txt"}
# Least tolerance of lower precisions, as a share of the outputs' root mean square: an artifact that happens to hit
# its checkpoint closely on a handful of samples still rounds otherwise elsewhere.
_LEAST_NOISE = 1e-3


@dataclass(frozen=True, kw_only=True, slots=True)
class _Candidate:
    """A request with both answers."""

    request: LabelledRequest
    expected: Sample
    actual: Sample
    label: str | None


def choose_golden(
    requests: Sequence[LabelledRequest], reference: Reference, served: ServedModel, thresholds: Thresholds
) -> tuple[GoldenSet, dict[str, bytes]]:
    """Choose golden samples: the first of each class, then the next ones, in data order.

    Args:
        requests: What to choose from; at least one.
        reference: The checkpoint's answers, recorded for fp32.
        served: The artifact, which has passed the gates; its answers are recorded for lower precisions.
        thresholds: ``atol``, as a share of each output's root mean square, and ``rtol`` are the tolerances of fp32.

    Returns:
        The samples, and the request bodies and expected outputs by path within the archive.

    Raises:
        GateError: If the artifact fails on one.
    """
    artifact = served.signature.artifact
    exact = artifact is not None and artifact.precision == "fp32"
    outputs = served.signature.outputs
    candidates = _candidates(requests, reference, served)
    recorded = [candidate.expected if exact else candidate.actual for candidate in candidates]
    scales = {spec.name: _scale([candidate.expected[spec.name] for candidate in candidates]) for spec in outputs}
    atol = {spec.name: _tolerance(candidates, spec, scales[spec.name], thresholds, exact=exact) for spec in outputs}
    chosen = list(_clear(candidates, recorded, atol, thresholds.rtol, served))[:MAX_SAMPLES]
    files: dict[str, bytes] = {}
    samples = []
    for number, (candidate, values, label) in enumerate(chosen):
        stem = f"golden/{number:03d}"
        body = f"{stem}.{_EXTENSIONS[candidate.request.content_type]}"
        files[body] = candidate.request.body
        paths = {}
        for spec in outputs:
            paths[spec.name] = f"{stem}.{spec.name}.npy"
            files[paths[spec.name]] = _npy(_rounded(values[spec.name], scales[spec.name]).astype(spec.numpy_dtype))
        samples.append(GoldenSample(file=body, content_type=candidate.request.content_type, outputs=paths, label=label))
    return GoldenSet(rtol=thresholds.rtol, atol=atol, samples=tuple(samples)), files


def _candidates(requests: Sequence[LabelledRequest], reference: Reference, served: ServedModel) -> list[_Candidate]:
    """The first requests of each class, then others, each answered alone as a worker will."""
    candidates = []
    for request in _classes_first(requests)[:_CANDIDATES]:
        (answer,) = served.answer([request.parts()])
        if answer.error is not None:
            raise GateError(f"the artifact fails on a golden sample, so there is no archive: {answer.error.message}")
        (expected,) = run_in_groups(reference, served.decode(request.parts()), served.signature)
        _check_finite(expected)
        _check_finite(answer.outputs[0])
        label = answer.body["label"] if served.signature.labels else None
        candidates.append(_Candidate(request=request, expected=expected, actual=answer.outputs[0], label=label))
    return candidates


def _check_finite(outputs: Sample) -> None:
    for name, values in outputs.items():
        if not np.isfinite(values).all():
            raise GateError(
                f"the output {name!r} holds infinity or NaN for a golden sample, so there is no archive; "
                "give evaluation data on which the model's outputs are finite"
            )


def _classes_first(requests: Sequence[LabelledRequest]) -> list[LabelledRequest]:
    firsts: list[LabelledRequest] = []
    rest: list[LabelledRequest] = []
    seen: set[int | None] = set()
    for request in requests:
        (rest if request.label in seen else firsts).append(request)
        seen.add(request.label)
    return firsts + rest


def _scale(rows: Sequence[Array]) -> float:
    """The largest root mean square of one output on one sample, and 1 where all values are 0."""
    return max(map(_root_mean_square, rows), default=0.0) or 1.0


def _root_mean_square(values: Array) -> float:
    size = np.abs(values.astype(np.float64))
    largest = float(size.max(initial=0.0))
    # As shares of the largest, whose squares neither overflow nor vanish.
    return largest * math.sqrt(float(np.square(size / largest).mean())) if largest else 0.0


def _tolerance(
    candidates: Sequence[_Candidate], spec: TensorSpec, scale: float, thresholds: Thresholds, *, exact: bool
) -> float:
    """The absolute tolerance of one output; see the module's docstring."""
    if not spec.dtype.startswith("float"):
        return 0.0
    largest = max(_distance(candidate.expected[spec.name], candidate.actual[spec.name]) for candidate in candidates)
    if exact and thresholds.atol is not None:
        # Whatever was found: a fault that shows in single requests only must not widen it.
        allowed = thresholds.atol * scale
    else:
        allowed = max(2 * largest, _LEAST_NOISE * scale)
    # Never less than the rounding of what is recorded.
    return _two_digits(max(allowed, scale * 2.0**-_ROUNDED_BITS))


def _distance(expected: Array, actual: Array) -> float:
    return float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max(initial=0.0))


def _two_digits(value: float) -> float:
    """Two digits: the rest would only differ from machine to machine."""
    return float(f"{value:.1e}")


def _rounded(values: Array, scale: float) -> Array:
    """Floating values as multiples of a small power of two, without negative zeros; others as they are."""
    if values.dtype.kind != "f":
        return values
    step = math.ldexp(1.0, math.frexp(scale)[1] - 1 - _ROUNDED_BITS)
    if not step:  # next to the smallest numbers there are, which hold no more digits than that
        return values
    with np.errstate(over="ignore"):
        rounded = (np.round(values.astype(np.float64) / step) * step).astype(values.dtype) + values.dtype.type(0)
    # Next to the largest numbers there are, rounding up gives infinity.
    return np.where(np.isfinite(rounded), rounded, values)


def _clear(
    candidates: Sequence[_Candidate],
    recorded: Sequence[Sample],
    atol: Mapping[str, float],
    rtol: float,
    served: ServedModel,
) -> Iterator[tuple[_Candidate, Sample, str | None]]:
    """The candidates whose label no rounding can flip; without labels, all.

    Where no sample has a clear label, as with random weights, outputs alone are compared.
    """
    labels = served.signature.labels
    pairs = list(zip(candidates, recorded, strict=True))
    if not labels:
        yield from ((candidate, outputs, None) for candidate, outputs in pairs)
        return
    name = served.signature.outputs[0].name
    clear = [
        (candidate, outputs, labels[int(outputs[name].argmax())])
        for candidate, outputs in pairs
        if margin(outputs[name]) > 2 * (atol[name] + rtol * float(np.abs(outputs[name]).max()))
    ]
    yield from clear or ((candidate, outputs, None) for candidate, outputs in pairs)


def _npy(values: Array) -> bytes:
    """The bytes of a ``.npy`` file: no pickle, and the same for the same values."""
    buffer = io.BytesIO()
    # Not ascontiguousarray, which makes an array of one axis of a single number.
    np.lib.format.write_array(buffer, np.asarray(values, order="C"), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()
