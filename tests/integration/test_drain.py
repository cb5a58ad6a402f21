"""Stopping a server that is at work: what it was asked before is answered, in both ways of serving."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import pytest

from deploy.server import SCHEDULING
from export.checkpoint import load_checkpoint
from export.evaluation import LabelledRequest, load_evaluation

from .conftest import READY_TIMEOUT_S, RunningServer, serving

MODEL = "digits-onnx"
PATH = f"/predictions/{MODEL}"
IN_FLIGHT = 32
# Of answers that should take milliseconds; the machine may stand still meanwhile.
ANSWER_TIMEOUT_S = 100

BOTH_WAYS = pytest.mark.parametrize("scheduling", SCHEDULING)


@pytest.fixture(scope="module")
def requests(run_folder: Path) -> list[LabelledRequest]:
    checkpoint = load_checkpoint(run_folder)
    return load_evaluation(checkpoint.signature, data=None, source=checkpoint.evaluation)[:IN_FLIGHT]


@pytest.fixture
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the server keeps what must be gone when it has stopped."""
    folder = tmp_path_factory.mktemp("t")  # short: paths of Unix sockets have 107 characters at most
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


@contextmanager
def stopped_by_the_test(archive: Path, folder: Path, temporary: Path, *options: str) -> Iterator[RunningServer]:
    """A server that the block stops; afterwards its exit code must be 0, and nothing may be left."""
    with serving([archive], folder, "--workers", "1", *options) as server:
        yield server
        wait_until_gone(server.state.pid)
    for url in (server.state.inference_url, server.state.management_url, server.state.metrics_url):
        with pytest.raises(ConnectionRefusedError):
            connect(url)
    assert list(temporary.iterdir()) == []


def wait_until_gone(pid: int) -> None:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the server did not stop"
        time.sleep(0.05)


def connect(url: str) -> socket.socket:
    address = urlsplit(url)
    return socket.create_connection((str(address.hostname), int(address.port or 0)), timeout=ANSWER_TIMEOUT_S)


def wait_until_refused(url: str) -> None:
    """Until the server has heard the signal and takes no new connections."""
    deadline = time.monotonic() + ANSWER_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            connect(url).close()
        except ConnectionRefusedError:
            return
        time.sleep(0.05)
    raise AssertionError("the port was never closed")


def connection(server: RunningServer) -> HTTPConnection:
    address = urlsplit(server.state.inference_url)
    return HTTPConnection(str(address.hostname), address.port, timeout=ANSWER_TIMEOUT_S)


def headers(token: str, request: LabelledRequest) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}", "Content-Type": request.content_type}


def expected_labels(server: RunningServer, requests: list[LabelledRequest]) -> list[str]:
    labels = []
    with closing(connection(server)) as one:
        for request in requests:
            one.request("POST", PATH, request.body, headers(server.state.inference_token(), request))
            labels.append(label(one.getresponse()))
    return labels


def label(response: HTTPResponse) -> str:
    body = response.read()
    assert response.status == 200, body
    return str(json.loads(body)["label"])


def hold(server: RunningServer) -> int:
    """Stop the only worker in its tracks, so that whatever is asked stays in flight."""
    (worker,) = server.workers(MODEL)
    pid = int(worker["pid"])
    os.kill(pid, signal.SIGSTOP)
    return pid


@BOTH_WAYS
def test_what_is_in_flight_is_answered(
    archives: dict[str, Path], requests: list[LabelledRequest], tmp_path: Path, temporary: Path, scheduling: str
) -> None:
    with (
        ExitStack() as stack,
        stopped_by_the_test(archives["onnx"], tmp_path, temporary, "--scheduling", scheduling) as server,
    ):
        expected = expected_labels(server, requests)
        token = server.state.inference_token()
        worker = hold(server)
        connections = [stack.enter_context(closing(connection(server))) for _ in requests]
        *whole, (slow, slow_request) = list(zip(connections, requests, strict=True))
        idle = stack.enter_context(closing(connect(server.state.inference_url)))
        for one, request in whole:
            one.request("POST", PATH, request.body, headers(token, request))
        # The last is still uploading when the signal comes.
        slow.putrequest("POST", PATH)
        for name, value in {**headers(token, slow_request), "Content-Length": str(len(slow_request.body))}.items():
            slow.putheader(name, value)
        slow.endheaders(slow_request.body[:10])
        time.sleep(0.5)  # until the server has begun to read it

        os.kill(server.state.pid, signal.SIGTERM)
        wait_until_refused(server.state.inference_url)
        time.sleep(1.5)  # longer than it waits when nothing is in flight
        slow.send(slow_request.body[10:])
        os.kill(worker, signal.SIGCONT)

        responses = [one.getresponse() for one in connections]
        assert [response.getheader("connection") for response in responses] == ["close"] * IN_FLIGHT
        assert [label(response) for response in responses] == expected
        assert [one.sock for one in connections] == [None] * IN_FLIGHT  # closed behind the answer
        idle.settimeout(ANSWER_TIMEOUT_S)
        assert idle.recv(1) == b""  # not a reset


@BOTH_WAYS
def test_clients_that_go_on_asking_get_an_answer_or_a_clean_refusal(
    archives: dict[str, Path], requests: list[LabelledRequest], tmp_path: Path, temporary: Path, scheduling: str
) -> None:
    signalled = threading.Event()

    def ask_until_refused(request: LabelledRequest, expected: str) -> tuple[int, int]:
        """How many answers there were, and how many to requests that were sent after the signal."""
        before = after = 0
        with closing(connection(server)) as one:
            while True:
                late = signalled.is_set()
                try:
                    one.request("POST", PATH, request.body, headers(token, request))
                except ConnectionRefusedError:
                    assert late or signalled.is_set()
                    return before, after
                assert label(one.getresponse()) == expected
                before, after = before + (not late), after + late

    with stopped_by_the_test(archives["onnx"], tmp_path, temporary, "--scheduling", scheduling) as server:
        expected = expected_labels(server, requests)
        token = server.state.inference_token()
        with ThreadPoolExecutor(IN_FLIGHT) as pool:
            asking = [pool.submit(ask_until_refused, *pair) for pair in zip(requests, expected, strict=True)]
            time.sleep(3)
            signalled.set()
            os.kill(server.state.pid, signal.SIGTERM)
            counts = [one.result(timeout=ANSWER_TIMEOUT_S) for one in asking]
    assert min(before for before, _ in counts) > 0


@BOTH_WAYS
def test_what_cannot_be_answered_in_time_is_told_so(
    archives: dict[str, Path], requests: list[LabelledRequest], tmp_path: Path, temporary: Path, scheduling: str
) -> None:
    with (
        ExitStack() as stack,
        stopped_by_the_test(
            archives["onnx"], tmp_path, temporary, "--scheduling", scheduling, "--drain", "1"
        ) as server,
    ):
        token = server.state.inference_token()
        hold(server)
        connections = [stack.enter_context(closing(connection(server))) for _ in requests]
        for one, request in zip(connections, requests, strict=True):
            one.request("POST", PATH, request.body, headers(token, request))
        time.sleep(0.5)
        os.kill(server.state.pid, signal.SIGTERM)
        for one in connections:
            response = one.getresponse()
            assert response.status == 503
            assert json.loads(response.read())["error"]["code"] == "stopping"


def test_a_second_signal_ends_it_at_once(
    archives: dict[str, Path], requests: list[LabelledRequest], tmp_path: Path, temporary: Path
) -> None:
    with ExitStack() as stack, stopped_by_the_test(archives["onnx"], tmp_path, temporary) as server:
        token = server.state.inference_token()
        hold(server)
        one = stack.enter_context(closing(connection(server)))
        one.request("POST", PATH, requests[0].body, headers(token, requests[0]))
        os.kill(server.state.pid, signal.SIGTERM)
        wait_until_refused(server.state.inference_url)
        began = time.monotonic()
        os.kill(server.state.pid, signal.SIGTERM)
        wait_until_gone(server.state.pid)
        assert time.monotonic() - began < 20  # it would wait for 30 s
