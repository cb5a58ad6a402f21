"""Comparison of two sets of outputs, sample by sample, in constant memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from export.thresholds import Thresholds
from handlers.signature import Signature
from handlers.tensors import Array, TensorSpec

Sample = Mapping[str, Array]

# Outputs that hardly differ from sample to sample (random inputs to a random model) differ by little more than the
# rounding of their common part; the spread counts as at least this share of their root mean square.
_LEAST_SPREAD = 0.1


# Outputs of more channels than this are like images, whose channels have no meanings of their own.
_MOST_CHANNELS = 4096
# Rounding of a channel's neighbours, as a share of the whole output's root mean square: a layer's matrix product.
_CHANNEL_ROUNDING = 8 * float(np.finfo(np.float32).eps)


@dataclass(slots=True)
class _Case:
    """Differences of one output in one kind of batches."""

    squares: float = 0.0
    values: int = 0
    channels: NDArray[np.float64] | float = 0.0


class _Spread:
    """Variance from sample to sample, added up row by row (Chan, Golub and LeVeque, 1983)."""

    def __init__(self) -> None:
        self._rows = 0
        self._mean: NDArray[np.float64] | None = None
        self._deviations: NDArray[np.float64] = np.zeros(1)
        self._squares: NDArray[np.float64] = np.zeros(1)
        self._values = 0

    def add(self, rows: NDArray[np.float64]) -> None:
        """Take in ``[rows, channels]``."""
        count = len(rows)
        mean = rows.mean(axis=0)
        self._squares = self._squares + np.square(rows).sum(axis=0)
        self._values += rows.size
        self._deviations = self._deviations + np.square(rows - mean).sum(axis=0)
        if self._mean is None:
            self._mean = mean
        else:
            shift = mean - self._mean
            self._deviations += np.square(shift) * (self._rows * count / (self._rows + count))
            self._mean = self._mean + shift * (count / (self._rows + count))
        self._rows += count

    def value(self) -> float:
        """The spread; where nothing varies a share of the values' own size, and 1 where all are 0."""
        spread = math.sqrt(_mean(float(self._deviations.sum()), self._values))
        if self._rows < 2:
            return self.size or 1.0
        return max(spread, _LEAST_SPREAD * self.size) or 1.0

    @property
    def size(self) -> float:
        """Root mean square of all values."""
        return math.sqrt(_mean(float(self._squares.sum()), self._values))

    def of_channels(self, count: int) -> NDArray[np.float64]:
        """The same for each entry of a last axis of ``count`` entries; it may be 0."""
        values = max(1, self._values // count)
        sizes, spreads = (
            np.sqrt(np.broadcast_to(sums.reshape(-1, count).sum(axis=0), count) / values)
            for sums in (self._squares, self._deviations)
        )
        least: NDArray[np.float64] = np.maximum(spreads, _LEAST_SPREAD * sizes) if self._rows > 1 else sizes
        return least


@dataclass(slots=True)
class Differences:
    """How far the actual values of one output lie from the expected ones.

    Attributes:
        spec: The output.
        largest: Largest absolute difference.
        excess: Largest difference as a multiple of what ``atol`` and ``rtol`` allow.
        unequal: Values that differ at all; for whole numbers and booleans.
    """

    spec: TensorSpec
    largest: float = 0.0
    excess: float = 0.0
    unequal: int = 0
    _values: int = 0
    _worst_sample: float = 0.0
    _cases: dict[str, _Case] = field(default_factory=dict)
    _spread: _Spread = field(default_factory=_Spread)

    @property
    def is_float(self) -> bool:
        """Whether the output has distances, and not only equality."""
        return self.spec.dtype.startswith("float")

    def add(self, case: str, expected: Sequence[Array], actual: Sequence[Array], thresholds: Thresholds) -> None:
        """Take in the rows of one batch; shapes agree and all values are finite.

        Args:
            case: What kind of batch it was; noise is measured for each kind on its own, so that a fault in long
                samples is not lost among many short ones.
            expected: One array a sample.
            actual: The same for the other side.
            thresholds: ``atol`` and ``rtol`` count here.
        """
        tally = self._cases.setdefault(case, _Case())
        scale = max(1.0, math.sqrt(_mean(sum(_squares(row) for row in expected), sum(row.size for row in expected))))
        atol = (thresholds.atol or 0.0) * scale
        for right, row in zip(expected, actual, strict=True):
            if not right.size:
                continue
            self._values += right.size
            self.unequal += int((right != row).sum())
            if not self.is_float:
                continue
            difference = np.abs(row.astype(np.float64) - right)
            squares = _squares(difference)
            tally.squares += squares
            tally.values += right.size
            if self.channels:
                tally.channels = tally.channels + np.square(difference).reshape(-1, self.channels).sum(axis=0)
            self._worst_sample = max(self._worst_sample, squares / right.size)
            self.largest = max(self.largest, float(difference.max()))
            if thresholds.atol is not None:
                with np.errstate(invalid="ignore", divide="ignore"):  # 0 / 0 where atol is 0 and so is the difference
                    excess = difference / (atol + thresholds.rtol * np.abs(right))
                self.excess = max(self.excess, float(np.nan_to_num(excess, nan=0.0, posinf=math.inf).max()))
            self._spread.add(_channels(right, self.spec))

    @property
    def compared(self) -> bool:
        """Whether there was anything to compare."""
        return self._values > 0

    @property
    def spread(self) -> float:
        """Root mean square by which the expected values differ from sample to sample, never 0."""
        return self._spread.value()

    @property
    def size(self) -> float:
        """Root mean square of the expected values."""
        return self._spread.size

    @property
    def channels(self) -> int:
        """Entries of the last axis, each of which may have a scale of its own; 0 where there are no such."""
        last = self.spec.shape[-1] if len(self.spec.shape) > 1 else 1
        return last if isinstance(last, int) and 1 < last <= _MOST_CHANNELS else 0

    def worst_channel(self, bound: float) -> tuple[int, float]:
        """The channel with the greatest noise, and that noise as a share of the spread of this channel alone.

        Args:
            bound: The noise that a channel may have. Channels that vary by so little that it is less than the
                rounding of the whole output are held to that rounding instead.
        """
        if not self.channels or not self.compared:
            return 0, 0.0
        floor = _CHANNEL_ROUNDING * self.size / max(bound, _CHANNEL_ROUNDING)
        spreads = np.maximum(self._spread.of_channels(self.channels), floor)
        spreads = np.where(spreads > 0, spreads, 1.0)
        cases = [
            np.sqrt(np.asarray(case.channels) / (case.values // self.channels)) / spreads
            for case in self._cases.values()
            if case.values
        ]
        noise = np.max(cases, axis=0)
        worst = int(noise.argmax())
        return worst, float(noise[worst])

    @property
    def noise(self) -> float:
        """Root mean square of the differences as a share of :attr:`spread`, in the worst kind of batches."""
        worst = max((_mean(case.squares, case.values) for case in self._cases.values()), default=0.0)
        return math.sqrt(worst) / self.spread

    @property
    def worst_case(self) -> str:
        """The kind of batches with the greatest noise."""
        return max(self._cases, key=lambda name: _mean(self._cases[name].squares, self._cases[name].values), default="")

    @property
    def outlier(self) -> float:
        """The noise of the worst single sample."""
        return math.sqrt(self._worst_sample) / self.spread

    @property
    def unequal_share(self) -> float:
        """Share of values that differ at all."""
        return _mean(self.unequal, self._values)


def _channels(row: Array, spec: TensorSpec) -> NDArray[np.float64]:
    """One sample's output as ``[rows, channels]``: what has a mean over the samples is a channel.

    Of a fixed shape every element is; else those of the last axis, if its size is fixed.
    """
    values = row.astype(np.float64)
    if not spec.dynamic_axes:
        return values.reshape(1, -1)
    return values.reshape(-1, values.shape[-1]) if isinstance(spec.shape[-1], int) else values.reshape(-1, 1)


def _squares(values: Array) -> float:
    return float(np.square(values, dtype=np.float64).sum())


def _mean(total: float, count: int) -> float:
    return total / count if count else 0.0


def fault_of(outputs: Sample, batch_shapes: Mapping[str, tuple[int, ...]], signature: Signature) -> str | None:
    """What is wrong with the form of a batch of outputs; None if nothing is.

    Args:
        outputs: Arrays by name, ``[batch, ...]``.
        batch_shapes: Shapes of the inputs, from which the sizes of dynamic axes follow.
        signature: What the outputs must be.
    """
    sizes: dict[str, int] = {}
    for spec in signature.inputs:
        for axis, size in zip(spec.shape, batch_shapes[spec.name], strict=True):
            if isinstance(axis, str):
                sizes[axis] = size
    for spec in signature.outputs:
        array = outputs.get(spec.name)
        if array is None:
            return f"no output {spec.name!r}"
        if str(array.dtype) != spec.dtype:
            return f"{spec.name!r} as {array.dtype} instead of {spec.dtype}"
        right = len(array.shape) == len(spec.shape) and all(
            # An axis that only outputs have may have any size.
            size == (sizes.get(axis, size) if isinstance(axis, str) else axis)
            for axis, size in zip(spec.shape, array.shape, strict=True)
        )
        if not right:
            shape = [sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in spec.shape]
            return f"{spec.name!r} with the shape {list(array.shape)} instead of {shape}"
    return None


def is_finite(outputs: Sample) -> bool:
    """Whether no value is NaN or infinite."""
    return all(bool(np.isfinite(array).all()) for array in outputs.values())
