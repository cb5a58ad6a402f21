"""What batches cost: the fit, and the measurements that it is made from."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from handlers.cost import CostModel, measure_cost
from handlers.signature import Signature

PRICES = CostModel(call=2e-3, sample=1e-4, position=5e-6, pair=2e-8)
SHAPES = list(itertools.product((1, 2, 4, 8, 16), (1, 17, 64, 128)))


def prices(cost):
    return (cost.call, cost.sample, cost.position, cost.pair)


def signature(**axes):
    return Signature.from_document(
        {
            "format_version": 1,
            "task": "tensor",
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", *axes, 2], "padding": 0}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch"]}],
            "axes": {name: {"minimum": low, "maximum": high} for name, (low, high) in axes.items()},
        }
    )


def fitted(cost, shapes=SHAPES, noise=None):
    seconds = [cost.seconds(batch, positions) for batch, positions in shapes]
    if noise is not None:
        seconds *= noise
    return CostModel.fit([batch for batch, _ in shapes], [positions for _, positions in shapes], seconds)


class FakeMachine:
    """Runs batches in no time, and says that they took what a model says; notes them."""

    def __init__(self, cost, delays=(0.0, 0.0, 0.0)):
        self.now = 100.0
        self.runs = []
        self._cost = cost
        self._delays = itertools.cycle(delays)

    def run(self, size, sizes):
        self.runs.append((size, dict(sizes)))
        self.now += self._cost.seconds(size, int(np.prod(list(sizes.values())))) + next(self._delays)

    def measure(self, signature, max_batch, limit_s=1e9):
        return measure_cost(self.run, signature, max_batch, limit_s=limit_s, clock=lambda: self.now)


def test_seconds_add_up_and_broadcast():
    cost = CostModel(call=1, sample=2, position=3, pair=4)
    assert cost.seconds(5, 6) == 1 + 5 * 2 + 5 * 6 * 3 + 5 * 36 * 4
    assert cost.seconds(np.array([[1], [2]]), np.array([1, 2])).tolist() == [[10, 25], [19, 49]]


class TestFit:
    @pytest.mark.parametrize(
        "cost",
        [
            PRICES,
            CostModel(call=2e-3, position=5e-6),
            CostModel(call=1e-3, sample=1e-4),
            CostModel(call=1e-3, pair=1e-8),
            CostModel(call=1e-5, sample=1e-3, position=1e-4, pair=1e-9),
        ],
    )
    def test_prices_of_exact_times_are_found(self, cost):
        assert prices(fitted(cost)) == pytest.approx(prices(cost), rel=1e-5, abs=1e-12)

    @pytest.mark.parametrize("seed", range(5))
    def test_noise_moves_the_times_of_batches_by_no_more_than_itself(self, seed):
        noise = np.random.default_rng(seed).uniform(0.97, 1.03, len(SHAPES))
        found = fitted(PRICES, noise=noise)
        for batch, positions in [*SHAPES, (32, 128), (3, 100)]:
            assert found.seconds(batch, positions) == pytest.approx(PRICES.seconds(batch, positions), rel=0.04)

    def test_short_batches_count_as_much_as_long_ones(self):
        # A call's price is a thousandth of what the longest batch takes.
        noise = np.random.default_rng(0).uniform(0.98, 1.02, len(SHAPES))
        found = fitted(CostModel(call=1e-3, pair=4e-6), noise=noise)
        assert found.seconds(1, 1) == pytest.approx(1e-3, rel=0.05)

    @settings(deadline=None)
    @given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 512), st.floats(1e-7, 100)), min_size=1, max_size=20))
    def test_no_price_is_ever_negative(self, measured):
        found = CostModel.fit(*zip(*measured, strict=True))
        assert found.call > 0
        assert all(np.isfinite(price) and price >= 0 for price in prices(found))

    def test_times_that_fall_with_size_have_no_negative_price(self):
        found = CostModel.fit([1, 2, 4, 8], [10, 10, 10, 10], [8e-3, 6e-3, 4e-3, 2e-3])
        assert min(prices(found)) >= 0
        assert 2e-3 <= found.seconds(2, 10) <= 8e-3

    def test_one_measurement_is_repeated(self):
        found = CostModel.fit([1], [7], [0.02])
        assert found.seconds(1, 7) == pytest.approx(0.02, rel=1e-4)

    def test_one_size_alone_does_not_confuse_it(self):
        found = fitted(CostModel(call=3e-3, sample=2e-3), [(batch, 1) for batch in (1, 2, 4, 8, 16)])
        assert [found.seconds(batch, 1) for batch in (1, 5, 32)] == pytest.approx([5e-3, 13e-3, 67e-3], rel=1e-5)


class TestMeasure:
    def test_the_prices_of_a_machine_are_found(self):
        found = FakeMachine(PRICES).measure(signature(length=(1, 128)), 32)
        assert prices(found) == pytest.approx(prices(PRICES), rel=1e-4)

    def test_a_model_without_axes_has_prices_for_calls_and_samples(self):
        machine = FakeMachine(CostModel(call=3e-3, sample=2e-3))
        found = machine.measure(signature(), 16)
        assert {size for size, sizes in machine.runs if sizes == {}} == {1, 2, 4, 8, 16}
        assert [found.seconds(size, 1) for size in (1, 5, 32)] == pytest.approx([5e-3, 13e-3, 67e-3], rel=1e-4)

    def test_the_shortest_of_three_counts(self):
        machine = FakeMachine(PRICES, delays=(0.5, 0.0, 0.1))
        assert prices(machine.measure(signature(length=(1, 128)), 32)) == pytest.approx(prices(PRICES), rel=1e-4)

    @pytest.mark.parametrize("max_batch", [1, 2, 3, 7, 16, 100])
    def test_batches_are_no_larger_than_the_largest_and_within_the_bounds(self, max_batch):
        machine = FakeMachine(PRICES)
        machine.measure(signature(height=(3, 50), width=(7, 7)), max_batch)
        assert {size for size, _ in machine.runs} == {size for size in (1, 2, 4, 8, 16) if size <= max_batch}
        assert all(3 <= sizes["height"] <= 50 and sizes["width"] == 7 for _, sizes in machine.runs)
        assert {3, 50} <= {sizes["height"] for _, sizes in machine.runs}

    def test_cheap_batches_come_first(self):
        machine = FakeMachine(PRICES)
        machine.measure(signature(length=(1, 128)), 16)
        work = [size * sizes["length"] for size, sizes in machine.runs]
        assert work == sorted(work)

    def test_a_slow_model_is_measured_three_times_whatever_the_limit(self):
        machine = FakeMachine(CostModel(call=60.0))
        found = machine.measure(signature(length=(1, 128)), 32, limit_s=1.0)
        assert len(machine.runs) == 3 * 3
        assert found.seconds(1, 1) == pytest.approx(60, rel=1e-4)

    def test_no_shape_is_begun_after_the_limit(self):
        machine = FakeMachine(CostModel(call=0.1))
        machine.measure(signature(length=(1, 128)), 32, limit_s=2.0)
        # Three runs of 0.1 s a shape: the seventh begins at 1.8 s.
        assert len(machine.runs) == 7 * 3

    def test_a_clock_that_stands_still_is_no_division_by_zero(self):
        found = measure_cost(lambda size, sizes: None, signature(), 4, limit_s=1.0, clock=lambda: 5.0)
        assert found.seconds(4, 1) > 0
