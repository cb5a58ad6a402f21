"""Plans: complete, allowed, and as cheap as the best that all cuts of the sorted samples offer."""

import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.cost import CostModel
from handlers.planner import in_turn, padding_share, plan, positions
from handlers.signature import Signature

COSTS = st.builds(
    CostModel,
    call=st.floats(0, 100),
    sample=st.floats(0, 100),
    position=st.floats(0, 10),
    pair=st.floats(0, 1),
)
LENGTHS = st.lists(st.tuples(st.integers(1, 9)), min_size=1)
PICTURES = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1)
POSITIONS_ALONE = CostModel(call=0, position=1)


def signature(*axes, padding=0):
    padded = {} if padding is None else {"padding": padding}
    return Signature.from_document(
        {
            "format_version": 1,
            "task": "tensor",
            "inputs": [
                {"name": "x", "dtype": "float32", "shape": ["batch", *axes], **padded},
                {"name": "scale", "dtype": "float32", "shape": ["batch"]},
            ],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch"]}],
            "axes": {axis: {"maximum": 1000} for axis in axes},
        }
    )


NONE, LENGTH, PICTURE = signature(), signature("length"), signature("height", "width")
UNPADDED = signature("height", "width", padding=None)


def samples_of(shapes):
    return [{"x": np.zeros(shape, np.float32), "scale": np.float32(1)} for shape in shapes]


def price(shapes, cost):
    """Of one batch."""
    return cost.seconds(len(shapes), math.prod(map(max, zip(*shapes, strict=True))))


def cheapest(shapes, cost, max_batch):
    """Of all ways to cut the sorted samples."""
    row = sorted(shapes, key=lambda shape: (math.prod(shape), shape))
    best = math.inf
    for inside in itertools.product((False, True), repeat=len(row) - 1):
        cuts = [0, *(i for i, cut in enumerate(inside, 1) if cut), len(row)]
        batches = [row[start:stop] for start, stop in itertools.pairwise(cuts)]
        if max(map(len, batches)) <= max_batch:
            best = min(best, sum(price(batch, cost) for batch in batches))
    return best


def assert_allowed(batches, count, max_batch):
    assert sorted(i for batch in batches for i in batch) == list(range(count))
    assert all(1 <= len(batch) <= max_batch for batch in batches)


@settings(deadline=None)
@given(PICTURES, COSTS, st.integers(1, 9))
def test_every_sample_is_in_exactly_one_batch(shapes, cost, max_batch):
    assert_allowed(plan(samples_of(shapes), PICTURE, cost, max_batch=max_batch), len(shapes), max_batch)


@settings(deadline=None)
@given(PICTURES, COSTS, st.integers(1, 9))
def test_without_padding_only_equal_shapes_share(shapes, cost, max_batch):
    batches = plan(samples_of(shapes), UNPADDED, cost, max_batch=max_batch)
    assert_allowed(batches, len(shapes), max_batch)
    assert all(len({shapes[i] for i in batch}) == 1 for batch in batches)


@pytest.mark.parametrize("signature", [NONE, LENGTH, UNPADDED])
def test_no_samples_have_no_batches(signature):
    assert plan([], signature, CostModel(), max_batch=4) == []


@settings(deadline=None)
@given(LENGTHS.filter(lambda shapes: len(shapes) <= 8), COSTS, st.integers(1, 9))
def test_lengths_are_cut_where_it_is_cheapest(shapes, cost, max_batch):
    batches = plan(samples_of(shapes), LENGTH, cost, max_batch=max_batch)
    total = sum(price([shapes[i] for i in batch], cost) for batch in batches)
    assert total == pytest.approx(cheapest(shapes, cost, max_batch), rel=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10**6), COSTS, st.integers(1, 40))
def test_long_rows_are_cut_as_cheaply_as_all_cuts_allow(seed, cost, max_batch):
    lengths = sorted(random.Random(seed).choices(range(1, 65), k=random.Random(seed).randint(10, 120)))
    least = [0.0]
    for stop in range(1, len(lengths) + 1):
        starts = range(max(0, stop - max_batch), stop)
        least.append(min(least[i] + cost.seconds(stop - i, lengths[stop - 1]) for i in starts))
    batches = plan(samples_of([(length,) for length in lengths]), LENGTH, cost, max_batch=max_batch)
    total = sum(price([(lengths[i],) for i in batch], cost) for batch in batches)
    assert total == pytest.approx(least[-1], rel=1e-9)


@settings(deadline=None)
@given(PICTURES.filter(lambda shapes: len(shapes) <= 8), COSTS, st.integers(1, 9))
def test_pictures_are_cut_where_it_is_cheapest(shapes, cost, max_batch):
    batches = plan(samples_of(shapes), PICTURE, cost, max_batch=max_batch)
    total = sum(price([shapes[i] for i in batch], cost) for batch in batches)
    assert total == pytest.approx(cheapest(shapes, cost, max_batch), rel=1e-9)


@settings(deadline=None)
@given(LENGTHS, COSTS, st.integers(1, 9))
def test_the_longest_come_last(shapes, cost, max_batch):
    batches = plan(samples_of(shapes), LENGTH, cost, max_batch=max_batch)
    row = [shapes[i] for batch in batches for i in batch]
    assert row == sorted(row)


@settings(deadline=None)
@given(PICTURES, st.integers(1, 9))
def test_where_calls_alone_cost_there_are_as_few_as_can_be(shapes, max_batch):
    batches = plan(samples_of(shapes), PICTURE, CostModel(), max_batch=max_batch)
    assert len(batches) == math.ceil(len(shapes) / max_batch)


@settings(deadline=None)
@given(PICTURES, st.integers(1, 9))
def test_where_positions_alone_cost_nothing_is_padded(shapes, max_batch):
    samples = samples_of(shapes)
    batches = plan(samples, PICTURE, POSITIONS_ALONE, max_batch=max_batch)
    assert [padding_share([samples[i] for i in batch], PICTURE) for batch in batches] == [0] * len(batches)


@settings(deadline=None)
@given(st.integers(1, 40), COSTS, st.integers(1, 9))
def test_samples_without_axes_are_batched_by_number(count, cost, max_batch):
    assert_allowed(plan(samples_of([()] * count), NONE, cost, max_batch=max_batch), count, max_batch)


def test_one_long_sample_among_short_ones_runs_alone_where_that_is_cheaper():
    shapes = [(5,), (200,), (5,), (6,)]
    cheap = CostModel(call=10, position=1)
    assert plan(samples_of(shapes), LENGTH, cheap, max_batch=8) == [[0, 2, 3], [1]]
    assert len(plan(samples_of(shapes), LENGTH, CostModel(call=1000, position=1), max_batch=8)) == 1


@pytest.mark.parametrize("count", [512, 513, 2000])
@pytest.mark.parametrize(("signature", "axes"), [(LENGTH, 1), (PICTURE, 2)])
def test_very_many_samples_are_batched_with_their_like(count, signature, axes):
    rng = np.random.default_rng(count)
    shapes = [tuple(map(int, shape)) for shape in rng.integers(1, 20, (count, axes))]
    samples = samples_of(shapes)
    batches = plan(samples, signature, CostModel(call=1e-3, position=1e-3), max_batch=32)
    assert_allowed(batches, count, 32)
    products = [[math.prod(shapes[i]) for i in batch] for batch in batches]
    assert all(max(batch) <= min(after) for batch, after in itertools.pairwise(products))


def test_very_many_samples_of_several_shapes_without_padding():
    shapes = [(2, 3), (3, 2)] * 600
    batches = plan(samples_of(shapes), UNPADDED, CostModel(), max_batch=100)
    assert_allowed(batches, 1200, 100)
    assert Counter(shapes[batch[0]] for batch in batches) == {(2, 3): 6, (3, 2): 6}


@pytest.mark.parametrize(
    ("signature", "shapes", "expected", "share"),
    [
        (LENGTH, [(4,)], 4, 0),
        (LENGTH, [(4,), (4,), (4,)], 4, 0),
        (LENGTH, [(1,), (3,), (4,)], 4, 1 / 3),
        # As high as the highest and as wide as the widest.
        (PICTURE, [(2, 6), (3, 4)], 18, 1 - 24 / 36),
        (NONE, [(), ()], 1, 0),
    ],
)
def test_positions_and_the_share_of_padding(signature, shapes, expected, share):
    samples = samples_of(shapes)
    assert positions(samples, signature) == expected
    assert padding_share(samples, signature) == pytest.approx(share)


@pytest.mark.parametrize("count", [1, 31, 32, 33, 40, 64, 100])
@pytest.mark.parametrize(
    ("signature", "shape"), [(NONE, ()), (LENGTH, (7,)), (PICTURE, (3, 2)), (UNPADDED, (3, 2))], ids=str
)
def test_of_equals_the_oldest_fill_batches(signature, shape, count):
    batches = plan(samples_of([shape] * count), signature, CostModel(call=1, position=1), max_batch=32)
    assert [i for batch in batches for i in batch] == list(range(count))
    assert {len(batch) for batch in batches[:-1]} <= {32}


class TestInTurn:
    COST = CostModel(call=1, position=0.1)

    def turn(self, lengths, batches, waited=None):
        samples = samples_of([(length,) for length in lengths])
        return in_turn(batches, samples, waited or [0.0] * len(samples), LENGTH, self.COST)

    def test_the_batch_with_the_least_padding_and_calls_runs_first(self):
        lengths = [10, 10, 10, 10, 5, 50, 50, 50, 9]
        full, padded, alone = [0, 1, 2, 3], [4, 5, 6, 7], [8]  # worth 4/5, 15.5/21 and 0.9/1.9
        assert self.turn(lengths, [alone, padded, full]) == [full, padded, alone]

    def test_equals_keep_their_order(self):
        assert self.turn([5, 5, 5, 5], [[2, 3], [0, 1]]) == [[2, 3], [0, 1]]

    def test_waiting_counts_by_how_long_all_of_it_takes(self):
        lengths = [10] * 4 + [20]
        batches = [[0, 1, 2, 3], [4]]  # 5 and 3 s, worth 4/5 and 2/3
        assert self.turn(lengths, batches, [0, 0, 0, 0, 0.9]) == batches
        assert self.turn(lengths, batches, [0, 0, 0, 0, 1.2]) == batches[::-1]
        assert self.turn(lengths, batches, [0.5, 0, 0, 0, 1.2]) == batches

    def test_whoever_has_waited_longer_than_a_few_rounds_is_first(self):
        lengths = [64] * 30 + [1]
        assert self.turn(lengths, [list(range(30)), [30]], [0.0] * 30 + [2 * (3 + 192)])[0] == [30]

    def test_no_batches_have_no_order(self):
        assert in_turn([], [], [], LENGTH, self.COST) == []
