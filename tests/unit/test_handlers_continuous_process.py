"""A continuous worker whose defects end its process, in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from handlers import continuous

from .continuous_worker import DEADLINE_S, TRIPLE, of_length
from .stock_torchserve import message

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
        assert "the worker ends: a batch takes longer than responseTimeout to compute, 0.2 s" in done.stderr

    def test_a_request_whose_decoding_hangs_ends_it(self):
        done = run_process("options['response_timeout_s'] = 0.2\noptions['parts'] = lambda frame: time.sleep(3600)")
        assert done.returncode == 1
        assert "the worker ends: a request takes longer than responseTimeout to decode, 0.2 s" in done.stderr

    @pytest.mark.parametrize(
        ("wrong", "thread"),
        [
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
