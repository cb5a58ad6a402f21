"""Loaders: the batches that a sampler asks for, with and without workers."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch

from models import dataloader
from models.batch import Batch
from models.dataloader import build_loader, choose_workers
from models.sampler import EvaluationSampler, TrainingSampler

CPU = torch.device("cpu")


class Sample(NamedTuple):
    id: int
    value: float


class Numbers:
    """A split of numbers, each its own index."""

    lengths = None

    def __init__(self, count: int, *, in_memory: bool = True) -> None:
        self.labels = np.zeros(count, dtype=np.int64)
        self.in_memory = in_memory

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Sample:
        return Sample(index, float(index))


def collate(samples: Sequence[Sample]) -> Batch:
    ids = torch.tensor([sample.id for sample in samples])
    return Batch(
        inputs={"x": torch.tensor([sample.value for sample in samples])}, labels=torch.zeros_like(ids), ids=ids
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_the_sampler_in_its_order(workers: int) -> None:
    sampler = TrainingSampler(50, batch_size=8, seed=1)
    loader = build_loader(Numbers(50), sampler, collate, device=CPU, workers=workers)

    for epoch in range(2):
        sampler.set_position(epoch)
        expected = list(sampler)
        batches = list(loader)
        assert [batch.ids.tolist() for batch in batches] == expected
        assert all(torch.equal(batch.inputs["x"], batch.ids.float()) for batch in batches)
        assert len(batches) == len(loader) == 6
    assert loader.persistent_workers is (workers > 0)


def test_the_last_batch_of_an_evaluation_is_kept() -> None:
    loader = build_loader(Numbers(10), EvaluationSampler(10, batch_size=4), collate, device=CPU)

    assert [len(batch) for batch in loader] == [4, 4, 2]


def test_iterating_leaves_the_random_generator_alone() -> None:
    loader = build_loader(Numbers(10), EvaluationSampler(10, batch_size=4), collate, device=CPU)
    before = torch.get_rng_state()

    list(loader)

    assert torch.equal(torch.get_rng_state(), before)


def test_memory_is_pinned_for_a_gpu_only() -> None:
    sampler = EvaluationSampler(10, batch_size=4)

    assert not build_loader(Numbers(10), sampler, collate, device=CPU).pin_memory
    assert build_loader(Numbers(10), sampler, collate, device=torch.device("cuda")).pin_memory


@pytest.mark.parametrize(("cores", "workers"), [(1, 0), (2, 1), (5, 4), (64, 4)])
def test_workers_are_for_samples_that_must_be_read(monkeypatch: pytest.MonkeyPatch, cores: int, workers: int) -> None:
    monkeypatch.setattr(dataloader.os, "sched_getaffinity", lambda _: set(range(cores)))

    assert choose_workers(Numbers(10, in_memory=False)) == workers
    assert choose_workers(Numbers(10)) == 0


def test_a_batch_splits_into_almost_equal_parts() -> None:
    batch = collate([Sample(index, index) for index in range(7)])

    assert [part.ids.tolist() for part in batch.split(3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [len(part) for part in batch.split(1)] == [7]
    assert [len(part) for part in batch.split(20)] == [1] * 7
    assert batch.split(2)[1].inputs["x"].tolist() == [4.0, 5.0, 6.0]
