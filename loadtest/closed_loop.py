"""A light closed-loop client: N requests in flight over N kept connections, one thread, one process.

`torchport compare` measures servers on the cores that its client runs on too, so the client has to be cheap: one
request costs it some 30 µs, where Locust takes ten times as much. It sends prepared bytes over plain sockets, reads
answers by their Content-Length or chunks, and parses an answer only if it has not seen the same bytes for the same
request before.

`python -m loadtest.closed_loop JOB RECORD` reads a :class:`LoadJob` and writes a :class:`LoadRecord`, both as JSON.
"""

import json
import random
import selectors
import socket
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from loadtest.answers import CONNECTION_LOST, CONNECTION_REFUSED, TIMED_OUT, Fault
from loadtest.compare_answers import Expected, judge_answer
from loadtest.compare_http import AnswerReader, HttpAnswer, MalformedAnswerError
from loadtest.files import write_atomically
from loadtest.histogram import Histogram
from loadtest.payloads import Payload

_RECEIVE_BYTES = 1 << 16
# How often silent connections are looked at, and between attempts to connect to a server that refuses.
_RETRY_S = 0.05
# Right answers that are remembered for each request: its last digits depend on what else was in the batch.
_MOST_REMEMBERED = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadJob:
    """What the client is to do.

    Attributes:
        host: Address of the server.
        port: Its port.
        path: Where it answers.
        headers: Headers of every request beside the usual ones.
        bodies: Requests; which comes next is drawn from them.
        expected: For each body, what a right answer to it says.
        users: Requests in flight.
        warm_up_s: Seconds of load that are not counted.
        duration_s: Seconds that are.
        timeout_s: A request without an answer after this long has failed.
        seed: Decides the order of the bodies, the same for every server.
    """

    host: str
    port: int
    path: str
    headers: dict[str, str]
    bodies: tuple[Payload, ...]
    expected: tuple[Expected, ...]
    users: int
    warm_up_s: float
    duration_s: float
    timeout_s: float
    seed: int

    def to_json(self) -> dict[str, Any]:
        """The job as JSON-serialisable values."""
        return {**asdict(self), "bodies": [body.to_json() for body in self.bodies]}

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(
            **{
                **document,
                "bodies": tuple(Payload.from_json(body) for body in document["bodies"]),
                "expected": tuple(Expected.from_json(each) for each in document["expected"]),
            }
        )

    def request(self, body: Payload) -> bytes:
        """The bytes of one request."""
        headers = {
            "Host": f"{self.host}:{self.port}",
            "Content-Type": body.content_type,
            "Content-Length": str(len(body.body)),
            **self.headers,
        }
        lines = [f"POST {self.path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items())]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body.body


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRecord:
    """What the client saw: in the measured window, unless it says otherwise.

    Attributes:
        sent: Requests that were sent and answered, or failed, from the first connection to the last.
        right: Right answers that arrived in the window.
        failed: Requests that failed in it.
        duration_s: Its length.
        cpu_share: What of one core the client used.
        stall_s: The longest that it did not look after its connections, which it should do every few milliseconds.
        latency: Of right answers to requests sent in it, from send to last byte.
        faults: Number and first example of the failures by kind.
    """

    sent: int
    right: int
    failed: int
    duration_s: float
    cpu_share: float
    stall_s: float
    latency: Histogram
    faults: dict[str, tuple[int, str]]

    @property
    def throughput_rps(self) -> float:
        """Right answers per second."""
        return self.right / self.duration_s

    def to_json(self) -> dict[str, Any]:
        """The record as JSON-serialisable values."""
        return {
            "sent": self.sent,
            "right": self.right,
            "failed": self.failed,
            "duration_s": self.duration_s,
            "cpu_share": self.cpu_share,
            "stall_s": self.stall_s,
            "latency": self.latency.encode(),
            "faults": self.faults,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(
            **{
                **document,
                "latency": Histogram.decode(document["latency"]),
                "faults": {kind: (count, example) for kind, (count, example) in document["faults"].items()},
            }
        )


@dataclass(slots=True)
class _Connection:
    """One user: a connection with one request in flight."""

    link: socket.socket | None = None
    reader: AnswerReader = field(default_factory=AnswerReader)
    body: int = 0
    sent_s: float = 0.0
    retry_s: float = 0.0


class ClosedLoop:
    """Keeps requests in flight until the window is over.

    Args:
        job: What to do.
    """

    def __init__(self, job: LoadJob) -> None:
        self._job = job
        self._requests = [job.request(body) for body in job.bodies]
        self._remembered: list[set[bytes]] = [set() for _ in job.bodies]
        self._dice = random.Random(job.seed)
        self._selector = selectors.DefaultSelector()
        self._finished: list[tuple[float, float, Fault | None]] = []
        self._checked_s = 0.0
        self._stall_s = 0.0

    def run(self) -> LoadRecord:
        """Sends the load and counts."""
        connections = [_Connection() for _ in range(self._job.users)]
        try:
            for connection in connections:
                self._send_next(connection)
            self._turn(connections, until_s=time.perf_counter() + self._job.warm_up_s)
            cpu_s, start_s = time.process_time(), time.perf_counter()
            self._stall_s = 0.0
            self._turn(connections, until_s=start_s + self._job.duration_s)
            cpu_s, end_s = time.process_time() - cpu_s, time.perf_counter()
            # What is still on its way has a latency too, and not the shortest. The load goes on meanwhile.
            deadline_s = end_s + 2 * self._job.timeout_s
            while any(each.sent_s < end_s for each in connections) and time.perf_counter() < deadline_s:
                self._turn(connections, until_s=0.0)
            return self._record(start_s, end_s, cpu_s)
        finally:
            for connection in connections:
                self._close(connection)
            self._selector.close()

    def _turn(self, connections: list[_Connection], *, until_s: float) -> None:
        """Receives and sends until a moment, once at least."""
        while True:
            now_s = time.perf_counter()
            for key, _ in self._selector.select(_RETRY_S if until_s <= now_s else min(_RETRY_S, until_s - now_s)):
                self._receive(key.data)
            if now_s - self._checked_s > _RETRY_S:
                self._check(connections, now_s)
                self._checked_s = now_s
            turned_s = time.perf_counter()
            self._stall_s = max(self._stall_s, turned_s - now_s)
            if turned_s >= until_s:
                return

    def _send_next(self, connection: _Connection) -> None:
        """Draws a body and sends it, over a new connection if there is none."""
        connection.body = self._dice.randrange(len(self._requests))
        connection.sent_s = time.perf_counter()
        try:
            if connection.link is None:
                connection.link = self._connect(connection)
            connection.link.sendall(self._requests[connection.body])
        except OSError as error:
            kind = CONNECTION_REFUSED if isinstance(error, ConnectionRefusedError) else CONNECTION_LOST
            self._fail(connection, kind, f"{type(error).__name__}: {error}")

    def _connect(self, connection: _Connection) -> socket.socket:
        opened = socket.create_connection((self._job.host, self._job.port), timeout=self._job.timeout_s)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._selector.register(opened, selectors.EVENT_READ, connection)
        connection.reader = AnswerReader()
        return opened

    def _receive(self, connection: _Connection) -> None:
        """Takes what has arrived; when the answer is whole, counts it and sends the next request."""
        if connection.link is None:  # closed by what came before in the same turn
            return
        try:
            data = connection.link.recv(_RECEIVE_BYTES)
            answer = connection.reader.feed(data)
        except (OSError, MalformedAnswerError) as error:
            self._fail(connection, CONNECTION_LOST, f"{type(error).__name__}: {error}")
            return
        if answer is None:
            if not data:
                self._fail(connection, CONNECTION_LOST, "the server closed the connection before it had answered")
            return
        self._finished.append((connection.sent_s, time.perf_counter(), self._judge(connection.body, answer)))
        if answer.closes:
            self._close(connection)
        self._send_next(connection)

    def _judge(self, body: int, answer: HttpAnswer) -> Fault | None:
        known = self._remembered[body]
        if answer.status == 200 and answer.body in known:
            return None
        fault = judge_answer(answer.status, answer.body, self._job.expected[body])
        if fault is None and len(known) < _MOST_REMEMBERED:
            known.add(answer.body)
        return fault

    def _check(self, connections: list[_Connection], now_s: float) -> None:
        """Gives up requests that got no answer in time, and tries connections again."""
        for connection in connections:
            if connection.link is None:
                if now_s >= connection.retry_s:
                    self._send_next(connection)
            elif now_s - connection.sent_s > self._job.timeout_s:
                self._fail(connection, TIMED_OUT, f"no answer within {self._job.timeout_s:g} s")

    def _fail(self, connection: _Connection, kind: str, detail: str) -> None:
        now_s = time.perf_counter()
        self._finished.append((connection.sent_s, now_s, Fault(kind, detail)))
        self._close(connection)
        connection.retry_s = now_s + _RETRY_S

    def _close(self, connection: _Connection) -> None:
        if connection.link is not None:
            self._selector.unregister(connection.link)
            connection.link.close()
            connection.link = None

    def _record(self, start_s: float, end_s: float, cpu_s: float) -> LoadRecord:
        latency = Histogram()
        faults: dict[str, tuple[int, str]] = {}
        right = 0
        for sent_s, done_s, fault in self._finished:
            if done_s < start_s or sent_s >= end_s:
                continue
            if fault is not None:
                count, example = faults.get(fault.kind, (0, fault.detail))
                faults[fault.kind] = (count + 1, example)
                continue
            # Answers count by their arrival, warm-up's last ones included: they make up for those that are still on
            # their way when the window closes. Latencies count by the send.
            right += done_s < end_s
            if sent_s >= start_s:
                latency.record(done_s - sent_s)
        return LoadRecord(
            sent=len(self._finished),
            right=right,
            failed=sum(count for count, _ in faults.values()),
            duration_s=end_s - start_s,
            cpu_share=cpu_s / (end_s - start_s),
            stall_s=self._stall_s,
            latency=latency,
            faults=faults,
        )


def main(job: Path, record: Path) -> None:
    """Does one job."""
    loop = ClosedLoop(LoadJob.from_json(json.loads(job.read_bytes())))
    write_atomically(record, json.dumps(loop.run().to_json()).encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
