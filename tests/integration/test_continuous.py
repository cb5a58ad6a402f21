"""Continuous serving: the answers of batches, whatever happens to the worker or to a neighbour."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

from export.evaluation import LabelledRequest
from handlers.metrics import ANSWERS, BATCH_SAMPLES, PADDING_SHARE, SAMPLES, STAGE_SECONDS, STAGES

from .conftest import READY_TIMEOUT_S, RunningServer, serving

MODEL = "digits-onnx"
PATH = f"/predictions/{MODEL}"
IN_FLIGHT = 32
# Of answers that should take milliseconds; the machine may stand still meanwhile.
ANSWER_TIMEOUT_S = 150


@pytest.fixture(scope="module")
def alone(archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A continuous server with one worker, which tests may kill."""
    with serving([archives["onnx"]], tmp_path_factory.mktemp("alone"), "--workers", "1") as running:
        yield running


def configuration(server: RunningServer) -> dict[str, Any]:
    """What TorchServe knows of the model."""
    response = httpx.get(
        f"{server.state.management_url}/models/{MODEL}",
        headers={"Authorization": f"Bearer {server.state.management_token()}"},
        timeout=30,
    )
    document: dict[str, Any] = response.raise_for_status().json()[0]
    return document


def connection(server: RunningServer) -> HTTPConnection:
    address = urlsplit(server.state.inference_url)
    return HTTPConnection(str(address.hostname), address.port, timeout=ANSWER_TIMEOUT_S)


def headers(server: RunningServer, request: LabelledRequest) -> dict[str, str]:
    return {"Authorization": f"Bearer {server.state.inference_token()}", "Content-Type": request.content_type}


def wait_for(condition: Callable[[], bool], timeout_s: float = READY_TIMEOUT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def labels(server: RunningServer, requests: list[LabelledRequest]) -> list[str]:
    with server.client() as client, ThreadPoolExecutor(16) as pool:
        responses = list(
            pool.map(
                lambda request: client.post(
                    PATH, content=request.body, headers={"Content-Type": request.content_type}, timeout=ANSWER_TIMEOUT_S
                ),
                requests,
            )
        )
    assert {response.status_code for response in responses} == {200}
    return [response.json()["label"] for response in responses]


def test_both_ways_give_the_same_labels(
    server: RunningServer, archives: dict[str, Path], held_out: list[LabelledRequest], tmp_path: Path
) -> None:
    with serving([archives["onnx"]], tmp_path, "--scheduling", "batches") as batches:
        assert configuration(batches)["batchSize"] < configuration(server)["batchSize"] == 256
        expected = labels(batches, held_out)
    assert labels(server, held_out) == expected


def test_a_killed_workers_requests_are_answered_and_another_serves_on(
    alone: RunningServer, held_out: list[LabelledRequest]
) -> None:
    (before,) = alone.workers(MODEL)
    pid = int(before["pid"])
    requests = held_out[:IN_FLIGHT]
    os.kill(pid, signal.SIGSTOP)  # so that it holds them all when it is killed
    with ExitStack() as stack:
        connections = [stack.enter_context(closing(connection(alone))) for _ in requests]
        for one, request in zip(connections, requests, strict=True):
            one.request("POST", PATH, request.body, headers(alone, request))
        answered, _, _ = select.select([one.sock for one in connections], [], [], 1)
        assert not answered
        os.kill(pid, signal.SIGKILL)
        responses = [one.getresponse() for one in connections]
        answers = [(response.status, response.read()) for response in responses]
    assert {status for status, _ in answers} <= {200, 503}
    # Whatever the worker held; the queue's, if any, are for the next one.
    assert any(status == 503 for status, _ in answers)
    for (status, body), request in zip(answers, requests, strict=True):
        if status == 200:
            assert json.loads(body)["label"] == str(request.label)
        else:
            assert json.loads(body)["code"] == 503

    wait_for(lambda: [int(worker["pid"]) == pid for worker in alone.workers(MODEL)] == [False])
    assert len(labels(alone, held_out[:100])) == 100


def test_a_worker_that_took_anothers_place_is_shown_as_ready(
    alone: RunningServer, held_out: list[LabelledRequest]
) -> None:
    (before,) = alone.workers(MODEL)
    os.kill(int(before["pid"]), signal.SIGKILL)
    wait_for(lambda: [worker["pid"] != before["pid"] for worker in alone.workers(MODEL)] == [True])
    assert len(labels(alone, held_out[:10])) == 10  # it has loaded the model
    assert [worker["status"] for worker in alone.workers(MODEL)] == ["READY"]


def test_what_waits_for_a_worker_that_does_not_come_back_gets_503(
    archives: dict[str, Path], held_out: list[LabelledRequest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JDK_JAVA_OPTIONS", "-Dtorchport.withoutWorkerSeconds=2")
    with serving([archives["onnx"]], tmp_path, "--workers", "1") as server:
        (worker,) = server.workers(MODEL)
        process = psutil.Process(int(worker["pid"]))
        (artifact,) = Path(process.environ()["TMPDIR"]).glob("models/*/*.onnx")
        artifact.write_bytes(artifact.read_bytes() + b"\0")  # so that no other worker can load it
        process.kill()
        process.wait(READY_TIMEOUT_S)
        wait_for(lambda: [worker["status"] for worker in server.workers(MODEL)] != ["READY"])
        with server.client() as client:
            response = client.post(
                PATH,
                content=held_out[0].body,
                headers={"Content-Type": held_out[0].content_type},
                timeout=ANSWER_TIMEOUT_S,
            )
        assert (response.status_code, response.json()["message"]) == (
            503,
            "No worker of the model is ready; try again.",
        )


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="the system has no such scheduling classes")
def test_whatever_wakes_up_interrupts_no_model_that_computes(alone: RunningServer) -> None:
    (worker,) = alone.workers(MODEL)
    process = psutil.Process(int(worker["pid"]))
    frontend = process.parent()
    assert frontend is not None
    assert {os.sched_getscheduler(thread.id) for thread in frontend.threads()} == {os.SCHED_BATCH}
    policies = {thread.id: os.sched_getscheduler(thread.id) for thread in process.threads()}
    assert policies[process.pid] == os.SCHED_OTHER  # the thread that computes
    assert os.SCHED_BATCH in policies.values()


def test_two_workers_hold_as_many_requests_each(
    archives: dict[str, Path], held_out: list[LabelledRequest], tmp_path: Path
) -> None:
    with serving([archives["onnx"]], tmp_path, "--workers", "2") as running, ExitStack() as stack:
        pids = [int(worker["pid"]) for worker in running.workers(MODEL)]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
            stack.callback(os.kill, pid, signal.SIGCONT)
        requests = held_out[:IN_FLIGHT]
        connections = [stack.enter_context(closing(connection(running))) for _ in requests]
        for one, request in zip(connections, requests, strict=True):
            one.request("POST", PATH, request.body, headers(running, request))
        select.select([one.sock for one in connections], [], [], 1)
        os.kill(pids[1], signal.SIGCONT)
        time.sleep(2)
        answered, _, _ = select.select([one.sock for one in connections], [], [], 0)
        assert abs(len(answered) - IN_FLIGHT / 2) <= 2
        os.kill(pids[0], signal.SIGCONT)
        assert [one.getresponse().status for one in connections] == [200] * IN_FLIGHT


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("application/x-www-form-urlencoded", b"a=%zz"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n"),
    ],
)
def test_a_form_that_is_none_is_the_clients_mistake(alone: RunningServer, content_type: str, body: bytes) -> None:
    with alone.client() as client:
        response = client.post(PATH, content=body, headers={"Content-Type": content_type})
    assert response.status_code == 400
    assert "Name the type of what you send" in response.json()["message"]


@pytest.mark.parametrize("target", ["*", "?a=b"])
def test_a_target_without_a_path_is_the_clients_mistake(alone: RunningServer, target: str) -> None:
    with closing(connection(alone)) as one:
        one.request("POST", target, b"x")
        response = one.getresponse()
        assert (response.status, "begins with a slash" in response.read().decode()) == (400, True)


def test_a_slow_client_holds_nobody(alone: RunningServer, held_out: list[LabelledRequest]) -> None:
    slow, *others = held_out[:50]
    with closing(connection(alone)) as one:
        one.putrequest("POST", PATH)
        for name, value in {**headers(alone, slow), "Content-Length": str(len(slow.body))}.items():
            one.putheader(name, value)
        one.endheaders(slow.body[:10])
        expected = labels(alone, others)
        assert len(expected) == len(others)
        one.send(slow.body[10:])
        response = one.getresponse()
        assert (response.status, json.loads(response.read())["label"]) == (200, labels(alone, [slow])[0])


def test_a_client_without_time_is_told_so(alone: RunningServer, held_out: list[LabelledRequest]) -> None:
    request = held_out[0]
    with alone.client() as client:
        response = client.post(
            PATH, content=request.body, headers={"Content-Type": request.content_type, "X-Request-Timeout-Ms": "0"}
        )
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "deadline_exceeded"


def test_the_model_describes_itself(alone: RunningServer) -> None:
    response = httpx.get(
        f"{alone.state.management_url}/models/{MODEL}",
        params={"customized": "true"},
        headers={"Authorization": f"Bearer {alone.state.management_token()}"},
        timeout=ANSWER_TIMEOUT_S,
    )
    assert response.status_code == 200
    assert response.json()[0]["customizedMetadata"]["name"] == MODEL


SERIES = re.compile(r"(torchport_\w+)\{(.*)\} (\S+)")


def series(server: RunningServer) -> dict[tuple[str, str], float]:
    """The worker's own counters of the model, by name and what is not the same for all."""
    found: dict[tuple[str, str], float] = {}
    for line in httpx.get(f"{server.state.metrics_url}/metrics").text.splitlines():
        if match := SERIES.match(line):
            own = dict(re.findall(r'(\w+)="([^"]*)"', match[2]))
            assert own.pop("ModelVersion") == "1.0"
            assert own.pop("Hostname", own.pop("hostname", ""))
            if own.pop("ModelName") == MODEL:
                found[match[1], ",".join(own.values())] = float(match[3])
    return found


def test_prometheus_gets_the_workers_own_series(alone: RunningServer, held_out: list[LabelledRequest]) -> None:
    def answered() -> float:
        return series(alone).get((ANSWERS, "200"), 0)

    # All that came before is written within a second or two.
    labels(alone, held_out[:1])
    wait_for(lambda: answered() > 0)
    quiet = -1.0
    while quiet != (quiet := answered()):
        time.sleep(3)
    before = series(alone)
    labels(alone, held_out[:100])
    wait_for(lambda: answered() >= quiet + 100)
    wait_for(lambda: series(alone).get((SAMPLES, ""), 0) >= before[SAMPLES, ""] + 100)
    after = series(alone)
    assert after[ANSWERS, "200"] == before[ANSWERS, "200"] + 100
    assert after[SAMPLES, ""] == before[SAMPLES, ""] + 100
    assert after[f"{BATCH_SAMPLES}_sum", ""] == before[f"{BATCH_SAMPLES}_sum", ""] + 100
    for histogram, kinds in ((STAGE_SECONDS, STAGES), (BATCH_SAMPLES, ("",)), (PADDING_SHARE, ("",))):
        for kind in kinds:
            infinite = after[f"{histogram}_bucket", ",".join(filter(None, (kind, "+Inf")))]
            assert infinite == after[f"{histogram}_count", kind] > 0
