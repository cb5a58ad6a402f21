"""Uploads: what the frontend's memory or patience has no room for is refused, and everything else gets its answer."""

from __future__ import annotations

import base64
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from deploy.server import SCHEDULING
from export.evaluation import LabelledRequest
from handlers.limits import MAX_REQUEST_BYTES

from .conftest import RunningServer, serving

MODEL = "digits-onnx"
PATH = f"/predictions/{MODEL}"
# A quarter of the memory, 54 MiB, is for bodies.
JAVA_OPTIONS = "-Xmx216m"
STALL_S = 5
FIT = 3
# A body but for its end.
ALMOST_ALL = MAX_REQUEST_BYTES - 1024
CLIENTS, ROUNDS = 24, 3
# Several times Java's memory.
ROUNDS_OF_LEAVING = 20
TIMEOUT_S = 150


@pytest.fixture(scope="module", params=SCHEDULING)
def small(
    request: pytest.FixtureRequest, archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    """A server whose Java has little memory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JDK_JAVA_OPTIONS", JAVA_OPTIONS)
        with serving(
            [archives["onnx"]], tmp_path_factory.mktemp("small"), "--workers", "1", "--scheduling", request.param
        ) as running:
            yield running


@pytest.fixture(scope="module")
def impatient(archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that does not wait long for the rest of a body."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JDK_JAVA_OPTIONS", f"-Dtorchport.uploadStallSeconds={STALL_S}")
        with serving([archives["onnx"]], tmp_path_factory.mktemp("impatient"), "--workers", "1") as running:
            yield running


@pytest.fixture(scope="module")
def good(held_out: list[LabelledRequest]) -> bytes:
    return json.dumps({"instances": [{"b64": base64.b64encode(held_out[0].body).decode()}]}).encode()


class Upload:
    """A request that is sent in parts."""

    def __init__(self, server: RunningServer, body: bytes, *, chunked: bool = False) -> None:
        address = urlsplit(server.state.inference_url)
        self._connection = HTTPConnection(str(address.hostname), address.port, timeout=TIMEOUT_S)
        self._chunked = chunked
        self._rest = body
        self._connection.putrequest("POST", PATH)
        self._connection.putheader("Authorization", f"Bearer {server.state.inference_token()}")
        self._connection.putheader("Content-Type", "application/json")
        if chunked:
            self._connection.putheader("Transfer-Encoding", "chunked")
        else:
            self._connection.putheader("Content-Length", str(len(body)))
        self._connection.endheaders()

    def send(self, count: int | None = None) -> None:
        """The next bytes, or all that are left."""
        part, self._rest = self._rest[:count], self._rest[len(self._rest) if count is None else count :]
        if self._chunked:
            part = b"%x\r\n%b\r\n" % (len(part), part) + (b"" if self._rest else b"0\r\n\r\n")
        self._connection.send(part)

    def answer(self) -> tuple[int, dict[str, object]]:
        """Status and document."""
        response: HTTPResponse = self._connection.getresponse()
        self.headers = response.headers
        return response.status, json.loads(response.read())

    def close(self) -> None:
        self._connection.close()


def padded(body: bytes) -> bytes:
    """As long as a request may be."""
    return body + b" " * (MAX_REQUEST_BYTES - len(body))


def ask(server: RunningServer, body: bytes) -> tuple[int, dict[str, object]]:
    with closing(Upload(server, body)) as upload:
        upload.send()
        return upload.answer()


def soon_answered(server: RunningServer, body: bytes) -> bool:
    """Whether there is room for a body, once the server has noticed that other clients have left."""
    return any(ask(server, body)[0] == 200 for _ in range(30))


def refusals(server: RunningServer, status: str) -> float:
    """How many answers of a class of status TorchServe's metrics count."""
    metrics = httpx.get(f"{server.state.metrics_url}/metrics").text
    return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(f"Requests{status}{{"))


def pids(server: RunningServer) -> list[str]:
    return [worker["pid"] for worker in server.workers(MODEL)]


@pytest.mark.parametrize("chunked", [False, True])
def test_what_has_no_room_gets_503_and_the_others_their_answers(
    small: RunningServer, good: bytes, chunked: bool
) -> None:
    with ExitStack() as stack:
        uploads = []
        for _ in range(FIT + 1):
            upload = stack.enter_context(closing(Upload(small, padded(good), chunked=chunked)))
            upload.send(ALMOST_ALL)
            uploads.append(upload)
            # Small ones always have room.
            assert ask(small, good)[0] == 200
        before = refusals(small, "5XX")
        refused = []
        for upload in uploads[::-1]:
            upload.send()
            status, document = upload.answer()
            if status != 200:
                assert (status, document["error"]["code"]) == (503, "overloaded")  # type: ignore[index]
                assert (upload.headers["Retry-After"], upload.headers["Connection"]) == ("1", "close")
                refused.append(upload)
        assert len(refused) == 1
        assert refusals(small, "5XX") == before + 1
        assert ask(small, padded(good))[0] == 200


def test_clients_that_leave_give_their_room_back(small: RunningServer, good: bytes) -> None:
    for _ in range(2):
        with ExitStack() as stack:
            for _ in range(FIT):
                stack.enter_context(closing(Upload(small, padded(good)))).send(ALMOST_ALL)
            assert ask(small, good)[0] == 200
    assert soon_answered(small, padded(good))


def test_what_clients_that_left_had_sent_takes_no_memory(small: RunningServer, good: bytes) -> None:
    (worker,) = small.workers(MODEL)
    os.kill(int(worker["pid"]), signal.SIGSTOP)
    try:
        for _ in range(ROUNDS_OF_LEAVING):
            with ExitStack() as stack:
                for _ in range(FIT):
                    stack.enter_context(closing(Upload(small, padded(good)))).send()
    finally:
        os.kill(int(worker["pid"]), signal.SIGCONT)
    assert soon_answered(small, padded(good))
    assert pids(small) == [worker["pid"]]
    assert "OutOfMemoryError" not in (small.state.folder / "torchserve.log").read_text()


def test_a_body_that_stops_in_the_middle_gets_408(impatient: RunningServer, good: bytes) -> None:
    with ExitStack() as stack:
        uploads = [
            stack.enter_context(closing(Upload(impatient, padded(good), chunked=chunked))) for chunked in (False, True)
        ]
        for upload in uploads:
            upload.send(1)
        before = refusals(impatient, "4XX")
        for upload in uploads:
            status, document = upload.answer()
            assert (status, document["error"]["code"]) == (408, "upload_stalled")  # type: ignore[index]
            assert upload.headers["Connection"] == "close"
        assert refusals(impatient, "4XX") == before + 2


def test_a_body_that_comes_slowly_gets_its_answer(impatient: RunningServer, good: bytes) -> None:
    with closing(Upload(impatient, good)) as upload:
        for _ in range(STALL_S + 2):
            upload.send(1)
            time.sleep(1)
        upload.send()
        assert upload.answer()[0] == 200


def test_a_flood_of_large_bodies_ends_nothing(small: RunningServer, good: bytes) -> None:
    workers = pids(small)
    body = padded(good)
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(lambda _: ask(small, body), range(CLIENTS * ROUNDS)))

    assert {status for status, _ in answers} <= {200, 503}
    assert {document["error"]["code"] for status, document in answers if status == 503} == {"overloaded"}  # type: ignore[index]
    assert any(status == 200 for status, _ in answers)
    assert pids(small) == workers
    assert soon_answered(small, body)
