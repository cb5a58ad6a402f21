import json

import pytest

from loadtest.answers import Fault
from loadtest.recorder import Recorder
from loadtest.tally import Tally, merge_tallies

WRONG = Fault("wrong answer", "label '3' instead of '7'")


def new_recorder(**options):
    defaults = {"start_s": 100.0, "warm_up_s": 2.0, "duration_s": 10.0, "interval_s": 1.0, "late_s": 0.01}
    return Recorder(**{**defaults, **options})


def test_latency_counts_from_the_planned_send_and_service_from_the_actual_one():
    recorder = new_recorder()
    recorder.record(planned_s=103.0, sent_s=104.0, done_s=104.1, fault=None)
    tally = recorder.tally
    assert tally.latency.percentiles_ms([50]) == [pytest.approx(1100, rel=1e-3)]
    assert tally.service.percentiles_ms([50]) == [pytest.approx(100, rel=1e-3)]
    assert tally.send_lag.percentiles_ms([50]) == [pytest.approx(1000, rel=1e-3)]


def test_warm_up_requests_are_not_counted():
    recorder = new_recorder()
    recorder.record(planned_s=101.9, sent_s=101.9, done_s=101.95, fault=None)
    recorder.record(planned_s=101.9, sent_s=101.9, done_s=101.95, fault=WRONG)
    assert recorder.tally.requests == 0
    assert recorder.tally.faults == {}
    assert recorder.tally.intervals == {}


def test_throughput_counts_answers_by_their_arrival():
    recorder = new_recorder()
    recorder.record(planned_s=101.9, sent_s=101.9, done_s=102.5, fault=None)  # sent in the warm-up
    recorder.record(planned_s=111.9, sent_s=111.9, done_s=112.5, fault=None)  # answered after the window
    recorder.record(planned_s=103.5, sent_s=103.5, done_s=105.5, fault=WRONG)
    intervals = recorder.tally.intervals
    assert recorder.tally.requests == 2
    assert {number: each.right for number, each in intervals.items() if each.right} == {0: 1}
    assert {number: each.failed for number, each in intervals.items() if each.failed} == {3: 1}
    assert {number: each.requests for number, each in intervals.items() if each.requests} == {1: 1, 9: 1}


def test_a_request_that_was_never_sent_is_a_failure():
    recorder = new_recorder()
    recorder.record(planned_s=103.0, sent_s=None, done_s=103.0, fault=Fault("in-flight limit", "2 were waiting"))
    assert recorder.tally.requests == recorder.tally.failed == 1
    assert recorder.tally.on_time == 0
    assert len(recorder.tally.send_lag) == 0


def test_a_send_after_the_window_is_not_on_time():
    recorder = new_recorder()
    recorder.record(planned_s=111.9, sent_s=112.005, done_s=112.1, fault=None)
    recorder.record(planned_s=111.9, sent_s=112.5, done_s=112.6, fault=None)
    assert recorder.tally.requests == 2
    assert recorder.tally.on_time == 1


def recorded_tally(offset):
    recorder = new_recorder()
    for number in range(200):
        planned_s = 102 + number / 25
        fault = WRONG if number % 50 == 0 else None
        recorder.record(planned_s=planned_s, sent_s=planned_s, done_s=planned_s + offset + number / 1e4, fault=fault)
    recorder.tally.cpu_shares.append(offset)
    return recorder.tally


def test_merging_two_processes_adds_everything():
    merged = merge_tallies([recorded_tally(0.001), recorded_tally(0.5)])
    assert merged.requests == merged.on_time == 400
    assert merged.failed == 8
    assert merged.right == 392
    assert merged.faults["wrong answer"].example == WRONG.detail
    assert merged.cpu_shares == [0.001, 0.5]
    assert sum(each.requests for each in merged.intervals.values()) == 400
    assert len(merged.intervals[0].latency) == 2 * 24
    p25, p75 = merged.latency.percentiles_ms([25, 75])
    assert p25 < 25
    assert p75 > 500


def test_a_tally_survives_json():
    tally = recorded_tally(0.01)
    document = json.loads(json.dumps(tally.to_json()))
    assert Tally.from_json(document).to_json() == tally.to_json()
