"""The continuous worker: whatever comes in whatever order, each request gets its own answer, once."""

import random
import sys
import threading
import time
import weakref
from types import SimpleNamespace

import pytest

from handlers import continuous
from handlers.continuous import serve_continuously
from handlers.cost import CostModel
from handlers.model import ServedModel
from handlers.service import logger

from .continuous_worker import DEADLINE_S, JSON, TRIPLE, Running, Triple, ask, of_length, tripled
from .stock_torchserve import async_service, inference_request, message, ts


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

    def start(model, **options):
        running.append(Running(model, **options))
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


def test_a_request_is_answered_with_its_id_and_type(run, model):
    worker = run(model)
    worker.send(of_length("6a0b-1", 3))
    assert worker.answers(1) == [("6a0b-1", 200, tripled(3))]


def test_what_pays_best_comes_first_and_each_answer_is_right(run, backend):
    model = ServedModel(TRIPLE, backend, max_batch=1, identity={"model": "m", "version": "1"})
    # Calls cost, so of single samples the longest pay best; and all of them take longer than any of this.
    model._cost = CostModel(call=100, position=100)
    worker = run(model)
    backend.may_run.clear()
    worker.send(of_length("first", 1))
    assert backend.entered.wait(DEADLINE_S)
    lengths = [9, 2, 30, 5, 1, 16]
    worker.send(*(of_length(str(length), length) for length in lengths))
    worker.wait_until_held(len(lengths))
    backend.may_run.set()
    found = worker.answers(1 + len(lengths))
    assert [id for id, _, _ in found] == ["first", *map(str, sorted(lengths, reverse=True))]
    assert [document for _, _, document in found[1:]] == [tripled(length) for length in sorted(lengths, reverse=True)]


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


def test_a_defect_in_reading_a_request_is_its_own(run, model, caplog):
    worker = run(model)
    parts = worker.worker._parts

    def broken(frame):
        if frame.id == b"broken":
            raise KeyError("a defect")
        return parts(frame)

    worker.worker._parts = broken
    worker.send(of_length("1", 3), of_length("broken", 3), of_length("2", 5))
    found = {id: (status, document.get("error", {}).get("code")) for id, status, document in worker.answers(3)}
    assert found == {"1": (200, None), "2": (200, None), "broken": (500, "request_failed")}
    assert "a defect" in caplog.text


def test_a_round_is_no_larger_than_can_be_planned_and_the_oldest_come_first(run, model, backend, monkeypatch):
    monkeypatch.setattr(continuous, "MOST_PLANNED", 6)
    planned = []
    plan = model.plan
    monkeypatch.setattr(model, "plan", lambda samples: planned.append(len(samples)) or plan(samples))
    worker = run(model, pipelined=False)
    backend.may_run.clear()
    worker.send(of_length("0", 1))
    assert backend.entered.wait(DEADLINE_S)
    several = {"instances": [[1.0]] * 4}
    worker.send(ask("a", several), of_length("b", 2), ask("c", several), ask("d", {"instances": [[1.0]] * 7}))
    backend.may_run.set()
    assert [id for id, _, _ in worker.answers(5)] == ["0", "a", "b", "c", "d"]
    # A request that is larger by itself has a round by itself.
    assert planned == [1, 5, 4, 7]


class TestRoom:
    def test_what_has_no_room_waits_in_the_connection(self, run, model, backend, monkeypatch):
        monkeypatch.setattr(continuous, "_MOST_HELD_BYTES", 400)
        worker = run(model)
        backend.may_run.clear()
        worker.send(of_length("0", 1))
        assert backend.entered.wait(DEADLINE_S)
        # 64 float32 each: one fits beside the first, and of the next one's body a part.
        worker.send(*(ask(str(i), {"inputs": [1.0] * 64}) for i in range(1, 20)))
        worker.wait_until_held(1)
        time.sleep(0.05)
        assert len(worker.worker._waiting) <= 1
        assert worker.worker._room.held <= 4 + 256 + 400
        backend.may_run.set()
        assert {status for _, status, _ in worker.answers(20)} == {200}
        assert worker.worker._room.held == 0

    def test_refused_and_failed_requests_leave_none_of_it_taken(self, run, model):
        worker = run(model)
        worker.send(
            ask("wrong key", {"image": 1}),
            ask("fails", {"inputs": [-1.0] * 3}),
            of_length("late", 3, **{"x-request-timeout-ms": "0"}),
            of_length("good", 3),
        )
        assert {id: status for id, status, _ in worker.answers(4)} == {
            "wrong key": 400,
            "fails": 500,
            "late": 503,
            "good": 200,
        }
        assert worker.worker._room.held == 0


class TestDecoders:
    @pytest.fixture
    def model(self, backend):
        return ServedModel(TRIPLE, backend, max_batch=4, identity={"model": "m", "version": "1"}, decoding=3)

    def test_a_slow_request_does_not_keep_others_from_being_decoded(self, run, model, monkeypatch):
        gate = threading.Event()
        read = model.read

        def slow(parts):
            if b"64.0" in parts[0].value:
                assert gate.wait(DEADLINE_S)
            return read(parts)

        monkeypatch.setattr(model, "read", slow)
        worker = run(model)
        worker.send(of_length("slow", 64), *(of_length(str(length), length) for length in range(1, 30)))
        found = worker.answers(29)
        assert {id for id, _, _ in found} == {str(length) for length in range(1, 30)}
        gate.set()
        assert worker.answers(1) == [("slow", 200, tripled(64))]

    def test_each_request_gets_its_own_answer(self, run, model):
        worker = run(model)
        lengths = {f"id-{i}": 1 + i % 64 for i in range(300)}
        worker.send(*(of_length(id, length) for id, length in lengths.items()), ask("bad", {"image": 1}))
        found = {id: (status, document) for id, status, document in worker.answers(301)}
        assert found.pop("bad")[0] == 400
        assert found == {id: (200, tripled(length)) for id, length in lengths.items()}

    def test_a_defect_in_taking_a_request_in_ends_the_worker(self, model, backend, monkeypatch, caplog):
        ended = threading.Event()
        monkeypatch.setattr(continuous, "os", SimpleNamespace(_exit=lambda code: ended.set()))
        monkeypatch.setattr(logger, "propagate", True)
        worker = Running(model)
        monkeypatch.setattr(worker.worker, "_decoded", lambda frame: 1 / 0)
        worker.send(of_length("1", 1))
        assert ended.wait(DEADLINE_S)
        assert "the worker ends: a defect in take in" in caplog.text.replace("  ", " ")
        worker.close()


@pytest.mark.parametrize("options", [{}, {"pipelined": False}, {"lanes": 2}], ids=str)
def test_an_answered_request_leaves_nothing_behind(run, model, backend, options):
    samples = []

    class Noted(dict):
        """A dictionary that can be referred to weakly."""

    read = model.read

    def noting(parts):
        decoded = read(parts)
        decoded.samples[:] = [Noted(sample) for sample in decoded.samples]
        samples.extend(map(weakref.ref, decoded.samples))
        return decoded

    model.read = noting
    worker = run(model, **options)
    worker.send(*(of_length(str(i), i) for i in range(1, 20)))
    worker.answers(19)
    end = time.monotonic() + DEADLINE_S
    while any(reference() is not None for reference in samples):
        assert time.monotonic() < end
        time.sleep(0.001)
    assert len(samples) == 19


class TestOneThread:
    """Decoding, computing and answering in turn, for models that compute next to nothing."""

    def test_each_request_gets_its_own_answer_and_they_share_batches(self, run, model, backend):
        worker = run(model, pipelined=False)
        lengths = {f"id-{i}": 1 + i % 64 for i in range(300)}
        worker.send(*(of_length(id, length) for id, length in lengths.items()))
        found = {id: (status, document) for id, status, document in worker.answers(300)}
        assert found == {id: (200, tripled(length)) for id, length in lengths.items()}
        assert len(backend.shapes) < 150

    def test_bad_and_late_requests_hurt_only_themselves(self, run, model):
        worker = run(model, pipelined=False)
        worker.send(
            of_length("good", 3),
            ask("wrong key", {"image": 1}),
            ask("fails", {"inputs": [-1.0] * 3}),
            of_length("late", 3, **{"x-request-timeout-ms": "0"}),
            ask("many", {"instances": [[1.0], [2.0] * 9]}),
        )
        assert {id: status for id, status, _ in worker.answers(5)} == {
            "good": 200,
            "wrong key": 400,
            "fails": 500,
            "late": 503,
            "many": 200,
        }
        assert worker.worker._room.held == 0

    def test_what_has_no_room_waits_until_the_rest_is_computed(self, run, model, monkeypatch):
        monkeypatch.setattr(continuous, "_MOST_HELD_BYTES", 1000)
        most = []
        plan = model.plan
        monkeypatch.setattr(model, "plan", lambda samples: most.append(len(samples)) or plan(samples))
        worker = run(model, pipelined=False)
        worker.send(*(ask(str(i), {"inputs": [1.0] * 64}) for i in range(20)))  # 256 bytes each
        assert {status for _, status, _ in worker.answers(20)} == {200}
        assert max(most) == 4

    def test_closing_the_connection_ends_it(self, run, model):
        worker = run(model, pipelined=False)
        worker.send(of_length("1", 3))
        worker.answers(1)
        worker.close()


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

    def test_what_a_request_has_waited_in_the_frontend_is_gone_already(self, run, model):
        worker = run(model)
        timeout = {"x-request-timeout-ms": "3700000"}  # a batch takes 3,600,000, it believes
        worker.send(
            of_length("waited", 3, **timeout, **{"torchport-queued-ms": "200000"}),
            of_length("came at once", 3, **timeout, **{"torchport-queued-ms": "0"}),
        )
        assert {id: status for id, status, _ in worker.answers(2)} == {"waited": 503, "came at once": 200}

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
    own = [
        thread for thread in threading.enumerate() if thread.name.startswith(("torchport_answer", "torchport_watch"))
    ]
    for thread in own:
        thread.join(DEADLINE_S)
        assert not thread.is_alive()


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


class TestLanes:
    """Two threads that compute, as for a GPU."""

    @pytest.fixture
    def gates(self, backend):
        """Lets a batch of a length end; until then it computes."""
        run, gates, entered = backend.run, {5: threading.Event(), 9: threading.Event()}, set()

        def gated(batch):
            length = batch["x"].shape[1]
            entered.add(length)
            assert gates.get(length) is None or gates[length].wait(DEADLINE_S)
            return run(batch)

        backend.run = gated
        backend.entered_lengths = entered
        return gates

    def until(self, condition):
        end = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.001)

    def test_a_second_batch_begins_and_ends_while_the_first_computes(self, run, model, backend, gates):
        worker = run(model, lanes=2)
        worker.send(of_length("slow", 9))
        self.until(lambda: 9 in backend.entered_lengths)
        worker.send(of_length("quick", 3))
        assert worker.answers(1) == [("quick", 200, tripled(3))]
        gates[9].set()
        assert worker.answers(1) == [("slow", 200, tripled(9))]

    def test_batches_of_one_plan_are_shared(self, run, backend, gates):
        model = ServedModel(TRIPLE, backend, max_batch=1, identity={"model": "m", "version": "1"})
        worker = run(model, lanes=2)
        worker.send(of_length("five", 5), of_length("nine", 9), of_length("two", 2))
        self.until(lambda: {5, 9} <= backend.entered_lengths)
        assert model.busy_since is not None
        gates[9].set()
        gates[5].set()
        assert {id: document for id, _, document in worker.answers(3)} == {
            "two": tripled(2),
            "five": tripled(5),
            "nine": tripled(9),
        }
        self.until(lambda: model.busy_since is None)

    def test_a_third_waits(self, run, model, backend, gates):
        worker = run(model, lanes=2)
        for length in (5, 9):
            worker.send(of_length(str(length), length))
            self.until(lambda length=length: length in backend.entered_lengths)
        worker.send(of_length("3", 3))
        worker.wait_until_held(1)
        assert 3 not in backend.entered_lengths
        gates[9].set()
        assert {id for id, _, _ in worker.answers(2)} == {"9", "3"}
        gates[5].set()
        assert worker.answers(1)[0][0] == "5"

    def test_each_of_many_requests_gets_its_own_answer_once(self, run, model):
        worker = run(model, lanes=2)
        generator = random.Random(3)
        lengths = [generator.randint(1, 64) for _ in range(300)]
        for i, length in enumerate(lengths):
            worker.send(of_length(f"{i}-{length}", length))
        found = worker.answers(300)
        assert sorted(int(id.split("-")[0]) for id, _, _ in found) == list(range(300))
        assert all(document == tripled(int(id.split("-")[1])) for id, _, document in found)

    def test_each_thread_that_computes_has_warmed_up(self, run, model, monkeypatch):
        warmed = []
        monkeypatch.setattr(model, "warm_up_beside", lambda: warmed.append(threading.current_thread().name))
        worker = run(model, lanes=2)
        worker.send(of_length("1", 1))
        worker.answers(1)
        # The one that runs the worker has done so when the model was loaded.
        self.until(lambda: warmed == ["torchport_compute_beside"])

    def test_late_requests_are_shed_beside_others(self, run, model):
        worker = run(model, lanes=2)
        model._cost = CostModel(call=0.2)
        requests = [
            of_length(str(i), 1 + i % 9, **({"X-Request-Timeout-Ms": "100"} if i % 3 == 0 else {})) for i in range(60)
        ]
        worker.send(*requests)
        found = {int(id): status for id, status, _ in worker.answers(60)}
        assert {i for i, status in found.items() if status == 503} == set(range(0, 60, 3))
        assert set(found.values()) == {200, 503}

    def test_what_the_other_computes_counts_as_waiting(self, run, model, backend, gates):
        worker = run(model, lanes=2)
        model._cost = CostModel(call=1000.0)  # seconds a batch, it believes
        worker.send(of_length("first", 9))
        self.until(lambda: 9 in backend.entered_lengths)
        worker.send(
            of_length("too late behind it", 3, **{"X-Request-Timeout-Ms": "1500000"}),
            of_length("in time", 3, **{"X-Request-Timeout-Ms": "2500000"}),
        )
        assert {id: status for id, status, _ in worker.answers(2)} == {"too late behind it": 503, "in time": 200}
        gates[9].set()
        worker.answers(1)
        # Nothing is ahead any more.
        worker.send(of_length("alone", 3, **{"X-Request-Timeout-Ms": "1500000"}))
        assert worker.answers(1)[0][:2] == ("alone", 200)

    @pytest.mark.parametrize(("first", "last"), [(5, 9), (9, 5)])
    def test_what_computes_is_waited_for_when_the_connection_closes(self, run, model, backend, gates, first, last):
        worker = run(model, lanes=2)
        for length in (5, 9):
            worker.send(of_length(str(length), length))
            self.until(lambda length=length: length in backend.entered_lengths)
        closing = threading.Thread(target=worker.close)
        closing.start()
        gates[first].set()
        time.sleep(0.05)
        assert worker.thread.is_alive()
        gates[last].set()
        closing.join(DEADLINE_S)
        assert not worker.thread.is_alive()


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
