"""A TorchServe process: started in a folder of its own, waited for until every worker is ready, stopped cleanly."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import httpx
import psutil

from deploy import continuous, frontend_classes
from deploy.archive_copy import copy_archives, suit_server
from deploy.configuration import LOG_CONFIG, count_gpus, server_properties
from deploy.errors import StartError, StateError
from deploy.java import find_java
from deploy.placement import in_words
from deploy.ports import LOOPBACK, Ports, check_host
from deploy.state import KEY_FILE, STATE_VARIABLE, ServerState, claimed, make_private, state_folder
from export.archive import Archive
from handlers.preemption import interrupting_nobody

# How requests reach the model.
CONTINUOUS, BATCHES = SCHEDULING = ("continuous", "batches")

# How long a server that stops answers what is in flight: somewhat less than the 30 s after which Kubernetes kills.
DRAIN_S = 25.0
DRAIN_VARIABLE = "TORCHPORT_DRAIN_SECONDS"

# Ctrl-C, a service manager, a closed terminal.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

_POLL_S = 0.2
_STOP_TIMEOUT_S = 30.0
_KILL_TIMEOUT_S = 10.0
_REQUEST_TIMEOUT_S = 10.0
# Between TorchServe's end and the last line that it printed.
_LAST_WORDS_S = 2.0
_TAIL_LINES = 15
# The launcher's word on `vmargs`, which are ours: nothing that anybody need be warned of.
_OF_OUR_OWN = "Warning: TorchServe is using non-default JVM parameters: "
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
        scheduling: ``continuous`` where that is possible, or ``batches``, TorchServe's own way.
        echo: Where TorchServe's log lines go, besides its log file; None for nowhere.
        drain_s: How long it answers what is in flight when it is stopped; what is left then gets 503.

    Attributes:
        places: Where each model's workers run, in words, once they are ready; empty for those on a CPU.

    Raises:
        ArchiveError: If an archive was replaced after it was verified.
    """

    def __init__(
        self,
        archives: Sequence[Archive],
        ports: Ports,
        *,
        host: str = LOOPBACK,
        workers: int | None = None,
        scheduling: str = CONTINUOUS,
        echo: IO[str] | None = None,
        drain_s: float = DRAIN_S,
    ) -> None:
        self._archives = archives
        self._ports = ports
        self._host = host
        self._workers = workers
        # Why models that should be served continuously are not.
        self._obstacles = {
            archive.name: reason
            for archive in archives
            if scheduling == CONTINUOUS and (reason := continuous.obstacle(archive)) is not None
        }
        self._continuous = {
            archive.name for archive in archives if scheduling == CONTINUOUS and archive.name not in self._obstacles
        }
        self._echo = echo
        self._drain_s = drain_s
        self._drains = False
        self._process: subprocess.Popen[str] | None = None
        self._reader: threading.Thread | None = None
        self._tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._refusal: str | None = None
        self._temporary: Path | None = None
        self.places: dict[str, str] = {}
        # Whatever is taken is given back when the stack is closed, in reverse order.
        self._taken = contextlib.ExitStack()
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

    @property
    def temporary_folder(self) -> Path:
        """A folder that only this user can read and that goes when the server stops.

        Raises:
            StartError: If the server is not running.
        """
        if self._temporary is None:
            raise StartError("TorchServe was not started")
        return self._temporary

    def __enter__(self) -> TorchServe:
        """Start the process, without waiting for its workers.

        Raises:
            JavaError: If there is no Java.
            PortError: If the host is none of this machine.
            StateError: If another server has the state folder, or it cannot be used.
            ArchiveError: If an archive was replaced after it was verified.
            StartError: If a model needs a GPU, and they are named in a way that TorchServe cannot read, or their driver
                does not answer.
        """
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
        check_host(self._host)
        java = find_java()
        make_private(self.state.folder)
        self._taken.enter_context(claimed(self.state.folder))
        self.state.remove()  # what a server that was killed left
        self._taken.callback(self.state.remove)
        # Unix sockets of the workers lie in the temporary folder, and their paths may have 107 characters at most.
        temporary = self._temporary = Path(tempfile.mkdtemp(prefix="torchport-"))
        self._taken.callback(shutil.rmtree, temporary, ignore_errors=True)
        store = temporary / "model_store"
        models = copy_archives(self._archives, store)
        gpus = count_gpus(models)
        suit_server(models, continuous=self._continuous, workers=self._workers, gpus=gpus or 0)
        self._taken.callback(frontend_classes.remove, self.state.folder)
        self._drains = frontend_classes.install(self.state.folder, continuous=bool(self._continuous))
        config = self.state.folder / "config.properties"
        properties = server_properties(
            self._ports,
            host=self._host,
            model_store=store,
            models=models,
            scalable=self._workers is not None,
            gpus=gpus,
        )
        try:
            config.write_text(properties, encoding="utf-8")
        except OSError as error:  # which names no file when the disk is full
            raise StateError(
                f"{config} cannot be written ({error.strerror}); name another folder with {STATE_VARIABLE}"
            ) from error
        log = self._taken.enter_context(self.log_file.open("w", encoding="utf-8"))
        for name, reason in self._obstacles.items():
            self._copy_to_logs(f"{name} is served in batches: {reason}\n", log)
        # TorchServe reads TS_CONFIG_FILE before --ts-config, and other settings from variables like it.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TS_")}
        with interrupting_nobody():
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "ts.model_server", "--start", "--foreground", "--no-config-snapshots"),
                    *("--ts-config", str(config), "--log-config", str(LOG_CONFIG), "--model-store", str(store)),
                ],
                cwd=self.state.folder,
                env={
                    **inherited,
                    "JAVA_HOME": str(java.home),
                    # The launcher keeps its process id in the one, Java its sockets and unpacked archives in the other.
                    "TMPDIR": str(temporary),
                    "TEMP": str(temporary),
                    DRAIN_VARIABLE: str(self._drain_s),
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                # Ctrl-C goes to us alone; we stop TorchServe in order.
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read_log, args=(self._process.stdout, log), daemon=True)
        self._reader.start()

    def _read_log(self, stream: IO[str], log: IO[str]) -> None:
        """Copy the log, and remember what matters to somebody who waits."""
        with stream:
            for line in stream:
                if line.startswith(_OF_OUR_OWN):
                    continue
                self._tail.append(line.rstrip())
                if self._refusal is None and (_REFUSED in line or any(word in line for word in _FATAL)):
                    self._refusal = line.partition(_REFUSED)[2].strip() or line.strip()
                self._copy_to_logs(line, log)

    def _copy_to_logs(self, line: str, log: IO[str]) -> None:
        for copy in [log] if self._echo is None else [log, self._echo]:
            # A full disk, a closed terminal: reading goes on, or TorchServe would stand still at its next line.
            with contextlib.suppress(OSError, ValueError):
                print(line, end="", file=copy, flush=True)

    def wait_until_ready(self, timeout_s: float, *, interrupts: Sequence[int] = ()) -> None:
        """Wait until every worker of every model is READY.

        Args:
            timeout_s: For how long.
            interrupts: Signals that have arrived; see :func:`noted_signals`.

        Raises:
            StartError: If a worker refuses to become ready, TorchServe ends, or the time is over.
            KeyboardInterrupt: If a signal has arrived.
        """
        deadline = time.monotonic() + timeout_s
        scaled = self._workers is None
        obstacle = None
        while time.monotonic() < deadline:
            if interrupts:
                raise KeyboardInterrupt
            self._check_alive()
            try:
                workers = self._workers_by_model()
                obstacle = None
            except StateError as error:  # TorchServe may be writing its tokens just now
                workers, obstacle = {}, error
            if len(workers) == len(self._archives):
                if not scaled:
                    self._scale()
                    scaled = True
                elif all(self._all_ready(found) for found in workers.values()):
                    self.places = {name: in_words(found) for name, found in workers.items()}
                    self.state.write()
                    return
            time.sleep(_POLL_S)
        reason = self._last_lines() if obstacle is None else str(obstacle)
        raise StartError(f"TorchServe was not ready within {timeout_s:g} s: {reason} (log: {self.log_file})")

    def _check_alive(self) -> None:
        ended = self._process is None or self._process.poll() is not None
        if ended and self._reader is not None:
            self._reader.join(timeout=_LAST_WORDS_S)
        if self._refusal is not None:
            raise StartError(f"TorchServe cannot serve: {self._refusal} (log: {self.log_file})")
        if ended:
            raise StartError(f"TorchServe ended before it was ready: {self._last_lines()} (log: {self.log_file})")

    def _all_ready(self, workers: list[dict[str, Any]]) -> bool:
        right_number = bool(workers) if self._workers is None else len(workers) == self._workers
        return right_number and all(worker["status"] == "READY" for worker in workers)

    def _workers_by_model(self) -> dict[str, list[dict[str, Any]]]:
        """The workers of each model that is registered by now; empty while the server is still starting.

        Raises:
            StateError: If there is no usable token.
        """
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
            trust_env=False,  # a proxy in the environment would stand between us and this machine
        )

    def wait(self, *, interrupts: Sequence[int] = ()) -> int | None:
        """Wait until TorchServe ends by itself, and return its exit code; None once a signal has arrived."""
        if self._process is None:
            raise StartError("TorchServe was not started")
        while not interrupts:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(timeout=_POLL_S)
        return None

    def stop(self) -> None:
        """Stop TorchServe: the frontend, which answers what is in flight and stops its workers; then whatever is left.

        Another Ctrl-C, or SIGTERM, while it waits for them ends them at once.
        """
        with noted_signals() as hurry, self._taken:
            if self._process is None:
                return
            patience_s = _STOP_TIMEOUT_S + (self._drain_s if self._drains else 0)
            self._end(psutil.Process.terminate, timeout_s=patience_s, hurry=hurry)
            self._end(psutil.Process.kill, timeout_s=_KILL_TIMEOUT_S)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=_KILL_TIMEOUT_S)
            if self._reader is not None:
                self._reader.join(timeout=_KILL_TIMEOUT_S)

    def _end(self, send: Callable[[psutil.Process], None], *, timeout_s: float, hurry: Sequence[int] = ()) -> None:
        """Signal whatever runs of this server, and wait until nothing does, or for as long as there is no hurry."""
        family = self._family()
        # Of a server in order the frontend alone is asked to stop: it does the rest.
        frontends = [member for member in family if _name(member) == "java"]
        addressed = frontends if frontends and send is psutil.Process.terminate else family
        for member in addressed:
            with contextlib.suppress(psutil.NoSuchProcess):
                send(member)
        deadline = time.monotonic() + timeout_s
        while family and time.monotonic() < deadline and not hurry:
            _, family = psutil.wait_procs(family, timeout=_POLL_S)

    def _family(self) -> list[psutil.Process]:
        """Every living process of this server, also when the launcher, or a parent between, has died.

        They share the session that the launcher opened and, because the system gives process ids out again, the
        temporary folder that no other process has in its environment.
        """
        if self._process is None:
            return []
        return [
            process for process in psutil.process_iter() if _belongs(process, self._process.pid, self.temporary_folder)
        ]

    def _last_lines(self) -> str:
        return " | ".join(self._tail) or "it printed nothing"


@contextlib.contextmanager
def noted_signals() -> Iterator[list[int]]:
    """Keep signals from interrupting the block; they are put into the list instead. One that is ignored stays so.

    An exception out of a signal handler may arrive inside any library, with its locks held. A list, and not a
    threading.Event: a signal that arrives while another one is setting an event waits for ever for its lock.
    """
    noted: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # which alone gets signals
        yield noted
        return
    before = {
        number: signal.signal(number, lambda number, _: noted.append(number))
        for number in STOP_SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN  # which nohup sets
    }
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set from Python


def _belongs(process: psutil.Process, session: int, temporary: Path) -> bool:
    try:
        return (
            os.getsid(process.pid) == session
            and process.status() != psutil.STATUS_ZOMBIE
            and process.environ().get("TMPDIR") == str(temporary)
        )
    except (psutil.Error, OSError):  # it ended meanwhile, or is somebody else's
        return False


def _name(process: psutil.Process) -> str:
    try:
        return process.name()
    except psutil.Error:
        return ""
