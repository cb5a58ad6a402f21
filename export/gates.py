"""Gates: an artifact gets into an archive only when it computes what its checkpoint computes.

Every gate compares the *reference* (the eager module with the checkpoint's weights, in float32) with the *served
model* (the written artifact, loaded and fed by the very code that runs in a worker). All failures are reported
together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from export.comparison import Differences, Sample, fault_of, is_finite
from export.thresholds import Thresholds
from handlers import batching
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch

# Faults of the same kind come in every batch: a few of them say all.
_SHOWN_FAULTS = 3
# Differences are about normally distributed: four times their root mean square is passed once in 16,000 values.
_TIE_WIDTH = 4.0
# How much more than all samples together any one may differ.
_OUTLIER = 5.0
# How much more than the whole output any one channel may differ: clean ones differ in how they amplify rounding, and
# one that is wrong differs by as much as it varies.
_CHANNEL = 200.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GateResult:
    """The outcome of one gate.

    Attributes:
        gate: Its name.
        passed: Whether the artifact may go on.
        measured: What was found; None when there is nothing to measure.
        bound: What it was held against; None when there is no number.
        detail: One sentence.
    """

    gate: str
    passed: bool
    measured: float | None = None
    bound: float | None = None
    detail: str

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        document = asdict(self)
        if self.measured is not None and not math.isfinite(self.measured):
            document["measured"] = None  # JSON has no word for it
        return document


class Comparison:
    """Expected outputs against actual ones, over many batches.

    Args:
        signature: Names, dtypes and shapes of the outputs.
        thresholds: What is allowed.
        noise: Greatest noise; None takes that of ``thresholds`` for evaluation data.
        ranked: Whether the only output is one of classes, of which the greatest is the answer.
        expected: What is right, for messages.
        actual: What is to be checked, for messages.
    """

    def __init__(
        self,
        signature: Signature,
        thresholds: Thresholds,
        *,
        noise: float | None = None,
        ranked: bool = False,
        expected: str = "the checkpoint itself",
        actual: str = "the artifact",
    ) -> None:
        self._noise = thresholds.noise if noise is None else noise
        self._ranked = ranked
        self._expected = expected
        self._actual = actual
        self._signature = signature
        self._thresholds = thresholds
        self._differences = [Differences(spec=spec) for spec in signature.outputs]
        self._faults: list[str] = []
        self._batches = 0
        self._samples = 0
        self._margins: list[tuple[float, bool]] = []

    def add(self, case: str, samples: Sequence[Sample], expected: TensorBatch, actual: TensorBatch) -> None:
        """Take in the outputs of one batch.

        Args:
            case: What kind of batch it was.
            samples: The inputs.
            expected: The reference's outputs, ``[batch, ...]``.
            actual: The artifact's outputs, ``[batch, ...]``.
        """
        shapes = _stacked_shapes(samples, self._signature)
        for who, outputs in ((self._expected, expected), (self._actual, actual)):
            fault = fault_of(outputs, shapes, self._signature)
            if fault is not None:
                self.fail(f"{who} gives {fault} ({case})")
                return
        self.add_rows(
            case,
            batching.split(expected, samples, self._signature),
            batching.split(actual, samples, self._signature),
        )

    def add_rows(self, case: str, expected: Sequence[Sample], actual: Sequence[Sample]) -> None:
        """Take in outputs sample by sample, padding cut off."""
        self._batches += 1
        self._samples += len(expected)
        finite = [(is_finite(right), is_finite(row)) for right, row in zip(expected, actual, strict=True)]
        if not all(right for right, _ in finite):
            too = f", and so does {self._actual}" if not all(row for _, row in finite) else ""
            self.fail(f"{self._expected} gives NaN or infinity{too} ({case})")
            return
        if not all(row for _, row in finite):
            self.fail(f"{self._actual} gives NaN or infinity where {self._expected} does not ({case})")
            return
        for differences in self._differences:
            name = differences.spec.name
            if any(name not in sample for sample in expected):  # given outputs may leave some out
                continue
            right, rows = [sample[name] for sample in expected], [sample[name] for sample in actual]
            if any(a.shape != b.shape for a, b in zip(right, rows, strict=True)):
                self.fail(f"{self._actual} gives {name!r} in another shape than {self._expected} ({case})")
                return
            differences.add(case, right, rows, self._thresholds)
        if self._ranked:
            name = self._signature.outputs[0].name
            self._margins.extend(
                (margin(right[name]), int(right[name].argmax()) == int(row[name].argmax()))
                for right, row in zip(expected, actual, strict=True)
            )

    def fail(self, fault: str) -> None:
        """Note a fault that no number measures, such as a crash."""
        if fault not in self._faults:
            self._faults.append(fault)

    @property
    def tie_width(self) -> float:
        """The margin of a class over the next one that the measured differences can turn round."""
        if not self._ranked:
            return 0.0
        differences = self._differences[0]
        return min(_TIE_WIDTH * differences.noise, 2 * self._noise) * differences.spread

    @property
    def sizes(self) -> dict[str, float]:
        """Root mean square of what is right, by the name of each output that has distances."""
        return {one.spec.name: one.size for one in self._floats()}

    def outputs_gate(self, gate: str) -> GateResult:
        """Whether every batch ran and gave finite outputs of the right form."""
        shown = "; ".join(self._faults[:_SHOWN_FAULTS])
        more = f"; and {len(self._faults) - _SHOWN_FAULTS} more" if len(self._faults) > _SHOWN_FAULTS else ""
        return GateResult(
            gate=gate,
            passed=not self._faults and self._samples > 0,
            detail=shown + more
            if self._faults
            else f"{self._samples} samples in {self._batches} batches, all finite and of the signature's form",
        )

    def parity_gate(self, gate: str) -> GateResult | None:
        """Single values against ``atol`` and ``rtol``; None where the thresholds name none, or nothing compares."""
        floats = self._floats()
        if self._thresholds.atol is None or not floats:
            return None
        worst = max(floats, key=lambda one: one.excess)
        return GateResult(
            gate=gate,
            passed=worst.excess <= 1.0,
            measured=worst.excess,
            bound=1.0,
            detail=f"largest difference {max(one.largest for one in floats):.2g}{self._of(worst)}, "
            f"{worst.excess:.2g} of what atol {self._thresholds.atol:g} and rtol {self._thresholds.rtol:g} allow",
        )

    def noise_gate(self, gate: str) -> GateResult | None:
        """The differences against the spread of the outputs; None where nothing compares."""
        floats = self._floats()
        if not floats:
            return None
        worst = max(floats, key=lambda one: one.noise)
        outlier = max(floats, key=lambda one: one.outlier)
        detail = f"differences are {worst.noise:.2g} of what outputs vary by{self._of(worst)} ({worst.worst_case})"
        outlier_bound = _OUTLIER * self._noise
        channel_bound = min(1.0, _CHANNEL * self._noise)
        channels = [(*one.worst_channel(channel_bound), one) for one in floats] if self._is_exact else []
        channel, channel_noise, of = max(channels, key=lambda item: item[1], default=(0, 0.0, worst))
        if outlier.outlier > outlier_bound:
            detail += f", and {outlier.outlier:.2g} for one sample, where {outlier_bound:g} is allowed"
        if channel_noise > channel_bound:
            detail += (
                f", and those of channel {channel}{self._of(of)} {channel_noise:.2g} of what it varies by itself, "
            )
            detail += f"where {channel_bound:g} is allowed"
        return GateResult(
            gate=gate,
            passed=worst.noise <= self._noise and outlier.outlier <= outlier_bound and channel_noise <= channel_bound,
            measured=worst.noise,
            bound=self._noise,
            detail=detail,
        )

    def equality_gate(self, gate: str) -> GateResult | None:
        """Whole numbers and booleans, which have no distances; None where there are none."""
        exact = [one for one in self._differences if not one.is_float]
        if not exact or not self._samples:
            return None
        worst = max(exact, key=lambda one: one.unequal_share)
        share = 1.0 - worst.unequal_share
        return GateResult(
            gate=gate,
            passed=share >= self._thresholds.agreement,
            measured=share,
            bound=self._thresholds.agreement,
            detail=f"{worst.unequal} values of {worst.spec.name!r} differ",
        )

    def ranking_gate(self, gate: str) -> GateResult | None:
        """The class that ranks first, where it leads by more than rounding can turn round; None without classes."""
        if not self._margins:
            return None
        clear = [same for lead, same in self._margins if lead > self.tie_width]
        share = sum(clear) / len(clear) if clear else 1.0
        ties = len(self._margins) - len(clear)
        detail = f"the same class ranks first for {sum(clear)} of {len(clear)} samples"
        if ties:
            detail += f"; {ties} more are too close to call"
        if not clear:
            detail = f"could not be judged: all {ties} samples are too close to call"
        return GateResult(
            gate=gate,
            passed=share >= self._thresholds.agreement,
            measured=share,
            bound=self._thresholds.agreement,
            detail=detail,
        )

    def results(self, suffix: str = "") -> list[GateResult]:
        """All of these gates but the ranking."""
        gates = (
            self.outputs_gate(f"outputs{suffix}"),
            self.parity_gate(f"parity{suffix}"),
            self.noise_gate(f"noise{suffix}"),
            self.equality_gate(f"equality{suffix}"),
        )
        return [gate for gate in gates if gate is not None]

    @property
    def _is_exact(self) -> bool:
        # Lower precisions may round small channels away beside large ones.
        return self._thresholds.atol is not None

    def _floats(self) -> list[Differences]:
        return [one for one in self._differences if one.is_float and one.compared]

    def _of(self, differences: Differences) -> str:
        return f" in {differences.spec.name!r}" if len(self._differences) > 1 else ""


def margin(logits: Array) -> float:
    """By how much the first class leads the second."""
    if len(logits) < 2:
        return math.inf
    second, first = np.partition(logits.astype(np.float64), -2)[-2:]
    return float(first - second)


def _stacked_shapes(samples: Sequence[Sample], signature: Signature) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs of a batch, from those of its samples: the largest of each axis."""
    return {
        spec.name: (
            len(samples),
            *(max(sizes) for sizes in zip(*(one[spec.name].shape for one in samples), strict=True)),
        )
        for spec in signature.inputs
    }
