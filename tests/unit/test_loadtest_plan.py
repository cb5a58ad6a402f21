from dataclasses import asdict

import pytest

from loadtest.errors import PlanError
from loadtest.job import Job
from loadtest.payloads import Payload
from loadtest.plan import Plan, prediction_path

URL = "http://127.0.0.1:8080"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "--rate"),
        ({"rate_rps": 1.0, "users": 1}, "exactly one"),
        ({"rate_rps": 0.0}, "--rate is 0"),
        ({"rate_rps": float("nan")}, "--rate is nan"),
        ({"rate_rps": float("inf")}, "--rate is inf"),
        ({"users": -2}, "--users is -2"),
        ({"users": 1, "duration_s": 0.0}, "--duration is 0"),
        ({"users": 1, "warm_up_s": -1.0}, "--warm-up is -1"),
        ({"users": 1, "processes": 2}, "--processes 2"),
        ({"users": 1, "slo_p99_ms": -5.0}, "--slo-p99-ms is -5"),
        ({"users": 5000}, "5000 requests in flight"),
        ({"users": 1, "url": "127.0.0.1:8080"}, "127.0.0.1:8080"),
        ({"users": 1, "url": "http://127.0.0.1:eighty"}, "eighty"),
        ({"users": 1, "url": "ftp://127.0.0.1"}, "ftp"),
    ],
)
def test_an_impossible_plan_names_the_option_and_the_value(options, named):
    with pytest.raises(PlanError, match=named):
        Plan(**{"model": "digits", "url": URL, **options})


def test_the_command_repeats_the_plan():
    plan = Plan(model="digits", url=URL, rate_rps=12.5, duration_s=3, slo_p99_ms=50, seed=7)
    assert plan.command == (
        "torchport loadtest digits --rate 12.5 --duration 3 --warm-up 2 --processes 1 --seed 7 "
        "--url http://127.0.0.1:8080 --slo-p99-ms 50"
    )


def test_a_long_run_keeps_its_plots_readable():
    assert Plan(model="m", url=URL, users=1, duration_s=30).interval_s == 1
    assert Plan(model="m", url=URL, users=1, duration_s=3600).interval_s == 6


def test_a_model_name_cannot_leave_its_path():
    assert prediction_path("a/../b?c") == "/predictions/a%2F..%2Fb%3Fc"


def test_a_job_round_trips(tmp_path):
    job = Job(
        plan=Plan(model="m", url=URL, rate_rps=5),
        payloads=[Payload(body=b"\x00\xff", content_type="image/png", expected_label="7")],
        token="secret",
        results=tmp_path,
    )
    job.write(tmp_path / "job.json")
    assert asdict(Job.read(tmp_path / "job.json")) == asdict(job)
    assert [path.name for path in tmp_path.iterdir()] == ["job.json"]
