"""Whole requests in process, and what a running server says of its own stages."""

import json
import threading
from dataclasses import replace

import psutil
import pytest

from handlers.metrics import SAMPLES, STAGE_SECONDS
from loadtest import compare_stages
from loadtest.compare_requests import read_bodies
from loadtest.compare_stages import Usage, look, look_settled, parse_metrics
from loadtest.compare_systems import SYSTEMS
from loadtest.compare_whole import BATCHES, STAGES, answer_batch, measure_whole
from loadtest.payloads import Payload
from loadtest.peers.model import PeerModel
from loadtest.peers.settings import PeerSettings


@pytest.fixture
def model(extracted):
    return PeerModel.load(PeerSettings(folder=extracted, port=0, threads=1, files=True))


def test_bytes_become_the_bytes_that_torchport_answers(model, picture):
    answers, seconds = answer_batch(model, model.decode_file, [picture("dark"), picture("bright")])
    assert [json.loads(answer)["label"] for answer in answers] == ["dark", "bright"]
    assert len(seconds) == len(STAGES)
    assert all(each > 0 for each in seconds)


def test_every_way_has_a_turn_and_the_best_batch_counts(model, signature, archive):
    bodies, _ = read_bodies(signature, archive)
    threads = set()

    def read(body):
        threads.add(threading.get_ident())
        return model.decode_file(body)

    queue = [body.body for body in bodies] * 12
    whole = measure_whole(model, read, queue, lanes=2, duration_s=0.0, slice_s=0.02)
    assert whole.lanes == 2
    assert whole.one_batch in BATCHES
    assert whole.all_batch in BATCHES
    assert whole.one_per_s > 0
    assert whole.all_per_s > 0
    assert len(threads) > 1
    assert set(whole.stages_ms) == set(BATCHES)
    assert all(set(stages) == set(STAGES) for stages in whole.stages_ms.values())
    assert whole.alone_ms >= max(whole.stages_ms[1].values()) > 0


PAGE = f"""# HELP {STAGE_SECONDS}_sum Torchserve prometheus counter metric
{STAGE_SECONDS}_sum{{ModelName="a",stage="decode",Hostname="h",}} 1.5
{STAGE_SECONDS}_sum{{ModelName="b",stage="decode",Hostname="h",}} 0.5
{STAGE_SECONDS}_sum{{ModelName="a",stage="compute",Hostname="h",}} 2.0E1
{STAGE_SECONDS}_count{{ModelName="a",stage="compute",Hostname="h",}} 7.0
{SAMPLES}{{ModelName="a",Hostname="h",}} 30.0
"""


def test_a_prometheus_page_is_added_up():
    assert parse_metrics(PAGE) == ({"decode": 2.0, "compute": 20.0}, 30.0)
    assert parse_metrics("") == ({}, 0.0)


def test_two_looks_are_milliseconds_a_request():
    first = Usage(cpu_s={"java": 1.0}, stages_s={"decode": 2.0}, samples=10)
    second = Usage(cpu_s={"java": 1.5, "python": 2.0}, stages_s={"decode": 2.1, "wait": 0.2}, samples=110)
    cpu_ms, stages_ms = second.since(first, 100)
    assert cpu_ms == {"java": pytest.approx(5.0), "python": pytest.approx(20.0)}
    assert stages_ms == {"decode": pytest.approx(1.0), "wait": pytest.approx(2.0)}


def test_cpu_time_is_that_of_the_processes():
    own = psutil.Process()
    usage = look([own], "")
    assert usage.cpu_s[own.name()] > 0
    assert (usage.stages_s, usage.samples) == ({}, 0.0)


def test_metrics_are_waited_for(monkeypatch):
    seen = iter([({}, 10.0), ({"decode": 1.0}, 20.0), ({"decode": 2.0}, 30.0), ({"decode": 3.0}, 40.0)])
    monkeypatch.setattr(compare_stages, "_read_metrics", lambda url: next(seen))
    monkeypatch.setattr(compare_stages, "_POLL_S", 0.0)
    usage = look_settled([], "http://somewhere", samples=30)
    assert (usage.stages_s, usage.samples) == ({"decode": 2.0}, 30.0)


def test_metrics_that_cannot_be_read_cost_the_breakdown_alone():
    assert look([], "http://127.0.0.1:1").stages_s == {}


def test_a_form_holds_the_same_bytes():
    body = Payload(body=b"\xff\xd8 picture", content_type="image/jpeg")
    mosec, bentoml = SYSTEMS["mosec"], SYSTEMS["bentoml"]
    assert mosec.envelope(body, files=True) is body
    assert bentoml.envelope(body, files=False) is body
    form = bentoml.envelope(body, files=True)
    boundary = form.content_type.removeprefix("multipart/form-data; boundary=").encode()
    head, _, rest = form.body.partition(b"\r\n\r\n")
    assert head.startswith(b"--" + boundary + b"\r\n")
    assert b'name="images"' in head
    assert rest == body.body + b"\r\n--" + boundary + b"--\r\n"


def test_what_a_peer_does_with_files_is_said():
    assert SYSTEMS["mosec"].describe(files=True).startswith(SYSTEMS["mosec"].describe(files=False) + "; decoded")
    plain = replace(SYSTEMS["mosec"], decoding="")
    assert plain.describe(files=True) == "one worker, batches of 32 in arrival order, wait 10 ms"
    assert plain.describe(files=False, workers=2) == "2 workers, batches of 32 in arrival order, wait 10 ms"
