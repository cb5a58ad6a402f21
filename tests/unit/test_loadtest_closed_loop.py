"""The closed-loop client against tiny real servers, and its answers against bytes as they arrive."""

import json
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from loadtest.answers import CONNECTION_LOST, CONNECTION_REFUSED, TIMED_OUT, WRONG_ANSWER
from loadtest.closed_loop import ClosedLoop, LoadJob, LoadRecord
from loadtest.compare_answers import Expected
from loadtest.compare_http import AnswerReader, MalformedAnswerError
from loadtest.compare_load import send_load
from loadtest.errors import RunError
from loadtest.payloads import Payload

BODIES = tuple(
    Payload(body=json.dumps({"instances": [text]}).encode(), content_type="application/json")
    for text in ("zero", "one", "two")
)
EXPECTED = tuple(Expected(labels=(text,)) for text in ("zero", "one", "two"))


def answer_to(body):
    """What a right server says: the text itself as its label."""
    (text,) = json.loads(body)["instances"]
    return json.dumps({"predictions": [{"label": text}]}).encode()


def plain(body, status=b"200 OK", extra=b""):
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n%s\r\n%s" % (status, len(body), extra, body)


class Server:
    """A thread a connection; `reply(number, body)` gives the bytes to send, or None to close the connection."""

    def __init__(self, reply):
        self._reply = reply
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port = self._listener.getsockname()[1]
        self.requests, self.in_flight, self.most_in_flight, self.connections = [], 0, 0, 0
        self._lock = threading.Lock()
        self._open = []

    def run(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            self._open.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with connection, connection.makefile("rb") as stream:
            while True:
                try:
                    lines = []
                    while (line := stream.readline()) not in (b"\r\n", b""):
                        lines.append(line)
                    if not line:
                        return  # the client has left
                    head = b"".join(lines)
                    length = next(line for line in head.splitlines() if line.startswith(b"Content-Length"))
                    body = stream.read(int(length.split()[1]))
                    with self._lock:
                        number = len(self.requests)
                        self.requests.append((head, body))
                        self.in_flight += 1
                        self.most_in_flight = max(self.most_in_flight, self.in_flight)
                    data = self._reply(number, body)
                    with self._lock:
                        self.in_flight -= 1
                    if data is None:
                        return
                    connection.sendall(data)
                except OSError:
                    return

    def close(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with suppress(OSError):  # it has been closed already
                connection.shutdown(socket.SHUT_RDWR)


@contextmanager
def serving(reply):
    server = Server(reply)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.close()
        thread.join(timeout=10)


def new_job(port, **options):
    defaults = {
        "host": "127.0.0.1",
        "port": port,
        "path": "/predict",
        "headers": {"Authorization": "Bearer secret"},
        "bodies": BODIES,
        "expected": EXPECTED,
        "users": 4,
        "warm_up_s": 0.1,
        "duration_s": 0.5,
        "timeout_s": 5.0,
        "seed": 0,
    }
    return LoadJob(**{**defaults, **options})


def slowly(number, body):
    time.sleep(0.01)
    return plain(answer_to(body))


def test_it_keeps_so_many_requests_in_flight_and_counts_right_answers():
    with serving(slowly) as server:
        record = ClosedLoop(new_job(server.port)).run()
        head, body = server.requests[0]
    assert record.failed == 0
    assert record.faults == {}
    assert server.most_in_flight == 4
    assert server.connections == 4  # kept
    assert 0 < record.right <= len(server.requests)
    assert record.throughput_rps == pytest.approx(record.right / record.duration_s)
    (p50_ms,) = record.latency.percentiles_ms([50])
    assert p50_ms >= 10
    assert record.cpu_share > 0
    assert record.stall_s > 0
    assert head.startswith(b"POST /predict HTTP/1.1\r\n")
    assert b"Authorization: Bearer secret\r\n" in head
    assert b"Content-Type: application/json\r\n" in head
    assert body in [each.body for each in BODIES]
    assert record.sent >= record.right


def test_the_same_seed_sends_the_same_bodies_in_the_same_order():
    sent = []
    for seed in (3, 3, 4):
        with serving(slowly) as server:
            ClosedLoop(new_job(server.port, users=1, duration_s=0.3, seed=seed)).run()
            sent.append([body for _, body in server.requests[:12]])
    assert sent[0] == sent[1] != sent[2]


def test_every_answer_is_checked_even_after_right_ones():
    def sometimes_wrong(number, body):
        time.sleep(0.002)
        return plain(answer_to(body) if number % 3 else b'{"predictions": [{"label": "other"}]}')

    with serving(sometimes_wrong) as server:
        record = ClosedLoop(new_job(server.port, users=1, warm_up_s=0.0)).run()
    assert set(record.faults) == {WRONG_ANSWER}
    count, example = record.faults[WRONG_ANSWER]
    assert count == record.failed
    assert abs(2 * count - record.right) <= 3  # every third one
    assert "'other' instead of" in example


def test_latency_does_not_lose_the_requests_that_are_slow_at_the_end():
    start_s = time.monotonic()

    def stalls(number, body):
        # Quick at first; from the middle of the window on nobody is answered before it has closed.
        time.sleep(max(0.005, 1.0 - (time.monotonic() - start_s)) if time.monotonic() - start_s > 0.4 else 0.005)
        return plain(answer_to(body))

    with serving(stalls) as server:
        record = ClosedLoop(new_job(server.port, users=2, warm_up_s=0.1, duration_s=0.5)).run()
    assert record.latency.max_ms() > 200


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (lambda number, body: None, CONNECTION_LOST),
        (lambda number, body: b"HTTP/1.1 200 OK\r\n\r\nno end", CONNECTION_LOST),
        (lambda number, body: plain(b'{"message": "full"}', b"503 Busy", b"Connection: close\r\n"), "HTTP 503"),
    ],
)
def test_what_fails_is_counted_by_kind_and_the_load_goes_on(reply, kind):
    with serving(reply) as server:
        record = ClosedLoop(new_job(server.port, users=2, duration_s=0.4)).run()
        assert len(server.requests) > 2
    assert record.right == 0
    assert set(record.faults) == {kind}
    assert record.failed == record.faults[kind][0] > 2


def test_a_silent_server_is_given_up():
    released = threading.Event()

    def silent(number, body):
        released.wait(10)

    with serving(silent) as server:
        record = ClosedLoop(new_job(server.port, users=1, warm_up_s=0.0, duration_s=0.8, timeout_s=0.2)).run()
        released.set()
    assert set(record.faults) == {TIMED_OUT}
    assert record.failed >= 2


def test_a_dead_server_counts_as_refused():
    with serving(slowly) as server:
        port = server.port
    record = ClosedLoop(new_job(port, duration_s=0.3)).run()
    assert set(record.faults) == {CONNECTION_REFUSED}
    assert record.failed < 100  # it does not try in a tight loop


def test_a_process_of_its_own_does_the_job():
    with serving(slowly) as server:
        record = send_load(new_job(server.port))
    assert record.right > 0
    assert record.failed == 0
    assert len(record.latency) > 0
    assert LoadRecord.from_json(json.loads(json.dumps(record.to_json()))).latency.percentiles_ms(
        [50]
    ) == record.latency.percentiles_ms([50])


def test_a_client_that_fails_says_why():
    with pytest.raises(RunError, match=r"exit code 1: .*empty range"):
        send_load(new_job(1, bodies=(), expected=()))


class TestAnswers:
    CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nwhol\r\n1;x=y\r\ne\r\n0\r\n\r\n"

    @pytest.mark.parametrize("data", [plain(b"whole"), CHUNKED], ids=["counted", "chunked"])
    @pytest.mark.parametrize("size", [1, 7, 1000])
    def test_an_answer_is_whole_only_with_its_last_byte(self, data, size):
        reader = AnswerReader()
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        *early, last = [reader.feed(piece) for piece in pieces]
        assert early == [None] * (len(pieces) - 1)
        assert (last.status, last.body, last.closes) == (200, b"whole", False)
        assert reader.feed(plain(b"", b"404 Not Found", b"connection: Close\r\n")).closes

    @pytest.mark.parametrize(
        ("data", "reason"),
        [
            (b"SSH-2.0-server\r\n\r\n", "begins with"),
            (b"HTTP/1.1 OK\r\nContent-Length: 0\r\n\r\n", "begins with"),
            (b"HTTP/1.1 200 OK\r\n\r\n", "neither"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "Content-Length"),
            (plain(b"whole") + b"more", "more bytes"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "a chunk has the size"),
            (b"x" * 70_000, "no end"),
        ],
    )
    def test_what_is_no_answer_is_refused(self, data, reason):
        with pytest.raises(MalformedAnswerError, match=reason):
            AnswerReader().feed(data)
