import random

import pytest

from loadtest.histogram import Histogram


def histogram_of(durations_s, **options):
    histogram = Histogram(**options)
    for duration_s in durations_s:
        histogram.record(duration_s)
    return histogram


def test_percentiles_are_in_milliseconds_and_within_a_thousandth():
    histogram = histogram_of(n / 1000 for n in range(1, 1001))
    assert histogram.percentiles_ms([50, 99, 99.9, 100]) == pytest.approx([500, 990, 999, 1000], rel=1e-3)
    assert histogram.max_ms() == pytest.approx(1000, rel=1e-3)


@pytest.mark.parametrize("count", [1, 2, 3, 7, 99, 100, 101, 1234])
def test_a_percentile_is_the_smallest_value_that_covers_its_share(count):
    histogram = histogram_of((n / 1e6 for n in range(1, count + 1)), digits=5)
    for level in (1, 50, 90, 95, 99, 99.9, 100):
        (value_ms,) = histogram.percentiles_ms([level])
        covered = round(value_ms * 1000)
        assert covered / count >= level / 100 - 1e-9
        assert (covered - 1) / count < level / 100


def test_failed_requests_count_as_slower_than_every_answer():
    histogram = histogram_of([0.010] * 98)
    assert histogram.percentiles_ms([50, 98, 99], failed=2) == [pytest.approx(10, rel=1e-3)] * 2 + [None]


def test_an_empty_histogram_has_no_percentiles():
    assert Histogram().percentiles_ms([50, 99]) == [None, None]
    assert Histogram().max_ms() is None
    assert list(Histogram().curve_ms()) == []


def test_merging_is_recording_everything_in_one_place():
    rng = random.Random(0)
    # Two very different halves: the mean of their p99 would be far off.
    fast = [rng.uniform(0.001, 0.002) for _ in range(990)]
    slow = [rng.uniform(1.0, 2.0) for _ in range(30)]
    merged = histogram_of(fast)
    merged.add(histogram_of(slow))
    levels = [50, 90, 95, 99, 99.9, 100]
    assert merged.percentiles_ms(levels) == histogram_of(fast + slow).percentiles_ms(levels)
    averaged = (histogram_of(fast).percentiles_ms([50])[0] + histogram_of(slow).percentiles_ms([50])[0]) / 2
    assert merged.percentiles_ms([50])[0] < 0.01 * averaged


@pytest.mark.parametrize("digits", [2, 3])
def test_encoding_round_trips(digits):
    histogram = histogram_of([0.001, 0.5, 3.0], digits=digits)
    decoded = Histogram.decode(histogram.encode())
    assert len(decoded) == 3
    assert decoded.percentiles_ms([10, 50, 100]) == histogram.percentiles_ms([10, 50, 100])
    decoded.add(histogram)
    assert len(decoded) == 6


def test_an_empty_histogram_round_trips():
    assert len(Histogram.decode(Histogram().encode())) == 0


@pytest.mark.parametrize(("duration_s", "recorded_ms"), [(-1.0, 0.001), (0.0, 0.001), (1e6, 3.6e6)])
def test_durations_out_of_range_are_counted_at_its_ends(duration_s, recorded_ms):
    histogram = histogram_of([duration_s])
    assert len(histogram) == 1
    assert histogram.max_ms() == pytest.approx(recorded_ms, rel=1e-3)


def test_hgrm_is_in_milliseconds():
    text = histogram_of([0.25] * 10).to_hgrm().decode()
    assert text.split()[:4] == ["Value", "Percentile", "TotalCount", "1/(1-Percentile)"]
    assert text.splitlines()[2].split()[0].startswith("250.")
    assert "StdDeviation" not in text
