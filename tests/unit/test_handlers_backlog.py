"""What waits: each sample runs once, in the batch that pays best by then, and nobody waits for ever."""

import random

import numpy as np
import pytest

from handlers import backlog
from handlers.backlog import Backlog
from handlers.cost import CostModel
from handlers.planner import in_turn, plan
from handlers.signature import Signature

SIGNATURE = Signature.from_document(
    {
        "format_version": 1,
        "task": "tensor",
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", "length"], "padding": 0}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch"]}],
        "axes": {"length": {"maximum": 64}},
    }
)
COST = CostModel(call=0.002, position=0.0001)
MAX_BATCH = 8


def sample(length):
    return {"x": np.zeros(length, np.float32)}


class Planned:
    """Plans as a worker does; notes how many samples each plan has, and what they have waited."""

    def __init__(self):
        self.sizes = []
        self.waited = []

    def __call__(self, samples, waited):
        self.sizes.append(len(samples))
        self.waited.append(list(waited))
        batches = plan(samples, SIGNATURE, COST, max_batch=MAX_BATCH)
        return in_turn(batches, samples, waited, SIGNATURE, COST)


@pytest.fixture
def planned():
    return Planned()


@pytest.fixture
def waiting(planned):
    return Backlog(planned)


def fill(waiting, lengths, arrived=0.0):
    for i, length in enumerate(lengths):
        waiting.add((i, length), sample(length), arrived)


def test_places_and_samples_belong_together_and_come_once(waiting):
    generator = random.Random(1)
    fill(waiting, [generator.randint(1, 64) for _ in range(100)])
    found = []
    while waiting:
        places, samples = waiting.take(1.0)
        assert 1 <= len(places) <= MAX_BATCH
        assert [len(item["x"]) for item in samples] == [length for _, length in places]
        found += [i for i, _ in places]
    assert sorted(found) == list(range(100))
    assert len(waiting) == 0


def test_plans_know_how_long_each_has_waited(waiting, planned):
    waiting.add("old", sample(3), 1.0)
    waiting.add("new", sample(3), 4.5)
    waiting.take(5.0)
    assert planned.waited == [[4.0, 0.5]]


def test_a_plan_is_followed_for_a_quarter_and_then_made_anew(waiting, planned):
    fill(waiting, [10] * 64)
    for _ in range(3):  # of 8 each: 16 are a quarter
        waiting.take(0.0)
    assert planned.sizes == [64, 48]
    for _ in range(5):
        waiting.take(0.0)
    assert planned.sizes == [64, 48, 32, 24, 16, 8]


def test_what_came_meanwhile_joins_the_next_plan(waiting):
    fill(waiting, [10, 60])
    places, _ = waiting.take(0.0)
    left = 60 if places == [(0, 10)] else 10
    fill(waiting, [left] * 3)
    places, _ = waiting.take(0.0)
    assert [length for _, length in places] == [left] * 4


def test_a_plan_has_the_oldest_and_no_more_than_can_be_planned(waiting, planned, monkeypatch):
    monkeypatch.setattr(backlog, "MOST_PLANNED", 10)
    fill(waiting, [5] * 25)
    places, _ = waiting.take(0.0)
    assert {i for i, _ in places} <= set(range(10))
    while waiting:
        places += waiting.take(0.0)[0]
    assert max(planned.sizes) == 10
    assert sorted(i for i, _ in places) == list(range(25))


@pytest.mark.parametrize("rare", [1, 64])
def test_a_sample_unlike_all_others_has_its_turn_however_many_come(waiting, rare):
    """In a closed loop whose other samples fill their batches: 1 alone, or with 63 others of padding, never pays."""
    now, others = 0.0, 30
    waiting.add("rare", sample(rare), now)
    for _ in range(others):
        waiting.add("other", sample(32), now)
    round_s = COST.seconds(1, rare) + others / MAX_BATCH * COST.seconds(MAX_BATCH, 32)
    while True:
        places, samples = waiting.take(now)
        now += COST.seconds(len(samples), max(len(item["x"]) for item in samples))
        if "rare" in places:
            break
        for _ in places:
            waiting.add("other", sample(32), now)
    assert now < 4 * round_s


def test_planning_anew_serves_more_than_following_plans_to_the_end(planned, monkeypatch):
    """64 in flight, lengths of 8 to 64, and a model that takes as long as it is said to take."""

    def rate(followed):
        monkeypatch.setattr(backlog, "_FOLLOWED", followed)
        generator, waiting, now, done = random.Random(5), Backlog(planned), 0.0, 0
        fill(waiting, [generator.randint(8, 64) for _ in range(64)])
        while done < 4000:
            places, samples = waiting.take(now)
            now += COST.seconds(len(samples), max(len(item["x"]) for item in samples))
            done += len(places)
            fill(waiting, [generator.randint(8, 64) for _ in places], now)
        return done / now

    assert rate(4) > 1.015 * rate(1)
