"""A trained model, its archives, and a real TorchServe, each made once for all tests of this folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.ports import Ports
from deploy.state import STATE_VARIABLE, ServerState, find_server
from export.checkpoint import load_checkpoint
from export.evaluation import LabelledRequest, load_evaluation

FORMATS = ("torchscript", "onnx")
READY_TIMEOUT_S = 120
STOP_TIMEOUT_S = 60


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.integration)


def torchport(*arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Run a command that must succeed, and return its JSON document."""
    done = subprocess.run(
        [sys.executable, "-m", "torchport", *arguments, "--json"],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        check=False,
    )
    assert done.returncode == 0, f"torchport {' '.join(arguments)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    document: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return document


@dataclass(frozen=True)
class RunningServer:
    """A `torchport serve` of a test.

    Attributes:
        state: Its addresses and tokens.
        printed: Lines of its stdout until it was ready.
        log: What TorchServe has logged so far.
    """

    state: ServerState
    printed: list[str]
    log: Path

    def client(self) -> httpx.Client:
        return httpx.Client(
            base_url=self.state.inference_url,
            headers={"Authorization": f"Bearer {self.state.inference_token()}"},
            timeout=30,
        )

    def workers(self, model: str) -> list[dict[str, Any]]:
        response = httpx.get(
            f"{self.state.management_url}/models/{model}",
            headers={"Authorization": f"Bearer {self.state.management_token()}"},
            timeout=30,
        )
        response.raise_for_status()
        workers: list[dict[str, Any]] = response.json()[0]["workers"]
        return workers


@contextmanager
def serving(archives: Sequence[Path], folder: Path, *options: str) -> Iterator[RunningServer]:
    """Run `torchport serve` for as long as the block lasts; SIGTERM must then end it cleanly."""
    port = Ports.first_of_free_range()
    out, err = folder / "serve.out", folder / "serve.err"
    with out.open("w") as stdout, err.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "torchport", "serve", *map(str, archives), "--port", str(port), *options],
            stdout=stdout,
            stderr=stderr,
        )
        try:
            deadline = time.monotonic() + READY_TIMEOUT_S
            while "stop with Ctrl-C" not in out.read_text():
                assert process.poll() is None, f"torchport serve ended: {err.read_text()[-3000:]}"
                assert time.monotonic() < deadline, f"not ready in time: {err.read_text()[-3000:]}"
                time.sleep(0.1)
            yield RunningServer(state=find_server(port), printed=out.read_text().splitlines(), log=err)
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=STOP_TIMEOUT_S)
        assert code == 0, err.read_text()[-3000:]


@pytest.fixture(scope="session", autouse=True)
def _own_state_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the servers of tests apart from those that the developer runs."""
    patch = pytest.MonkeyPatch()
    patch.setenv(STATE_VARIABLE, str(tmp_path_factory.mktemp("state")))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full training of the digits recipe."""
    folder = tmp_path_factory.mktemp("training") / "digits"
    torchport("train", "digits", "--out", str(folder))
    return folder


@pytest.fixture(scope="session")
def held_out(run_folder: Path) -> list[LabelledRequest]:
    """The digits that the training has not seen, as requests."""
    checkpoint = load_checkpoint(run_folder)
    return load_evaluation(checkpoint.signature, data=None, source=checkpoint.evaluation)


@pytest.fixture(scope="session")
def archives(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An archive of each format, called digits-FORMAT."""
    store = tmp_path_factory.mktemp("store")
    return {
        format: Path(
            torchport("export", str(run_folder), "--format", format, "--name", f"digits-{format}", "--out", str(store))[
                "archive"
            ]
        )
        for format in FORMATS
    }


@pytest.fixture(scope="session")
def server(archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """One TorchServe with both archives."""
    with serving(list(archives.values()), tmp_path_factory.mktemp("server")) as running:
        yield running
