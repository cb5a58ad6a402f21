import pytest

from loadtest.answers import Fault
from loadtest.plan import Plan
from loadtest.recorder import Recorder
from loadtest.verdict import judge

FAULT = Fault("HTTP 503", "the queue is full")


def new_plan(**options):
    return Plan(**{"model": "m", "url": "http://127.0.0.1:1", "rate_rps": 100.0, "duration_s": 10.0, **options})


def new_tally(*, right=1000, failed=0, missed=0, latency_s=0.02, lag_s=0.0, cpu=0.3):
    recorder = Recorder(start_s=0, warm_up_s=0, duration_s=10, interval_s=1, late_s=0.01)
    for _ in range(right):
        recorder.record(planned_s=1, sent_s=1 + lag_s, done_s=1 + latency_s, fault=None)
    for _ in range(failed):
        recorder.record(planned_s=1, sent_s=1, done_s=1, fault=FAULT)
    for _ in range(missed):
        recorder.record(planned_s=1, sent_s=None, done_s=1, fault=Fault("in-flight limit", "full"))
    recorder.tally.cpu_shares.append(cpu)
    return recorder.tally


def test_a_met_objective_is_ok():
    verdict = judge(new_plan(slo_p99_ms=50), new_tally())
    assert (verdict.ok, verdict.slo_met, verdict.headline) == (True, True, "SLO MET")


def test_without_an_objective_a_valid_measurement_is_ok():
    verdict = judge(new_plan(), new_tally())
    assert (verdict.ok, verdict.slo_met, verdict.headline) == (True, None, "VALID")


def test_a_missed_objective_is_not_ok():
    verdict = judge(new_plan(slo_p99_ms=10), new_tally())
    assert (verdict.ok, verdict.valid, verdict.headline) == (False, True, "SLO MISSED")
    assert "p99 is 20.0 ms (objective 10 ms)" in verdict.missed[0]


def test_failing_fast_does_not_meet_an_objective():
    verdict = judge(new_plan(slo_p99_ms=50, max_error_share=1.0), new_tally(failed=20))
    assert not verdict.slo_met
    assert "unbounded" in verdict.missed[0]


def test_too_many_errors_are_not_ok_without_an_objective():
    verdict = judge(new_plan(), new_tally(failed=5))
    assert (verdict.ok, verdict.valid, verdict.headline) == (False, True, "TOO MANY ERRORS")


def test_one_error_in_a_thousand_is_tolerated():
    assert judge(new_plan(slo_p99_ms=50), new_tally(right=999, failed=1)).ok


@pytest.mark.parametrize(
    ("tally", "reason"),
    [
        ({"right": 0, "failed": 500}, "no request got a right answer (HTTP 503: the queue is full)"),
        ({"right": 0}, "none was sent"),
        ({"cpu": 0.97}, "load process 0 used 97% of its core"),
        ({"lag_s": 0.015}, "send lag p99 is 15.0 ms"),
        ({"missed": 20}, "only 1000 of 1020 planned requests were sent in time"),
        ({"right": 50}, "only 50 requests were measured"),
    ],
)
def test_an_unbelievable_measurement_is_invalid_and_not_judged(tally, reason):
    verdict = judge(new_plan(slo_p99_ms=50), new_tally(**tally))
    assert (verdict.ok, verdict.valid, verdict.slo_met, verdict.headline) == (False, False, None, "INVALID")
    assert any(reason in each for each in verdict.invalid)
    assert verdict.missed == ()


def test_a_closed_loop_has_no_planned_sends_to_be_late_for():
    assert judge(new_plan(rate_rps=None, users=4), new_tally(lag_s=0.015)).ok
