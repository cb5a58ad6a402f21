"""A TorchServe process: started in a folder of its own, waited for until every worker is ready, stopped cleanly."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import httpx
import psutil

from deploy.configuration import LOG_CONFIG, server_properties
from deploy.errors import StartError
from deploy.java import find_java
from deploy.ports import LOOPBACK, Ports
from deploy.state import KEY_FILE, ServerState, state_folder
from export.archive import Archive

_POLL_S = 0.2
_STOP_TIMEOUT_S = 30.0
_REQUEST_TIMEOUT_S = 10.0
_TAIL_LINES = 15
# What a worker's handler writes when it refuses to become ready, and what TorchServe writes of its own failures.
_REFUSED = "is not served: "
_FATAL = ("Failed to load model", "Invalid configuration", "Address already in use", "Failed to bind")


class TorchServe:
    """TorchServe with some archives. A context manager: leaving it stops the server.

    Args:
        archives: Verified archives.
        ports: Where to listen; they must be free.
        host: Address for predictions.
        workers: Workers a model; None takes each archive's own number.
        echo: Where TorchServe's log lines go, besides its log file; None for nowhere.
    """

    def __init__(
        self,
        archives: Sequence[Archive],
        ports: Ports,
        *,
        host: str = LOOPBACK,
        workers: int | None = None,
        echo: IO[str] | None = None,
    ) -> None:
        self._archives = archives
        self._ports = ports
        self._host = host
        self._workers = workers
        self._echo = echo
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._refusal: str | None = None
        # Unix sockets of the workers lie in the temporary folder, and their paths may have 107 characters at most.
        self._temporary = Path(tempfile.mkdtemp(prefix="torchport-"))
        reachable = LOOPBACK if host == "0.0.0.0" else host  # a comparison, not a binding
        self.state = ServerState(
            folder=state_folder(ports.inference),
            pid=os.getpid(),
            inference_url=f"http://{reachable}:{ports.inference}",
            management_url=f"http://{LOOPBACK}:{ports.management}",
            metrics_url=f"http://{LOOPBACK}:{ports.metrics}",
            models={archive.name: archive.version for archive in archives},
        )

    @property
    def log_file(self) -> Path:
        """Everything that TorchServe prints."""
        return self.state.folder / "torchserve.log"

    def __enter__(self) -> TorchServe:
        """Start the process, without waiting for its workers."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop the process."""
        self.stop()

    def _start(self) -> None:
        java = find_java()
        self.state.remove()
        store = self._temporary / "model_store"
        store.mkdir()
        models = {archive.name: store / f"{archive.name}.mar" for archive in self._archives}
        for archive in self._archives:
            # A copy, not a link: what was verified is what is loaded, whatever happens to the original meanwhile.
            shutil.copyfile(archive.path, models[archive.name])
        config = self.state.folder / "config.properties"
        config.write_text(
            server_properties(
                self._ports,
                host=self._host,
                model_store=store,
                models=models,
                scalable=self._workers is not None,
            ),
            encoding="utf-8",
        )
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", "ts.model_server", "--start", "--foreground", "--no-config-snapshots"),
                *("--ts-config", str(config), "--log-config", str(LOG_CONFIG), "--model-store", str(store)),
            ],
            cwd=self.state.folder,
            env={
                **os.environ,
                "JAVA_HOME": str(java.home),
                # The launcher keeps its process id in the one, Java its sockets and extracted archives in the other.
                "TMPDIR": str(self._temporary),
                "TEMP": str(self._temporary),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            # Ctrl-C goes to us alone; we stop TorchServe in order.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, args=(self._process.stdout,), daemon=True)
        self._reader.start()

    def _read_log(self, stream: IO[str]) -> None:
        """Copy the log, and remember what matters to somebody who waits."""
        with self.log_file.open("w", encoding="utf-8") as log:
            for line in stream:
                log.write(line)
                log.flush()
                self._tail.append(line.rstrip())
                if self._refusal is None and (_REFUSED in line or any(word in line for word in _FATAL)):
                    self._refusal = line.partition(_REFUSED)[2].strip() or line.strip()
                if self._echo is not None:
                    print(line, end="", file=self._echo, flush=True)

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait until every worker of every model is READY.

        Raises:
            StartError: If a worker refuses to become ready, TorchServe ends, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        scaled = self._workers is None
        while time.monotonic() < deadline:
            if self._refusal is not None:
                raise StartError(f"TorchServe cannot serve: {self._refusal} (log: {self.log_file})")
            if self._process is None or self._process.poll() is not None:
                raise StartError(f"TorchServe ended before it was ready: {self._last_lines()} (log: {self.log_file})")
            workers = self._workers_by_model()
            if not scaled and len(workers) == len(self._archives):
                self._scale()
                scaled = True
            elif scaled and len(workers) == len(self._archives) and all(map(_all_ready, workers.values())):
                self.state.write()
                return
            time.sleep(_POLL_S)
        raise StartError(
            f"TorchServe was not ready within {timeout_s:.0f} s: {self._last_lines()} (log: {self.log_file})"
        )

    def _workers_by_model(self) -> dict[str, list[dict[str, Any]]]:
        """The workers of each model that is registered by now; empty while the server is still starting."""
        if not (self.state.folder / KEY_FILE).is_file():
            return {}
        found: dict[str, list[dict[str, Any]]] = {}
        for archive in self._archives:
            with contextlib.suppress(httpx.TransportError):  # not listening yet
                response = self._manage("GET", f"/models/{archive.name}")
                if response.status_code == httpx.codes.OK:
                    found[archive.name] = response.json()[0]["workers"]
        return found

    def _scale(self) -> None:
        for archive in self._archives:
            response = self._manage(
                "PUT", f"/models/{archive.name}", min_worker=str(self._workers), max_worker=str(self._workers)
            )
            if response.is_error:
                raise StartError(
                    f"TorchServe refuses {self._workers} workers for {archive.name}: {response.text.strip()}"
                )

    def _manage(self, method: str, path: str, **parameters: str) -> httpx.Response:
        return httpx.request(
            method,
            f"{self.state.management_url}{path}",
            params=parameters,
            headers={"Authorization": f"Bearer {self.state.management_token()}"},
            timeout=_REQUEST_TIMEOUT_S,
        )

    def wait(self) -> int:
        """Wait until TorchServe ends by itself, and return its exit code."""
        if self._process is None:
            raise StartError("TorchServe was not started")
        return self._process.wait()

    def stop(self) -> None:
        """Stop TorchServe: the frontend first, which stops its workers; then whatever is left, by process id."""
        process = self._process
        if process is not None and process.poll() is None:
            family = psutil.Process(process.pid).children(recursive=True)
            frontends = [child for child in family if child.name() == "java"]
            for frontend in frontends or [psutil.Process(process.pid)]:
                frontend.terminate()
            _, alive = psutil.wait_procs([*family, psutil.Process(process.pid)], timeout=_STOP_TIMEOUT_S)
            for survivor in alive:
                with contextlib.suppress(psutil.NoSuchProcess):
                    survivor.kill()
            process.wait()
        if self._reader is not None:
            self._reader.join(timeout=_STOP_TIMEOUT_S)
        self.state.remove()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def _last_lines(self) -> str:
        return " | ".join(self._tail) or "it printed nothing"


def _all_ready(workers: list[dict[str, Any]]) -> bool:
    return bool(workers) and all(worker["status"] == "READY" for worker in workers)
