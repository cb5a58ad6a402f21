"""What a batch costs: a model of its seconds by batch size and padded shape, fitted to a few measured batches.

A batch has a fixed price (launching every operator), a price for each sample, one for each position (linear layers,
convolutions) and one for each pair of positions (attention). The planner weighs padding against calls with it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.signature import Signature

# Batches that are measured, as far as the largest batch allows. Small ones: their prices are the same, and the worker
# should be ready soon.
_BATCH_SIZES = (1, 2, 4, 8, 16)
_LEAST_PRICE_S = 1e-7
_LEAST_MEASURED = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Seconds of a batch of ``b`` samples with ``p`` positions each, padding included.

    ``call + b * (sample + p * position + p * p * pair)``; no price is negative.

    Attributes:
        call: Seconds for a call, however small.
        sample: Seconds for each sample.
        position: Seconds for each position of each sample.
        pair: Seconds for each pair of positions of each sample.
    """

    call: float = 1.0
    sample: float = 0.0
    position: float = 0.0
    pair: float = 0.0

    def seconds(self, batch: Any, positions: Any) -> Any:
        """The price of a batch; NumPy arrays broadcast."""
        return self.call + batch * (self.sample + positions * (self.position + positions * self.pair))

    @classmethod
    def fit(cls, batches: Sequence[int], positions: Sequence[int], seconds: Sequence[float]) -> CostModel:
        """The model whose relative errors are smallest, in the sense of least squares.

        Args:
            batches: Samples of each measured batch.
            positions: Positions of each sample in it.
            seconds: How long it took.
        """
        b, p, t = (np.asarray(values, dtype=np.float64) for values in (batches, positions, seconds))
        # Divided by what was measured, so that short batches count as much as long ones.
        columns = np.stack([np.ones_like(b), b, b * p, b * p * p], axis=1) / t[:, np.newaxis]
        prices = _non_negative_least_squares(columns, np.ones_like(t))
        return cls(
            call=max(float(prices[0]), _LEAST_PRICE_S),
            sample=float(prices[1]),
            position=float(prices[2]),
            pair=float(prices[3]),
        )


def _non_negative_least_squares(columns: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The best non-negative combination of a few columns: of all subsets, that with the smallest residual."""
    best, least = np.zeros(columns.shape[1]), math.inf
    for size in range(1, columns.shape[1] + 1):
        for chosen in itertools.combinations(range(columns.shape[1]), size):
            found, *_ = np.linalg.lstsq(columns[:, chosen], values, rcond=None)
            if (found < 0).any():
                continue
            residual = float(np.square(columns[:, chosen] @ found - values).sum())
            if residual < least:
                least = residual
                best = np.zeros(columns.shape[1])
                best[list(chosen)] = found
    return best


def measure_cost(
    run: Callable[[int, Mapping[str, int]], object],
    signature: Signature,
    max_batch: int,
    *,
    limit_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> CostModel:
    """Time small batches and fit a model to them.

    Args:
        run: Runs a batch of so many samples with these sizes of the dynamic axes.
        signature: Bounds of the axes.
        max_batch: Samples of the largest batch.
        limit_s: No batch is begun after so many seconds, but for the first few.
        clock: Seconds.
    """
    started = clock()
    batches: list[int] = []
    positions: list[int] = []
    seconds: list[float] = []
    for size, sizes in _shapes(signature, max_batch):
        if len(batches) >= _LEAST_MEASURED and clock() - started > limit_s:
            break
        times = []
        for _ in range(3):
            began = clock()
            run(size, sizes)
            times.append(clock() - began)
        batches.append(size)
        positions.append(math.prod(sizes.values()))
        # The shortest: whatever else the machine does only adds to it.
        seconds.append(max(min(times), _LEAST_PRICE_S))
    return CostModel.fit(batches, positions, seconds)


def _shapes(signature: Signature, max_batch: int) -> list[tuple[int, dict[str, int]]]:
    """Batch sizes at the ends and in the middle of every axis, the cheap ones first."""
    levels: list[dict[str, int]] = [
        {name: round(axis.minimum + share * (axis.maximum - axis.minimum)) for name, axis in signature.axes.items()}
        for share in ((0.0, 0.125, 0.5, 1.0) if signature.axes else (0.0,))
    ]
    sizes = [size for size in _BATCH_SIZES if size <= max_batch] or [1]
    shapes = [(size, level) for size in sizes for level in levels]
    return sorted(shapes, key=lambda shape: shape[0] * math.prod(shape[1].values()))
