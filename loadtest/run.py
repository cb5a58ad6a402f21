"""Runs Locust as a subprocess and collects what its processes recorded."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from loadtest.errors import RunError
from loadtest.job import JOB_VARIABLE, Job
from loadtest.payloads import Payload
from loadtest.plan import Plan
from loadtest.tally import Tally, merge_tallies

START_UP_S = 30.0  # importing Locust and connecting its processes; 2 s on an idle machine
GRACE_S = 10.0  # writing the records
POLL_S = 0.1
END_S = 5.0  # between the polite and the certain signal
LOG_TAIL_LINES = 15

LOCUSTFILE = Path(__file__).with_name("locustfile.py")


def run_load(
    plan: Plan,
    payloads: Sequence[Payload],
    *,
    token: str | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Tally:
    """Sends the planned load and returns what came back.

    Args:
        plan: What to do.
        payloads: Request bodies, at least one.
        token: Bearer token, or None.
        on_progress: Called about ten times a second with the seconds since the start.

    Returns:
        The merged tally of all load processes.

    Raises:
        RunError: Locust failed, or did not finish in time.
    """
    # The folder is private to this user (mkdtemp): the job in it holds the token.
    with tempfile.TemporaryDirectory(prefix="torchport-loadtest-") as folder:
        work = Path(folder)
        results = work / "results"
        results.mkdir()
        job = work / "job.json"
        Job(plan=plan, payloads=payloads, token=token, results=results).write(job)
        log = work / "locust.log"
        with log.open("wb") as log_file:
            locust = subprocess.Popen(
                locust_command(plan),
                cwd=work,  # Locust reads settings from pyproject.toml and locust.conf where it starts
                env=_locust_environment(job),
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a process group of its own, so that forked workers end with it
            )
        try:
            _wait(locust, plan, results, on_progress, log)
        finally:
            _end_group(locust)
        return merge_tallies(Tally.from_json(json.loads(path.read_bytes())) for path in _records(results))


def locust_command(plan: Plan) -> list[str]:
    """The Locust command line for a plan."""
    users = plan.processes if plan.users is None else plan.users
    command = [sys.executable, "-m", "locust", "-f", str(LOCUSTFILE)]
    command += ["--headless", "--only-summary", "--loglevel", "WARNING"]
    command += ["--host", plan.url.rstrip("/"), "--users", str(users), "--spawn-rate", str(users)]
    # The users end by themselves at the end of the window; this only tells Locust when to collect them,
    # and --stop-timeout lets the last requests be answered.
    command += ["--run-time", f"{math.ceil(plan.total_s) + 1}s"]
    command += ["--stop-timeout", str(math.ceil(plan.timeout_s) + 1)]
    if plan.processes > 1:
        port = str(_free_port())
        command += ["--processes", str(plan.processes)]
        command += ["--master-bind-host", "127.0.0.1", "--master-bind-port", port]
        command += ["--master-host", "127.0.0.1", "--master-port", port]
    return [*command, "OpenLoopUser" if plan.open_loop else "ClosedLoopUser"]


def _locust_environment(job: Path) -> dict[str, str]:
    """The environment of the subprocess: ours, without anything that would reconfigure Locust."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LOCUST_")}
    environment[JOB_VARIABLE] = str(job)
    # epoll and poll round a wait up to whole milliseconds: sends are 0.66 ms late at the median, 1.2 ms at p99.
    # select() takes microseconds: 0.14 ms and 0.29 ms (200 req/s, gevent 26.9, libev).
    environment["GEVENT_BACKEND"] = "select"
    # The package is found also when torchport runs from a checkout that is not installed.
    paths = [str(LOCUSTFILE.parents[1]), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return environment


def _wait(
    locust: subprocess.Popen[bytes],
    plan: Plan,
    results: Path,
    on_progress: Callable[[float], None] | None,
    log: Path,
) -> None:
    """Waits until every load process has left its record."""
    start_s = time.monotonic()
    limit_s = START_UP_S + plan.total_s + plan.timeout_s + GRACE_S
    # With several processes Locust's master may exit before its workers have drained, hence the second wait.
    exit_s: float | None = None
    while locust.poll() is None or len(_records(results)) < plan.processes:
        elapsed_s = time.monotonic() - start_s
        if on_progress is not None:
            on_progress(elapsed_s)
        if exit_s is None and locust.returncode is not None:
            exit_s = elapsed_s
        if exit_s is not None and (locust.returncode or elapsed_s > exit_s + plan.timeout_s + GRACE_S):
            raise RunError(
                f"the load generator ended with exit code {locust.returncode} and "
                f"{len(_records(results))} of {plan.processes} records; its log ends:\n{_tail(log)}"
            )
        if elapsed_s > limit_s:
            raise RunError(f"the load generator was not done after {limit_s:.0f} s; its log ends:\n{_tail(log)}")
        time.sleep(POLL_S)


def _records(results: Path) -> list[Path]:
    return sorted(results.glob("[0-9]*.json"))


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return "\n".join(lines[-LOG_TAIL_LINES:]) or "(it is empty)"


def _end_group(locust: subprocess.Popen[bytes]) -> None:
    """Ends Locust and its workers, if any of them still runs."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(locust.pid, number)
        except (ProcessLookupError, PermissionError):
            return  # the whole group has ended; macOS says EPERM of one that is only being buried
        deadline_s = time.monotonic() + END_S
        while locust.poll() is None and time.monotonic() < deadline_s:
            time.sleep(POLL_S)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
