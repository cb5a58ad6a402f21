"""The continuous worker: whatever comes in whatever order, each request gets its own answer, once."""

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from handlers import continuous
from handlers.continuous import ContinuousWorker, serve_continuously
from handlers.cost import CostModel
from handlers.fields import read_parts
from handlers.model import ServedModel
from handlers.service import Service, logger
from handlers.signature import Signature

from .stock_torchserve import Replies, async_service, inference_request, message, ts

DEADLINE_S = 200
JSON = "application/json"
TRIPLE = Signature.from_document(
    {
        "format_version": 1,
        "task": "tensor",
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", "length"], "padding": 0}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", "length"]}],
        "axes": {"length": {"maximum": 64}},
    }
)


class Triple:
    """Triples its input; notes the shapes of its batches, and runs only when it may."""

    device = "cpu"

    def __init__(self):
        self.shapes = []
        self.entered = threading.Event()
        self.may_run = threading.Event()
        self.may_run.set()

    def run(self, batch):
        self.entered.set()
        assert self.may_run.wait(DEADLINE_S)
        self.shapes.append(batch["x"].shape)
        if (batch["x"] == -1).any():
            raise RuntimeError("cannot compute a -1")
        return {"y": batch["x"] * 3}


class Running:
    """A worker in a thread, and the frontend's end of its connection."""

    def __init__(self, model):
        self.model = model
        self._connection, worker = socket.socketpair()
        self._connection.settimeout(DEADLINE_S)
        self._worker = worker
        self._replies = Replies(self._connection.makefile("rb"))
        service = Service()
        service._model = model
        self.worker = ContinuousWorker(
            model,
            worker,
            parts=lambda frame: read_parts(frame.fields, frame.headers),
            encode=service._reply,
            response_timeout_s=10 * DEADLINE_S,
        )
        self.thread = threading.Thread(target=self.worker.run, daemon=True)
        self.thread.start()

    def send(self, *requests):
        self._connection.sendall(message(*requests))

    def answers(self, count):
        """The next answers in their order: id, status and document of each."""
        found = []
        while len(found) < count:
            for id, status, phrase, content_type, body in next(self._replies):
                assert content_type == JSON
                assert phrase.isascii()
                found.append((id, status, json.loads(body)))
        assert len(found) == count
        return found

    def wait_until_held(self, count):
        """Until so many requests have been read and wait for the model."""
        deadline = time.monotonic() + DEADLINE_S
        while len(self.worker._waiting) < count:
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def close(self):
        """Close the connection: the worker ends."""
        self._replies._stream.close()
        self._connection.close()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()
        self._worker.close()


@pytest.fixture
def run(monkeypatch):
    """Starts the worker of a model; it must not end the process."""
    ended = []
    interval = sys.getswitchinterval()
    # A worker's threads end with its process, which here is that of the tests.
    monkeypatch.setattr(continuous, "os", SimpleNamespace(_exit=ended.append))
    running = []
    before = logger.handlers[:], logger.propagate
    logger.handlers[:], logger.propagate = [], True

    def start(model):
        running.append(Running(model))
        return running[-1]

    yield start
    for one in running:
        if one.thread.is_alive():
            one.close()
    sys.setswitchinterval(interval)
    logger.handlers[:], logger.propagate = before
    assert ended == []


@pytest.fixture
def backend():
    return Triple()


@pytest.fixture
def model(backend):
    return ServedModel(TRIPLE, backend, max_batch=4, identity={"model": "m", "version": "1"})


def ask(id, document, **headers):
    fields = [("body", JSON, json.dumps(document).encode())]
    return inference_request(id, fields, [("Content-Type", JSON), *headers.items()])


def of_length(id, length, **headers):
    return ask(id, {"inputs": [float(length)] * length}, **headers)


def tripled(length):
    return {"outputs": {"y": [3.0 * length] * length}, "model": "m", "version": "1"}


def test_a_request_is_answered_with_its_id_and_type(run, model):
    worker = run(model)
    worker.send(of_length("6a0b-1", 3))
    assert worker.answers(1) == [("6a0b-1", 200, tripled(3))]


def test_answers_come_in_the_plans_order_and_each_is_right(run, backend):
    worker = run(ServedModel(TRIPLE, backend, max_batch=1, identity={"model": "m", "version": "1"}))
    backend.may_run.clear()
    worker.send(of_length("first", 1))
    assert backend.entered.wait(DEADLINE_S)
    lengths = [9, 2, 30, 5, 1, 16]
    worker.send(*(of_length(str(length), length) for length in lengths))
    worker.wait_until_held(len(lengths))
    backend.may_run.set()
    found = worker.answers(1 + len(lengths))
    assert [id for id, _, _ in found] == ["first", *map(str, sorted(lengths))]
    assert [document for _, _, document in found[1:]] == [tripled(length) for length in sorted(lengths)]


def test_what_arrives_while_the_model_computes_shares_batches(run, model, backend):
    worker = run(model)
    backend.may_run.clear()
    worker.send(of_length("0", 1))
    assert backend.entered.wait(DEADLINE_S)
    for i in range(1, 9):  # each in a message of its own
        worker.send(of_length(str(i), 5))
    worker.wait_until_held(8)
    backend.may_run.set()
    assert {status for _, status, _ in worker.answers(9)} == {200}
    assert backend.shapes == [(1, 1), (4, 5), (4, 5)]


def test_an_answer_does_not_wait_for_the_rest_of_its_round(run, backend):
    worker = run(ServedModel(TRIPLE, backend, max_batch=1))
    backend.may_run.clear()
    worker.send(of_length("0", 1))
    assert backend.entered.wait(DEADLINE_S)
    worker.send(of_length("short", 1), ask("long", {"inputs": [7.0] * 64}))
    worker.wait_until_held(2)
    run_, gate = backend.run, threading.Event()

    def long_ones_wait(batch):
        if batch["x"].shape[1] == 64:
            assert gate.wait(DEADLINE_S)
        return run_(batch)

    backend.run = long_ones_wait
    backend.may_run.set()
    assert [id for id, _, _ in worker.answers(2)] == ["0", "short"]
    gate.set()
    assert [id for id, _, _ in worker.answers(1)] == ["long"]


def test_several_samples_of_a_request_are_answered_together_in_their_order(run, model):
    worker = run(model)
    lengths = [9, 1, 30, 1, 5, 2, 64]
    worker.send(
        of_length("one", 4),
        ask("many", {"instances": [[float(length)] * length for length in lengths]}),
        of_length("other", 8),
    )
    found = {id: (status, document) for id, status, document in worker.answers(3)}
    assert found["one"] == (200, tripled(4))
    assert found["other"] == (200, tripled(8))
    status, many = found["many"]
    assert status == 200
    assert [item["outputs"]["y"] for item in many["predictions"]] == [[3.0 * length] * length for length in lengths]


def test_bad_requests_hurt_only_themselves(run, model):
    worker = run(model)
    worker.send(
        of_length("good", 3),
        ask("wrong key", {"image": 1}),
        inference_request("not JSON", [("body", JSON, b"{")], [("content-type", JSON)]),
        inference_request("nothing"),
        ask("too long", {"inputs": [0.0] * 65}),
        inference_request("no UTF-8", [("body", "", b"\xff{")], [("content-type", JSON)]),
        of_length("good too", 5),
    )
    found = {id: (status, document.get("error", {}).get("code")) for id, status, document in worker.answers(7)}
    assert found == {
        "good": (200, None),
        "wrong key": (400, "wrong_key"),
        "not JSON": (400, "malformed_json"),
        "nothing": (400, "empty_request"),
        "too long": (422, "wrong_size"),
        "no UTF-8": (400, "not_utf8"),
        "good too": (200, None),
    }


def test_a_form_has_a_content_type_a_field(run, served_signature, brightness_backend, picture):
    worker = run(ServedModel(served_signature, brightness_backend))
    fields = [("a", "image/png", picture("bright")), ("b", "image/png", picture("dark"))]
    worker.send(inference_request("form", fields, [("content-type", "multipart/form-data; boundary=x")]))
    ((_, status, document),) = worker.answers(1)
    assert status == 200
    assert [item["label"] for item in document["predictions"]] == ["bright", "dark"]


def test_a_model_failure_on_one_sample_hurts_only_its_request(run, model, backend, caplog):
    worker = run(model)
    backend.may_run.clear()
    worker.send(of_length("0", 3))
    assert backend.entered.wait(DEADLINE_S)
    worker.send(
        of_length("1", 3),
        ask("fails", {"inputs": [-1.0] * 3}),
        ask("fails in part", {"instances": [[1.0], [-1.0] * 2, [2.0]]}),
        of_length("2", 3),
    )
    worker.wait_until_held(4)
    backend.may_run.set()
    found = {id: (status, document.get("error", {}).get("code")) for id, status, document in worker.answers(5)}
    failed = (500, "inference_failed")
    assert found == {"0": (200, None), "1": (200, None), "2": (200, None), "fails": failed, "fails in part": failed}
    assert "request fails failed: inference_failed" in caplog.text
    assert "cannot compute a -1" in caplog.text


class TestDeadlines:
    @pytest.fixture
    def model(self, model):
        model._cost = CostModel(call=3600.0)  # an hour a batch, it believes
        return model

    @pytest.mark.parametrize("name", ["x-request-timeout-ms", "X-Envoy-Expected-RQ-Timeout-Ms"])
    def test_who_will_have_given_up_is_told_so_and_costs_nothing(self, run, model, backend, name):
        worker = run(model)
        worker.send(of_length("soon", 3, **{name: "1500"}), of_length("late", 3, **{name: "100000000"}))
        found = {id: (status, document) for id, status, document in worker.answers(2)}
        assert found["late"] == (200, tripled(3))
        status, document = found["soon"]
        assert (status, document["error"]["code"]) == (503, "deadline_exceeded")
        assert document["error"]["message"].endswith(".")
        assert backend.shapes == [(1, 3)]

    @pytest.mark.parametrize("value", ["", "soon", "-5", "1.5", "1e1", "0x1", "\u0661", "9" * 5000])
    def test_a_header_that_is_no_number_is_no_deadline(self, run, model, value):
        worker = run(model)
        worker.send(of_length("1", 3, **{"x-request-timeout-ms": value}))
        assert worker.answers(1) == [("1", 200, tripled(3))]

    def test_a_field_of_that_name_is_no_deadline(self, run, served_signature, brightness_backend, picture):
        model = ServedModel(served_signature, brightness_backend)
        model._cost = CostModel(call=3600.0)
        worker = run(model)
        fields = [("x-request-timeout-ms", "image/png", picture("dark"))]
        worker.send(inference_request("1", fields, [("content-type", "multipart/form-data; boundary=x")]))
        assert [(id, status) for id, status, _ in worker.answers(1)] == [("1", 200)]

    def test_a_request_of_several_samples_is_shed_whole(self, run, backend):
        # A batch of one sample takes a thousand seconds, it believes; of the long one alone, three thousand more.
        model = ServedModel(TRIPLE, backend, max_batch=1)
        model._cost = CostModel(call=1000.0, position=50.0)
        worker = run(model)
        headers = {"x-request-timeout-ms": "2000000"}
        document = {"instances": [[1.0], [1.0] * 60, [2.0]]}
        worker.send(ask("partly", document, **headers), ask("alone", {"inputs": [1.0]}, **headers))
        found = {id: status for id, status, _ in worker.answers(2)}
        assert found == {"partly": 503, "alone": 200}
        assert (1, 60) not in backend.shapes


def test_five_hundred_requests_at_once_keep_their_ids_and_sizes(run, backend):
    dice = random.Random(0)
    worker = run(ServedModel(TRIPLE, backend, max_batch=16, identity={"model": "m", "version": "1"}))
    lengths = {f"id-{i}": dice.randint(1, 64) for i in range(500)}
    data = b""
    pending = list(lengths.items())
    while pending:
        count = dice.randint(1, 32)
        data += message(*(of_length(id, length) for id, length in pending[:count]))
        del pending[:count]

    def send():
        for position in range(0, len(data), 7919):  # cut anywhere
            worker._connection.sendall(data[position : position + 7919])

    sender = threading.Thread(target=send)
    sender.start()
    found = worker.answers(500)
    sender.join(DEADLINE_S)
    assert len({id for id, _, _ in found}) == 500
    assert all((status, document) == (200, tripled(lengths[id])) for id, status, document in found)
    assert sum(batch for batch, _ in backend.shapes) == 500
    assert max(batch for batch, _ in backend.shapes) <= 16


def test_closing_the_connection_ends_it(run, model):
    worker = run(model)
    worker.send(of_length("1", 3))
    worker.answers(1)
    worker.close()
    idle = run(model)
    idle.close()


def test_closing_it_in_the_middle_of_a_request_and_of_a_batch_ends_it(run, model, backend):
    worker = run(model)
    backend.may_run.clear()
    worker.send(of_length("1", 3))
    assert backend.entered.wait(DEADLINE_S)
    worker._connection.sendall(message(of_length("2", 3))[:-5])
    closing = threading.Thread(target=worker.close)
    closing.start()
    backend.may_run.set()
    closing.join(DEADLINE_S)
    assert not worker.thread.is_alive()


# A worker in a process of its own, which is asked one thing. What it does wrong comes before the last line.
PROCESS = """\
import json, socket, sys, time
import numpy as np
from handlers.continuous import ContinuousWorker
from handlers.frames import Reply
from handlers.model import ServedModel
from handlers.request import Part
from handlers.signature import Signature

signature = Signature.from_document(json.loads(sys.argv[1]))
ours, theirs = socket.socketpair()

class Double:
    device = "cpu"
    def run(self, batch):
        return {"y": batch["x"] * 2}

backend = Double()
model = ServedModel(signature, backend)
options = {
    "parts": lambda frame: [Part(value=frame.fields["body"], content_type="application/json")],
    "encode": lambda answer, frame: Reply(frame.id, 200, "OK", "application/json", json.dumps(answer.body).encode()),
    "response_timeout_s": 3600,
}
sent = bytes.fromhex(sys.argv[2])
def broken(*arguments):
    raise KeyError("a defect")
"""
END = """
ours.sendall(sent)
if "closes" in sys.argv:
    ours.close()
ContinuousWorker(model, theirs, **options).run()
print("ended")
"""


def run_process(wrong, *arguments):
    command = [sys.executable, "-c", PROCESS + wrong + END]
    document, sent = json.dumps(TRIPLE.to_document()), message(of_length("1", 3)).hex()
    return subprocess.run(
        [*command, document, sent, *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
        cwd=Path(continuous.__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


class TestProcess:
    def test_it_ends_in_order_when_the_frontend_is_gone(self):
        done = run_process("", "closes")
        assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")

    def test_a_batch_that_hangs_ends_it(self):
        done = run_process("options['response_timeout_s'] = 0.2\nbackend.run = lambda batch: time.sleep(3600)")
        assert done.returncode == 1
        assert "the worker ends: a batch takes more than 0.2 s" in done.stderr

    @pytest.mark.parametrize(
        ("wrong", "thread"),
        [
            ("options['parts'] = broken", "read"),
            ("sent = b'?'", "read"),
            ("model.plan = broken", "compute"),
            ("options['encode'] = broken", "compute"),
            # A request that is refused, which the model never sees.
            ("options['encode'] = broken; sent = sent.replace(b'inputs', b'imputs')", "answer"),
        ],
    )
    def test_a_defect_in_any_thread_ends_it(self, wrong, thread):
        done = run_process(wrong)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"the worker ends: a defect in {thread}" in done.stderr
        assert "Traceback" in done.stderr


class TestServeContinuously:
    @pytest.fixture
    def stock(self, monkeypatch):
        """TorchServe's own loop, which is there again after the test."""
        before = async_service.AsyncService.run
        monkeypatch.setattr(async_service.AsyncService, "run", before)
        return before

    def test_torchserves_loop_becomes_the_workers(self, stock):
        started = []
        run = []

        def start(connection):
            started.append(connection)
            return SimpleNamespace(run=lambda: run.append(True))

        assert serve_continuously(start)
        service = SimpleNamespace(cl_socket="the connection")
        # None is what the worker's caller takes for a good end.
        assert async_service.AsyncService(service).run() is None
        assert (started, run) == (["the connection"], [True])

    def test_another_release_keeps_its_own(self, stock, monkeypatch):
        monkeypatch.setattr(ts, "__version__", "0.13.0")
        assert not serve_continuously(lambda connection: pytest.fail("it was started"))
        assert async_service.AsyncService.run is stock

    def test_without_torchserve_nothing_happens(self, stock, monkeypatch):
        monkeypatch.setitem(sys.modules, "ts", None)
        assert not serve_continuously(lambda connection: pytest.fail("it was started"))
        assert async_service.AsyncService.run is stock
