"""Pipelined requests: a client that does not wait gets the answers in the order of its requests, as HTTP has it."""

from __future__ import annotations

import base64
import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from deploy.server import SCHEDULING
from export.evaluation import LabelledRequest

from .conftest import RunningServer, serving

MODEL = "digits-torchscript"
REQUESTS = 60
PINGS = 30_000
# So many samples take a while, and what follows takes next to none.
MANY = 256
TIMEOUT_S = 60


@pytest.fixture(scope="module", params=SCHEDULING)
def server(
    request: pytest.FixtureRequest, archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """Two workers, which may overtake each other."""
    with serving(
        [archives["torchscript"]], tmp_path_factory.mktemp("order"), "--workers", "2", "--scheduling", request.param
    ) as running:
        yield running


@pytest.fixture(scope="module")
def long(held_out: list[LabelledRequest]) -> bytes:
    """A body that takes a while."""
    images = [{"b64": base64.b64encode(request.body).decode()} for request in held_out]
    return json.dumps({"instances": (images * MANY)[:MANY]}).encode()


class Pipeline:
    """A connection on which everything is sent before anything is read."""

    def __init__(self, server: RunningServer) -> None:
        address = urlsplit(server.state.inference_url)
        self._socket = socket.create_connection((address.hostname, address.port), timeout=TIMEOUT_S)
        self._stream = self._socket.makefile("rb")
        self._common = f"Host: test\r\nAuthorization: Bearer {server.state.inference_token()}\r\n"
        self.ping = f"GET /ping HTTP/1.1\r\n{self._common}\r\n".encode()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._socket.close()

    def post(self, body: bytes, content_type: str, *, expect: bool = False) -> bytes:
        """The bytes of a prediction request."""
        head = (
            f"POST /predictions/{MODEL} HTTP/1.1\r\n{self._common}"
            f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        )
        return (head + ("Expect: 100-continue\r\n" if expect else "") + "\r\n").encode() + body

    def has_ended(self) -> bool:
        """Whether the server closes the connection and sends nothing before."""
        return self._stream.read() == b""

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def answer(self) -> tuple[int, dict[str, object]]:
        """Status and document of the next answer."""
        status = int(self._stream.readline().split()[1])
        length = 0
        while line := self._stream.readline().strip():
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        return status, json.loads(self._stream.read(length) or b"{}")


def test_what_is_answered_at_once_does_not_overtake_a_prediction(server: RunningServer, long: bytes) -> None:
    with Pipeline(server) as pipeline:
        pipeline.send(pipeline.post(long, "application/json") + pipeline.ping + pipeline.ping)
        first, second, third = (pipeline.answer() for _ in range(3))
        assert (first[0], len(first[1]["predictions"])) == (200, MANY)  # type: ignore[arg-type]
        assert second == third == (200, {"status": "Healthy"})


def test_predictions_come_in_the_order_of_their_requests(
    server: RunningServer, held_out: list[LabelledRequest]
) -> None:
    chosen = random.Random(3).choices(held_out, k=REQUESTS)
    with server.client() as client:
        expected = [
            client.post(
                f"/predictions/{MODEL}", content=request.body, headers={"Content-Type": request.content_type}
            ).json()["label"]
            for request in chosen
        ]
    assert len(set(expected)) > 5
    with Pipeline(server) as pipeline:
        pipeline.send(b"".join(pipeline.post(request.body, request.content_type) for request in chosen))
        answers = [pipeline.answer() for _ in chosen]
        assert [status for status, _ in answers] == [200] * REQUESTS
        assert [document["label"] for _, document in answers] == expected
        # And the connection goes on.
        pipeline.send(pipeline.ping)
        assert pipeline.answer() == (200, {"status": "Healthy"})


def test_requests_that_come_in_pieces_are_answered_in_order(
    server: RunningServer, held_out: list[LabelledRequest], long: bytes
) -> None:
    first, second = held_out[0], held_out[1]
    with Pipeline(server) as pipeline:
        data = (
            pipeline.post(long, "application/json")
            + pipeline.post(first.body, first.content_type)
            + pipeline.ping
            + pipeline.post(second.body, second.content_type)
        )
        cuts = sorted(random.Random(5).sample(range(1, len(data)), 40))
        for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
            pipeline.send(data[start:stop])
        answers = [pipeline.answer() for _ in range(4)]
        assert [status for status, _ in answers] == [200] * 4
        assert [min(document) for _, document in answers] == ["model", "label", "status", "label"]


def test_what_follows_an_expectation_waits_for_its_answer(server: RunningServer, long: bytes) -> None:
    with Pipeline(server) as pipeline:
        pipeline.send(pipeline.post(long, "application/json", expect=True) + pipeline.ping)
        assert pipeline.answer()[0] == 100
        status, document = pipeline.answer()
        assert (status, len(document["predictions"])) == (200, MANY)  # type: ignore[arg-type]
        assert pipeline.answer() == (200, {"status": "Healthy"})


def test_a_client_that_leaves_with_requests_unanswered_harms_nobody(server: RunningServer, long: bytes) -> None:
    for _ in range(20):
        with Pipeline(server) as pipeline:
            pipeline.send((pipeline.post(long, "application/json") + pipeline.ping) * 3)
    with Pipeline(server) as pipeline:
        pipeline.send(pipeline.ping)
        assert pipeline.answer() == (200, {"status": "Healthy"})


def test_a_client_that_reads_late_gets_every_answer(server: RunningServer) -> None:
    # More than the system and the server keep of answers that nobody reads.
    with Pipeline(server) as pipeline, ThreadPoolExecutor(1) as pool:
        sending = pool.submit(pipeline.send, pipeline.ping * PINGS)
        time.sleep(1)
        assert [pipeline.answer() for _ in range(PINGS)] == [(200, {"status": "Healthy"})] * PINGS
        sending.result()


def test_nothing_is_done_behind_an_answer_that_closes_the_connection(server: RunningServer, long: bytes) -> None:
    def predictions() -> list[str]:
        lines = httpx.get(f"{server.state.metrics_url}/metrics").text.splitlines()
        return [line for line in lines if line.startswith("ts_inference_requests_total{")]

    with Pipeline(server) as pipeline:
        pipeline.send(pipeline.ping)
        pipeline.answer()
        before = predictions()
        unknown = pipeline.post(long, "application/json").replace(MODEL.encode(), b"nothing", 1)
        pipeline.send(unknown + pipeline.post(long, "application/json") * 2)
        assert pipeline.answer()[0] == 404
        assert pipeline.has_ended()
    assert predictions() == before
