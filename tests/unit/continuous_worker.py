"""A continuous worker for tests: in a thread, with the frontend's end of its connection."""

import json
import socket
import threading
import time

from handlers.continuous import ContinuousWorker
from handlers.fields import read_parts
from handlers.service import Service
from handlers.signature import Signature

from .stock_torchserve import Replies, inference_request, message

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

    def __init__(self, model, **options):
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
            **options,
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


def ask(id, document, **headers):
    fields = [("body", JSON, json.dumps(document).encode())]
    return inference_request(id, fields, [("Content-Type", JSON), *headers.items()])


def of_length(id, length, **headers):
    return ask(id, {"inputs": [float(length)] * length}, **headers)


def tripled(length):
    return {"outputs": {"y": [3.0 * length] * length}, "model": "m", "version": "1"}
