"""One system's server: started, waited for until it answers rightly, and ended with everything that it started."""

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
import psutil

from deploy.ports import LOOPBACK
from deploy.state import SERVER_FILE, STATE_VARIABLE, ServerState
from loadtest.compare_answers import Expected, judge_answer
from loadtest.compare_errors import SystemStartError
from loadtest.compare_load import own_environment
from loadtest.compare_systems import System, serve_command
from loadtest.payloads import Payload
from loadtest.plan import prediction_path

READY_TIMEOUT_S = 180.0
# TorchServe lets its workers finish; `torchport serve` waits 30 s for it.
_STOP_TIMEOUT_S = 45.0
_KILL_TIMEOUT_S = 10.0
_POLL_S = 0.2
_PROBE_TIMEOUT_S = 10.0
_TAIL_LINES = 5
# Every process that a server starts inherits it, whatever session or group it makes itself a member of.
MARK = "TORCHPORT_COMPARE_SERVER"
# Replaces what an archive says; see `handlers/settings.py`.
_THREADS = "TORCHPORT_THREADS"
# Nothing that a server does at a start may reach beyond this machine.
_QUIET = {"DO_NOT_TRACK": "1", "BENTOML_DO_NOT_TRACK": "True", "RAY_USAGE_STATS_ENABLED": "0"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where a running server answers.

    Attributes:
        port: On the loopback.
        path: Of predictions.
        headers: What a request needs beside the usual headers.
        mark: What every process of the server has in its environment.
        metrics_url: Of torchport's metrics; empty for others.
    """

    port: int
    path: str
    headers: dict[str, str]
    mark: str = ""
    metrics_url: str = ""

    def processes(self) -> list[psutil.Process]:
        """All of the server's, now."""
        return _family(self.mark)


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """What a server serves.

    Attributes:
        archive: The `.mar` file, for torchport.
        folder: The extracted archive, for the peers.
        name: The model's name in the archive.
        threads: Threads of one batch.
        workers: Processes that compute.
        body: One request.
        files: Whether requests are files as they are, instead of JSON.
        expected: What a right answer to it says.
    """

    archive: Path
    folder: Path
    name: str
    threads: int
    workers: int
    body: Payload
    files: bool
    expected: Expected


@contextlib.contextmanager
def serving(system: System, model: Model, python: Path | None) -> Iterator[Endpoint]:
    """Runs a system's server for as long as the block lasts.

    Args:
        system: Which one.
        model: What it serves.
        python: Interpreter of the peers' environment; None for a system that runs in torchport's own.

    Raises:
        SystemStartError: It ends, or gives no right answer in time.
    """
    # Short: unix sockets lie in it, and their paths may have 107 characters at most.
    work = Path(tempfile.mkdtemp(prefix="tp-"))
    mark = secrets.token_hex(16)
    log = work / "server.log"
    try:
        port = _free_port()
        if system.module:
            interpreter = python or Path(sys.executable)
            command = system.peer_command(
                interpreter,
                folder=model.folder,
                port=port,
                threads=model.threads,
                workers=model.workers,
                files=model.files,
            )
        else:
            command = serve_command(model.archive.absolute(), workers=model.workers)
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=work,
                env=_environment(system, work, mark, model.threads),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C goes to us alone
            )
        try:
            yield replace(_wait_until_ready(system, model, process, port, work), mark=mark)
        finally:
            end_family(process, mark)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _environment(system: System, work: Path, mark: str, threads: int) -> dict[str, str]:
    # A peer's environment finds our packages by itself, after its own: PYTHONPATH would put them before.
    inherited = dict(os.environ) if system.packages else own_environment()
    kept = {name: value for name, value in inherited.items() if not name.startswith(("TS_", "RAY_", "BENTOML_"))}
    return {
        **kept,
        **_QUIET,
        MARK: mark,
        STATE_VARIABLE: str(work / "state"),
        "BENTOML_HOME": str(work / "bentoml"),
        "TMPDIR": str(work),
        "TEMP": str(work),
        # torch takes one thread a core in every new thread unless told otherwise. torchport tells its workers itself,
        # and has its own word for how many.
        ("OMP_NUM_THREADS" if system.module else _THREADS): str(threads),
    }


def _wait_until_ready(
    system: System, model: Model, process: subprocess.Popen[bytes], port: int, work: Path
) -> Endpoint:
    """Asks until a right answer comes: some servers listen, and answer with errors, long before they can serve."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    reason = "it never listened"
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise SystemStartError(f"{system.title} ended while starting: {_tail(work)}")
        endpoint = _endpoint(system, model, port, work)
        if endpoint is not None:
            body = system.envelope(model.body, files=model.files)
            try:
                answer = httpx.post(
                    f"http://{LOOPBACK}:{endpoint.port}{endpoint.path}",
                    content=body.body,
                    headers={"Content-Type": body.content_type, **endpoint.headers},
                    timeout=_PROBE_TIMEOUT_S,
                    trust_env=False,
                )
            except httpx.TransportError as error:
                reason = f"{type(error).__name__}: {error}"
            else:
                fault = judge_answer(answer.status_code, answer.content, model.expected)
                if fault is None:
                    return endpoint
                reason = f"{fault.kind}: {fault.detail}"
        time.sleep(_POLL_S)
    raise SystemStartError(f"{system.title} gave no right answer within {READY_TIMEOUT_S:g} s: {reason}; {_tail(work)}")


def _endpoint(system: System, model: Model, port: int, work: Path) -> Endpoint | None:
    """Where to ask; None while torchport has not said it."""
    if system.module:
        return Endpoint(port=port, path=system.path, headers={})
    states = list((work / "state").glob(f"serve-*/{SERVER_FILE}"))
    if not states:
        return None
    try:
        document = json.loads(states[0].read_bytes())
    except ValueError:  # it is just being written
        return None
    state = ServerState(**{**document, "folder": Path(document["folder"])})
    return Endpoint(
        port=int(state.inference_url.rpartition(":")[2]),
        path=prediction_path(model.name),
        headers={"Authorization": f"Bearer {state.inference_token()}"},
        metrics_url=state.metrics_url,
    )


def end_family(process: subprocess.Popen[bytes], mark: str) -> None:
    """Ends a server in order, then whatever it has left behind, each by its process id.

    Args:
        process: What was started.
        mark: What every process of this server has in its environment.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + _STOP_TIMEOUT_S
    while (family := _family(mark)) and time.monotonic() < deadline:
        process.poll()  # or it would stay a zombie
        # Once the one that we started has ended, nobody tells the others to.
        if process.returncode is not None:
            for member in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.terminate()
            psutil.wait_procs(family, timeout=_KILL_TIMEOUT_S)
            break
        time.sleep(_POLL_S)
    family = _family(mark)
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    psutil.wait_procs(family, timeout=_KILL_TIMEOUT_S)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=_KILL_TIMEOUT_S)


def _family(mark: str) -> list[psutil.Process]:
    return [process for process in psutil.process_iter() if _has_mark(process, mark)]


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OSError):  # it ended meanwhile, or is somebody else's
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _tail(work: Path) -> str:
    """The last lines of a server's log, which goes with its folder."""
    text = (work / "server.log").read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " | ".join(lines[-_TAIL_LINES:]) or "it printed nothing"
