"""Plans: which samples run together, so that padding and calls cost least."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from handlers.cost import CostModel
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch

# Above so many samples of one kind, sorted neighbours are so alike that full batches are as good as any: the exact
# plan takes time that grows with their number times the largest batch.
MOST_PLANNED = 512


def plan(samples: Sequence[TensorBatch], signature: Signature, cost: CostModel, *, max_batch: int) -> list[list[int]]:
    """Say which samples run together.

    Samples are sorted by size, and the sorted row is cut where the sum of all batches' costs is smallest: by dynamic
    programming over every cut that ``max_batch`` allows.

    Args:
        samples: Any number of them.
        signature: Which axes are dynamic, and how they are padded.
        cost: Prices.
        max_batch: Samples of the largest batch.

    Returns:
        Positions in ``samples``, each in exactly one batch; the longest batches come last. Samples of different sizes
        share one only if every dynamic input has a padding.
    """
    shapes = _shapes(samples, signature)
    padded = all(spec.padding is not None for spec in signature.inputs if spec.dynamic_axes)
    if padded:
        kinds = [list(range(len(samples)))] if samples else []
    else:
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for i, shape in enumerate(shapes):
            by_shape.setdefault(shape, []).append(i)
        kinds = list(by_shape.values())
    batches: list[list[int]] = []
    for kind in kinds:
        ordered = sorted(kind, key=lambda i: (math.prod(shapes[i]), shapes[i]))
        cuts = _cuts([shapes[i] for i in ordered], cost, max_batch)
        batches += [ordered[start:stop] for start, stop in zip([0, *cuts], cuts, strict=False)]
    return batches


def in_turn(
    batches: Sequence[list[int]],
    samples: Sequence[TensorBatch],
    waited: Sequence[float],
    signature: Signature,
    cost: CostModel,
) -> list[list[int]]:
    """Put batches in the order in which they should run, while more arrives.

    What a batch is worth is the time that its samples would take without calls and padding, divided by the time that it
    takes, which is below 1; plus the time that its oldest sample has waited, divided by the time that all of these
    batches take. So nothing waits for more than a few times that long.

    Args:
        batches: Positions in ``samples``.
        samples: All of them.
        waited: Seconds that each has waited so far.
        signature: Which axes are dynamic.
        cost: Prices.
    """
    shapes = _shapes(samples, signature)
    alone = [cost.seconds(1, math.prod(shape)) - cost.call for shape in shapes]
    seconds = [cost.seconds(len(batch), _largest([shapes[i] for i in batch])) for batch in batches]
    total = sum(seconds)
    worth = [
        sum([alone[i] for i in batch]) / own + max([waited[i] for i in batch]) / total
        for batch, own in zip(batches, seconds, strict=True)
    ]
    return [batches[k] for k in sorted(range(len(batches)), key=worth.__getitem__, reverse=True)]


def positions(samples: Sequence[TensorBatch], signature: Signature) -> int:
    """Positions of each sample of a batch, padding included: the product of the largest sizes."""
    return _largest(_shapes(samples, signature))


def padding_share(samples: Sequence[TensorBatch], signature: Signature) -> float:
    """The share of a batch's positions that padding fills: 0 where all samples are as large."""
    shapes = _shapes(samples, signature)
    return 1 - sum(map(math.prod, shapes)) / (len(shapes) * _largest(shapes))


def _shapes(samples: Sequence[TensorBatch], signature: Signature) -> list[tuple[int, ...]]:
    """Of each sample, the sizes of the dynamic axes, by the signature's order of them."""
    # Where inputs share an axis, the last one tells its size; requests in which they differ were refused.
    found = {axis: (spec.name, place - 1) for spec in signature.inputs for place, axis in spec.dynamic_axes.items()}
    places = [found[axis] for axis in signature.axes if axis in found]
    return [tuple([sample[name].shape[place] for name, place in places]) for sample in samples]


def _largest(shapes: Sequence[tuple[int, ...]]) -> int:
    return math.prod(map(max, zip(*shapes, strict=True)))


def _cuts(shapes: Sequence[tuple[int, ...]], cost: CostModel, max_batch: int) -> list[int]:
    """Where batches of sorted samples end."""
    count = len(shapes)
    # Where all are alike, too: of all that cost the same, the oldest run first then, and the rest waits for company.
    if count > MOST_PLANNED or shapes[0] == shapes[-1]:
        return [*range(max_batch, count, max_batch), count]
    if len(shapes[0]) <= 1:
        cuts = _cuts_of_a_row([math.prod(shape) for shape in shapes], cost)
        if all(stop - start <= max_batch for start, stop in itertools.pairwise([0, *cuts])):
            return cuts
    # seconds[i, j]: a batch of the samples i to j.
    sizes = np.asarray(shapes, dtype=np.float64).reshape(count, -1)
    starts, stops = np.arange(count)[:, np.newaxis], np.arange(count)
    if sizes.shape[1] <= 1:  # sorted by its size, so the last sample of a batch is its longest
        positions = np.broadcast_to(sizes.prod(axis=1), (count, count))
    else:
        positions = np.ones((count, count))
        for axis in range(sizes.shape[1]):
            # The largest of the samples i to j: running maxima of the rest of the column.
            positions *= np.stack([_running_maximum(sizes[:, axis], i) for i in range(count)])
    batch = stops - starts + 1
    seconds = np.where((batch >= 1) & (batch <= max_batch), cost.seconds(batch, positions), np.inf)
    # total[j]: all batches of the samples before j.
    total = np.zeros(count + 1)
    begins = np.zeros(count, dtype=np.int64)
    for j in range(count):
        low = max(0, j + 1 - max_batch)
        choices = total[low : j + 1] + seconds[low : j + 1, j]
        best = int(choices.argmin())
        begins[j] = low + best
        total[j + 1] = choices[best]
    cuts = []
    stop = count
    while stop:
        cuts.append(stop)
        stop = int(begins[stop - 1])
    return cuts[::-1]


def _cuts_of_a_row(sizes: Sequence[int], cost: CostModel) -> list[int]:
    """Where batches of any number of sorted samples end: the same programme, in time that grows with their number.

    The last sample of a batch is its longest, so the samples i to j cost the call and ``j + 1 - i`` times the price of
    j. The best i is then the lowest of lines, one for each i, whose slope is -i, at the price of j: since prices grow,
    lines that others have undercut can be forgotten.
    """
    # totals[i]: all batches of the samples before i. hull: the lines that may still be the lowest, from head on.
    totals = [0.0]
    begins = []
    hull: list[int] = []
    head = 0
    for j, size in enumerate(sizes):
        while len(hull) - head >= 2 and _is_undercut(hull[-2], hull[-1], j, totals):
            hull.pop()
        hull.append(j)
        price = cost.seconds(1, size) - cost.call
        while len(hull) - head >= 2 and totals[hull[head + 1]] - hull[head + 1] * price <= (
            totals[hull[head]] - hull[head] * price
        ):
            head += 1
        best = hull[head]
        begins.append(best)
        totals.append(totals[best] + cost.call + (j + 1 - best) * price)
    cuts = []
    stop = len(sizes)
    while stop:
        cuts.append(stop)
        stop = begins[stop - 1]
    return cuts[::-1]


def _is_undercut(first: int, middle: int, last: int, totals: Sequence[float]) -> bool:
    """Whether one of the two lines around a line is lower than it at every price."""
    return (totals[last] - totals[first]) * (middle - first) <= (totals[middle] - totals[first]) * (last - first)


def _running_maximum(values: Array, start: int) -> Array:
    result: Array = np.maximum.accumulate(np.where(np.arange(len(values)) >= start, values, 0))
    return result
