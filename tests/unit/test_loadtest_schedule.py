import itertools
import statistics

import pytest

from loadtest.schedule import poisson_arrivals


def gaps(times):
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def test_the_same_seed_gives_the_same_times():
    first, second = (list(poisson_arrivals(rate_rps=50, duration_s=4, seed=3)) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("seed", "stream"), [(4, 0), (3, 1)])
def test_another_seed_or_stream_gives_other_times(seed, stream):
    reference = list(poisson_arrivals(rate_rps=50, duration_s=4, seed=3))
    assert list(poisson_arrivals(rate_rps=50, duration_s=4, seed=seed, stream=stream)) != reference


def test_times_rise_and_stay_in_the_window():
    times = list(poisson_arrivals(rate_rps=50, duration_s=4, seed=0))
    assert times == sorted(times)
    assert times[0] > 0
    assert times[-1] < 4


def test_gaps_are_exponential_with_the_mean_of_the_rate():
    # Mean and standard deviation of an exponential are equal; 20,000 gaps put both within 5 % (7 sigma and 5).
    sample = gaps(list(poisson_arrivals(rate_rps=200, duration_s=100, seed=1)))
    assert statistics.mean(sample) == pytest.approx(1 / 200, rel=0.05)
    assert statistics.stdev(sample) == pytest.approx(1 / 200, rel=0.05)


def test_streams_sum_to_the_whole_rate():
    streams = [poisson_arrivals(rate_rps=50, duration_s=100, seed=1, stream=number) for number in range(4)]
    merged = sorted(itertools.chain.from_iterable(streams))
    assert len(merged) == pytest.approx(200 * 100, rel=0.05)
    assert statistics.stdev(gaps(merged)) == pytest.approx(1 / 200, rel=0.05)
