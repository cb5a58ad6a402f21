"""Which inputs an artifact is compared on: random ones of every shape that the signature allows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from export.inputs import SEED, example_sizes, random_batch, random_samples, value_range
from handlers import batching
from handlers.model import DEFAULT_MAX_BATCH
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch

# One, odd, and the largest: dynamic axes that were baked in fail on one of them.
BATCH_SIZES = (1, 3, 7, DEFAULT_MAX_BATCH)
# Each for itself, as most requests come: a branch on the values of a whole batch, baked in, goes unseen in few batches.
_SINGLE_SAMPLES = 16
# Batches of the longest samples shrink so that a model for long texts is checked in minutes: positions in one batch.
MAX_POSITIONS = 8192
# Ids of special tokens are the lowest of a vocabulary, and random ones hardly ever hit them.
_LOW_IDS = 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One batch to compare on.

    Attributes:
        name: What kind of batch it is, such as ``longest, batch 3``.
        samples: Its samples, which may share a batch.
    """

    name: str
    samples: list[TensorBatch]


def random_cases(signature: Signature) -> Iterator[Case]:
    """Random batches: every size of ``BATCH_SIZES``, with dynamic axes at their shortest, longest and mixed."""
    for sample in random_samples(signature, _SINGLE_SAMPLES, seed=SEED + 3):
        yield Case(name="single samples", samples=[sample])
    if not signature.axes:
        for size in BATCH_SIZES:
            yield Case(name=f"batch {size}", samples=random_samples(signature, size, seed=SEED))
        return
    longest = {name: axis.maximum for name, axis in signature.axes.items()}
    limit = max(1, MAX_POSITIONS // math.prod(longest.values()))
    for size in sorted({min(size, limit) for size in BATCH_SIZES}):
        for kind, sizes in (
            ("shortest", {name: axis.minimum for name, axis in signature.axes.items()}),
            ("longest", longest),
        ):
            yield Case(name=f"{kind}, batch {size}", samples=samples_of_size(signature, size, sizes))
        samples = random_samples(signature, size, seed=SEED + 1)
        for indices in batching.group(samples, signature, size):
            yield Case(name=f"mixed, batch {size}", samples=[samples[i] for i in indices])


def extreme_cases(signature: Signature) -> Iterator[Case]:
    """Batches that random ones do not hit, and on which a branch on values may go the other way.

    All values at their minimum, at their maximum, and zero; one element at its minimum or maximum among random ones;
    and the lowest whole numbers. An input of one possible value keeps it.
    """
    sizes = example_sizes(signature)
    (random,) = samples_of_size(signature, 1, sizes, seed=SEED + 4)
    ranges = {spec.name: value_range(signature, spec) for spec in signature.inputs}
    for kind, side in (("minimum", 0), ("maximum", 1)):
        limits = {name: both[side] for name, both in ranges.items()}
        everywhere = {name: np.broadcast_to(limits[name], values.shape) for name, values in random.items()}
        yield Case(name=f"all at their {kind}", samples=[_typed(everywhere, signature)])
        once = {name: _with_first(values, limits[name]) for name, values in random.items()}
        yield Case(name=f"one at its {kind}", samples=[_typed(once, signature)])
    zeros = {name: np.clip(np.zeros(values.shape), *ranges[name]) for name, values in random.items()}
    yield Case(name="all zero", samples=[_typed(zeros, signature)])
    if any(spec.dtype.startswith("int") for spec in signature.inputs):
        count = min(_LOW_IDS, max(1, MAX_POSITIONS // math.prod(sizes.values())))
        lowest = [{name: _lowest(values, i, *ranges[name]) for name, values in random.items()} for i in range(count)]
        yield Case(name="lowest whole numbers", samples=[_typed(sample, signature) for sample in lowest])


def _typed(sample: TensorBatch, signature: Signature) -> TensorBatch:
    return {spec.name: sample[spec.name].astype(spec.numpy_dtype) for spec in signature.inputs}


def _with_first(values: Array, value: Array) -> Array:
    changed = values.copy()
    changed.reshape(-1)[:1] = np.broadcast_to(value, values.shape).reshape(-1)[:1]
    return changed


def _lowest(values: Array, first: int, low: Array, high: Array) -> Array:
    """Whole numbers from the lowest on, a few of them, beginning with another one in each sample."""
    if values.dtype.kind not in "iu":
        return values
    count = min(_LOW_IDS, int(high) - int(low) + 1)
    return int(low) + (np.arange(values.size).reshape(values.shape) + first) % count


def samples_of_size(
    signature: Signature, count: int, sizes: Mapping[str, int], *, seed: int = SEED
) -> list[TensorBatch]:
    """Random samples whose dynamic axes all have the same sizes."""
    batch = random_batch(signature, count, seed=seed, sizes=sizes)
    return [{name: values[i] for name, values in batch.items()} for i in range(count)]
