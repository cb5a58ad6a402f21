"""Which samples make up a batch: every epoch another order, the same for everybody who knows the seed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import RecipeError
from models.sampler import EvaluationSampler, TrainingSampler

LENGTHS = np.random.default_rng(0).integers(1, 100, 1000)


def epoch(sampler: TrainingSampler, number: int, *, skip: int = 0) -> list[list[int]]:
    sampler.set_position(number, skip=skip)
    return list(sampler)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_an_epoch_has_each_sample_once_but_for_the_remainder(lengths: np.ndarray | None) -> None:
    sampler = TrainingSampler(1000, batch_size=64, seed=0, lengths=lengths)

    batches = epoch(sampler, 0)

    seen = [index for batch in batches for index in batch]
    assert [len(batch) for batch in batches] == [64] * 15 == [64] * len(sampler)
    assert len(set(seen)) == len(seen) == 960


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_epochs_differ_and_repeat_with_the_seed(lengths: np.ndarray | None) -> None:
    sampler = TrainingSampler(1000, batch_size=64, seed=0, lengths=lengths)
    twin = TrainingSampler(1000, batch_size=64, seed=0, lengths=lengths)
    other = TrainingSampler(1000, batch_size=64, seed=1, lengths=lengths)

    assert epoch(sampler, 3) == epoch(twin, 3)
    assert epoch(sampler, 3) != epoch(sampler, 4)
    assert epoch(sampler, 3) != epoch(other, 3)


@pytest.mark.parametrize("lengths", [None, LENGTHS])
def test_an_epoch_is_taken_up_again_at_any_batch(lengths: np.ndarray | None) -> None:
    sampler = TrainingSampler(1000, batch_size=64, seed=0, lengths=lengths)

    assert epoch(sampler, 2, skip=7) == epoch(sampler, 2)[7:]
    assert epoch(sampler, 2, skip=15) == []


def test_buckets_hold_similar_lengths_and_come_in_random_order() -> None:
    bucketed = epoch(TrainingSampler(1000, batch_size=20, seed=0, lengths=LENGTHS), 0)
    random = epoch(TrainingSampler(1000, batch_size=20, seed=0), 0)

    def padded(batches: list[list[int]]) -> int:
        return sum(len(batch) * int(LENGTHS[batch].max()) for batch in batches)

    assert padded(bucketed) < 1.05 * LENGTHS.sum() < 0.6 * padded(random)
    longest = [int(LENGTHS[batch].max()) for batch in bucketed]
    assert longest != sorted(longest)


def test_no_sample_is_always_left_out() -> None:
    lengths = np.arange(70)
    sampler = TrainingSampler(70, batch_size=64, seed=0, lengths=lengths)

    seen = {index for number in range(40) for batch in epoch(sampler, number) for index in batch}

    assert seen == set(range(70))


@given(
    world_size=st.sampled_from([1, 2, 4]), share=st.integers(1, 8), samples=st.integers(32, 200), bucketed=st.booleans()
)
def test_processes_share_the_same_global_batches(world_size: int, share: int, samples: int, bucketed: bool) -> None:
    lengths = LENGTHS[:samples] if bucketed else None
    batch_size = share * world_size
    whole = epoch(TrainingSampler(samples, batch_size=batch_size, seed=5, lengths=lengths), 1)

    parts = [
        epoch(
            TrainingSampler(samples, batch_size=batch_size, seed=5, lengths=lengths, rank=rank, world_size=world_size),
            1,
        )
        for rank in range(world_size)
    ]

    assert all(len(batch) == share for part in parts for batch in part)
    for number, batch in enumerate(whole):
        assert sorted(index for part in parts for index in part[number]) == sorted(batch)


def test_a_batch_larger_than_the_data_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"trainer.batch_size is 11, and the training split has 10 samples"):
        TrainingSampler(10, batch_size=11, seed=0)


def test_a_batch_that_does_not_divide_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"does not divide among 2 processes; make it a multiple of 2"):
        TrainingSampler(100, batch_size=11, seed=0, world_size=2)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("lengths", [None, LENGTHS[:100]])
def test_evaluation_sees_each_sample_once_in_all(lengths: np.ndarray | None, world_size: int) -> None:
    samplers = [
        EvaluationSampler(100, batch_size=16, lengths=lengths, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]

    seen = sorted(index for sampler in samplers for batch in sampler for index in batch)

    assert seen == list(range(100))
    assert all(len(list(sampler)) == len(sampler) for sampler in samplers)
