"""A TorchServe of their own for the serving_*.py scripts, and golden samples that know their right answers."""

import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
from serving_client import http_message

from deploy.ports import Ports
from deploy.server import TorchServe
from deploy.state import STATE_VARIABLE
from export.archive import Archive, open_archive
from handlers.model import ServedModel
from handlers.request import Part
from loadtest.payloads import Payload, read_golden_samples

READY_TIMEOUT_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running TorchServe."""

    torchserve: TorchServe
    archives: list[Archive]

    @property
    def address(self) -> tuple[str, int]:
        parts = urlsplit(self.torchserve.state.inference_url)
        return str(parts.hostname), int(parts.port or 80)

    def token(self) -> str:
        return self.torchserve.state.inference_token()

    def worker_pids(self) -> dict[str, list[int]]:
        """Process ids of each model's workers, as the management API says; a restarted worker has another one."""
        pids = {}
        for archive in self.archives:
            response = httpx.get(
                f"{self.torchserve.state.management_url}/models/{archive.name}",
                headers={"Authorization": f"Bearer {self.torchserve.state.management_token()}"},
                timeout=30,
                trust_env=False,
            )
            response.raise_for_status()
            workers = response.json()[0]["workers"]
            pids[archive.name] = sorted(int(worker["pid"]) for worker in workers if worker["status"] == "READY")
        return pids

    def java_pids(self) -> list[int]:
        """The frontend: of the processes with this server's temporary folder in their environment, the Java."""
        mine = str(self.torchserve.temporary_folder)
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name() == "java" and process.environ().get("TMPDIR") == mine:
                    found.append(process.pid)
        return found


@contextlib.contextmanager
def serving(paths: Sequence[Path], *, workers: int | None = None) -> Iterator[Server]:
    """TorchServe with some archives on free ports, in a state folder of its own; leaving the block ends it."""
    archives = [open_archive(path) for path in paths]
    with _ending_in_order(), tempfile.TemporaryDirectory(prefix="torchport-serving-") as state:
        before = os.environ.get(STATE_VARIABLE)
        os.environ[STATE_VARIABLE] = state
        try:
            with TorchServe(archives, Ports.free(), workers=workers) as torchserve:
                torchserve.wait_until_ready(READY_TIMEOUT_S)
                yield Server(torchserve=torchserve, archives=archives)
        finally:
            if before is None:
                del os.environ[STATE_VARIABLE]
            else:
                os.environ[STATE_VARIABLE] = before


@contextlib.contextmanager
def _ending_in_order() -> Iterator[None]:
    """Let SIGTERM, by which `timeout` and CI end scripts, run what ends the server; Python would just stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@dataclass(frozen=True, kw_only=True)
class Known:
    """A golden sample, what the model answers to it in this process, and the names of the model's inputs."""

    model: str
    inputs: tuple[str, ...]
    payload: Payload
    answer: dict[str, object]

    def is_right(self, document: object) -> bool:
        """Whether an answer over HTTP is the same: its label, or without labels its outputs up to rounding."""
        if not isinstance(document, dict):
            return False
        if "label" in self.answer:
            return document.get("label") == self.answer["label"]
        mine, theirs = self.answer["outputs"], document.get("outputs")
        if not isinstance(mine, dict) or not isinstance(theirs, dict) or mine.keys() != theirs.keys():
            return False
        with contextlib.suppress(ValueError, TypeError):  # of another shape
            # Padding and the size of a batch move the last digits.
            return all(np.allclose(mine[name], theirs[name], rtol=1e-3, atol=1e-4) for name in mine)
        return False


def golden_answers(archive: Archive) -> list[Known]:
    """Every golden sample of an archive, answered in this process."""
    with tempfile.TemporaryDirectory(prefix="torchport-serving-") as folder:
        archive.extract(Path(folder))
        model = ServedModel.load(Path(folder), threads=1)
        known = []
        for payload in read_golden_samples(archive.path):
            (answer,) = model.answer([[Part(value=payload.body, content_type=payload.content_type)]])
            if answer.error is not None:
                raise SystemExit(f"{archive.path} refuses a golden sample in process: {answer.error.message}")
            names = tuple(spec.name for spec in model.signature.inputs)
            known.append(Known(model=archive.name, inputs=names, payload=payload, answer=answer.body))
        return known


def golden_message(known: Known, token: str) -> bytes:
    return http_message(
        "POST",
        f"/predictions/{known.model}",
        token=token,
        headers=[("Content-Type", known.payload.content_type)],
        body=known.payload.body,
    )
