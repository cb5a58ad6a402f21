"""Which inputs an artifact is compared on: random ones of every shape that the signature allows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from export.inputs import SEED, random_batch, random_samples
from handlers import batching
from handlers.model import DEFAULT_MAX_BATCH
from handlers.signature import Signature
from handlers.tensors import TensorBatch

# One, odd, and the largest: dynamic axes that were baked in fail on one of them.
BATCH_SIZES = (1, 3, 7, DEFAULT_MAX_BATCH)
# Each for itself, as most requests come: a branch on the values of a whole batch, baked in, goes unseen in few batches.
_SINGLE_SAMPLES = 16
# Batches of the longest samples shrink so that a model for long texts is checked in minutes: positions in one batch.
MAX_POSITIONS = 8192


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


def samples_of_size(
    signature: Signature, count: int, sizes: Mapping[str, int], *, seed: int = SEED
) -> list[TensorBatch]:
    """Random samples whose dynamic axes all have the same sizes."""
    batch = random_batch(signature, count, seed=seed, sizes=sizes)
    return [{name: values[i] for name, values in batch.items()} for i in range(count)]
