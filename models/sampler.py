"""Which samples make up each batch, epoch by epoch, on each of several processes."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from models.errors import RecipeError

# Batches that are sorted together. More waste less on padding but leave less to chance; beyond 50 nothing is gained.
_BATCHES_PER_POOL = 50


class TrainingSampler(Sampler[list[int]]):
    """Batches of a shuffled epoch, without its incomplete last one.

    The order is a function of the seed and the epoch alone, so an epoch can be taken up again at any batch, and several
    processes agree on it without talking: each takes its share of the same global batches.

    Args:
        samples: how many there are.
        batch_size: samples per step, over all processes.
        seed: decides the orders.
        lengths: [samples] tokens each; given, batches hold samples of similar length, in random order.
        rank: number of this process.
        world_size: number of processes.

    Raises:
        RecipeError: when a batch is larger than the data set, or does not divide among the processes.
    """

    def __init__(
        self,
        samples: int,
        *,
        batch_size: int,
        seed: int,
        lengths: npt.NDArray[np.int64] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size > samples:
            raise RecipeError(
                f"trainer.batch_size is {batch_size}, and the training split has {samples} samples; lower it."
            )
        if batch_size % world_size:
            raise RecipeError(
                f"trainer.batch_size is {batch_size}, which does not divide among {world_size} processes; "
                f"make it a multiple of {world_size}."
            )
        self._samples = samples
        self._batch_size = batch_size
        self._seed = seed
        self._lengths = lengths
        self._rank = rank
        self._world_size = world_size
        self._epoch = 0
        self._skip = 0

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self._samples // self._batch_size

    def set_position(self, epoch: int, *, skip: int = 0) -> None:
        """Chooses what the next iteration yields.

        Args:
            epoch: from 0.
            skip: batches of it that are done already.
        """
        self._epoch = epoch
        self._skip = skip

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self._seed, self._epoch])
        batches = self._batches(generator)
        for batch in batches[self._skip :]:
            # Every n-th one: neighbours in a sorted pool are alike, so all processes get the same mix of lengths.
            yield batch[self._rank :: self._world_size].tolist()

    def _batches(self, generator: np.random.Generator) -> npt.NDArray[np.int64]:
        """[batches, batch_size] indices."""
        order = generator.permutation(self._samples)
        if self._lengths is None:
            return order[: len(self) * self._batch_size].reshape(len(self), self._batch_size)
        pool = _BATCHES_PER_POOL * self._batch_size
        # Stable: samples of one length stay in their random order.
        pools = [
            part[np.argsort(self._lengths[part], kind="stable")]
            for part in np.split(order, range(pool, self._samples, pool))
        ]
        # The remainder is cut off a random place, or the longest samples of the last pool would never be seen.
        last = pools.pop()
        surplus = len(last) % self._batch_size
        last = np.delete(last, generator.choice(len(last), surplus, replace=False))
        batches = np.concatenate([*pools, last]).reshape(-1, self._batch_size)
        return batches[generator.permutation(len(batches))]


class EvaluationSampler(Sampler[list[int]]):
    """Every sample once, in batches of similar length; the last one may be smaller.

    Args:
        samples: how many there are.
        batch_size: samples per batch of one process.
        lengths: [samples] tokens each; given, samples come sorted by it, which wastes least on padding.
        rank: number of this process; it sees each world_size-th sample.
        world_size: number of processes.
    """

    def __init__(
        self,
        samples: int,
        *,
        batch_size: int,
        lengths: npt.NDArray[np.int64] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        order = np.arange(samples) if lengths is None else np.argsort(lengths, kind="stable")
        self._order = order[rank::world_size]
        self._batch_size = batch_size

    def __len__(self) -> int:
        """Batches of this process."""
        return math.ceil(len(self._order) / self._batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self._order), self._batch_size):
            yield self._order[start : start + self._batch_size].tolist()
