"""The demo: the commands of a whole journey, run one after the other as a user would run them."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deploy.errors import DeployError, StateError
from deploy.ports import Ports
from deploy.state import ServerState, find_server, make_private, state_folder
from export.archive import open_archive

_MODEL = "digits"
_FORMATS = ("torchscript", "onnx")
_USERS = 8
# Open loop at half of what the closed loop reached: loaded, but not past the knee.
_RATE_SHARE = 0.5
# A machine that others use may send too late to measure anything: half the rate, then, and half of that.
_RATES_TRIED = 4
_READY_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 90.0
# -P: a folder such as models/ where the user stands must not be taken for ours.
_TORCHPORT = (sys.executable, "-P", "-m", "torchport")


def run_demo(out: Path, *, port: int, duration_s: float, console: Console) -> dict[str, Any]:
    """Train, export, serve, predict and load-test, and print what came of it.

    Args:
        out: Folder for the run, the model store and the reports.
        port: First of the server's five ports; 0 finds free ones.
        duration_s: Length of each of the two load tests.
        console: Where the commands and the table go.

    Returns:
        The figures of the table.

    Raises:
        DeployError: If one of the commands fails; its own words are printed first.
    """
    started = time.monotonic()
    run, store = out / "run", out / "model_store"
    journey = _Journey(console)
    trained = journey.run("train", _MODEL, "--out", str(run))
    exported = {
        format: journey.run("export", str(run), "--format", format, "--name", _model_name(format), "--out", str(store))
        for format in _FORMATS
    }
    archives = [store / f"{_model_name(format)}.mar" for format in _FORMATS]
    first = Ports.first_of_free_range() if port == 0 else port
    with journey.serving([str(path) for path in archives], first) as state:
        url = ("--url", state.inference_url)
        sample = _write_sample(archives[0], out)
        answer = journey.run("predict", _MODEL, str(sample), *url)
        loads = {}
        for format, archive in zip(_FORMATS, archives, strict=True):
            name = _model_name(format)
            common = (name, "--duration", f"{duration_s:g}", "--archive", str(archive), *url)
            capacity = journey.run("loadtest", *common, "--users", str(_USERS), "--out", str(out / f"{name}-capacity"))
            latency = journey.measure_latency(
                *common, "--out", str(out / f"{name}-latency"), rate=capacity["throughput_rps"] * _RATE_SHARE
            )
            loads[format] = {"capacity": capacity, "latency": latency}
    return _summary(console, trained, exported, answer, loads, time.monotonic() - started)


def _model_name(format: str) -> str:
    return _MODEL if format == _FORMATS[0] else f"{_MODEL}-{format}"


def _write_sample(archive: Path, out: Path) -> Path:
    """One golden sample as a file, for ``predict``."""
    opened = open_archive(archive)
    file = opened.read_json("golden/expected.json")["samples"][0]["file"]
    sample = out / f"sample{Path(file).suffix}"
    sample.write_bytes(opened.read(file))
    return sample


class _Journey:
    """Runs torchport's own commands as processes.

    Args:
        console: Where each command is shown before it runs.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    def measure_latency(self, *arguments: str, rate: float) -> dict[str, Any]:
        """Load-test at a rate, or at a lower one when this machine is too busy to send on time.

        Raises:
            DeployError: If the command fails, or no rate gives a valid measurement.
        """
        for _ in range(_RATES_TRIED):
            found = self.run("loadtest", *arguments, "--rate", f"{max(1.0, round(rate)):g}", invalid_is_fine=True)
            if found["valid"]:
                return found
            for reason in found["invalid_reasons"]:
                self._console.print(f"  not a valid measurement: {reason}", markup=False, highlight=False)
            rate /= 2
        raise DeployError(
            "the demo stops here: something else keeps this machine too busy to measure latency; try again later"
        )

    def run(self, *arguments: str, invalid_is_fine: bool = False) -> dict[str, Any]:
        """Run a command to its end and return its JSON document.

        Args:
            *arguments: What comes after ``torchport``.
            invalid_is_fine: Return a measurement that calls itself invalid, too.

        Raises:
            DeployError: If it fails.
        """
        started = time.monotonic()
        self._show(arguments)
        with Console(stderr=True).status(f"torchport {arguments[0]}"):
            done = subprocess.run([*_TORCHPORT, *arguments, "--json"], capture_output=True, text=True, check=False)
        lines = done.stdout.strip().splitlines()
        document: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        if done.returncode != 0 and not (invalid_is_fine and document.get("valid") is False):
            shown = done.stdout.rstrip().rpartition("\n")[0]  # the last line is for machines
            self._console.print(f"{shown}\n{done.stderr}", markup=False, highlight=False)
            raise DeployError(f"the demo stops here: `torchport {shlex.join(arguments)}` failed")
        self._console.print(f"  [dim]{time.monotonic() - started:.1f} s")
        return document

    @contextmanager
    def serving(self, archives: Sequence[str], port: int) -> Iterator[ServerState]:
        """Run ``torchport serve`` for as long as the block lasts."""
        arguments = ("serve", *archives, "--port", str(port))
        self._show(arguments)
        folder = state_folder(port)
        make_private(folder)  # the log shows a token
        log = folder / "serve.log"
        with log.open("w", encoding="utf-8") as output:
            process = subprocess.Popen([*_TORCHPORT, *arguments], stdout=output, stderr=subprocess.STDOUT, text=True)
            try:
                with Console(stderr=True).status("torchport serve"):
                    yield _wait_for(process, port, log)
            finally:
                if process.poll() is None:
                    process.send_signal(signal.SIGTERM)
                    process.wait(timeout=_STOP_TIMEOUT_S)

    def _show(self, arguments: Sequence[str]) -> None:
        line = f"$ torchport {shlex.join(arguments)}"
        self._console.print(line, style="bold", markup=False, highlight=False, soft_wrap=True)


def _wait_for(process: subprocess.Popen[str], port: int, log: Path) -> ServerState:
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            state = find_server(port)
        except StateError:  # not ready yet
            time.sleep(0.2)
            continue
        if state.pid == process.pid:
            return state
    lines = log.read_text(encoding="utf-8").strip().splitlines() or ["it printed nothing"]
    raise DeployError(f"`torchport serve` did not become ready: {lines[-1]} (log: {log})")


def _summary(
    console: Console,
    trained: dict[str, Any],
    exported: dict[str, dict[str, Any]],
    answer: dict[str, Any],
    loads: dict[str, dict[str, Any]],
    seconds: float,
) -> dict[str, Any]:
    table = Table(title="from a checkpoint to a load-tested endpoint", title_justify="left")
    table.add_column("", style="bold")
    rows: dict[str, list[str]] = {}
    results: dict[str, Any] = {}
    for format in _FORMATS:
        table.add_column(format, overflow="fold")
        gates = {gate["gate"]: gate for gate in exported[format]["gates"]}
        capacity, latency = loads[format]["capacity"], loads[format]["latency"]
        results[format] = {
            "accuracy": gates["accuracy"]["measured"],
            "parity": gates["parity"]["detail"],
            "p50_ms": latency["latency_ms"]["p50"],
            "p99_ms": latency["latency_ms"]["p99"],
            "rate": latency["throughput_rps"],
            "capacity": capacity["throughput_rps"],
            "report": latency["report"],
            "archive": exported[format]["archive"],
        }
        found = results[format]
        for label, value in (
            ("held-out accuracy", f"{found['accuracy']:.4f}"),
            ("parity with the checkpoint", found["parity"]),
            (
                "p50 / p99 at an open-loop rate",
                f"{found['p50_ms']:.1f} / {found['p99_ms']:.1f} ms at {found['rate']:.0f} req/s",
            ),
            (f"most with {_USERS} users in a closed loop", f"{found['capacity']:.0f} req/s"),
            ("archive", found["archive"]),
            ("report", found["report"]),
        ):
            rows.setdefault(label, []).append(value)
    for label, values in rows.items():
        table.add_row(label, *map(escape, values))
    console.print(table)
    console.print(
        f"{seconds:.0f} s on {os.cpu_count()} cores. Open a report in a browser; the archives serve as they are."
    )
    return {
        "ok": True,
        "trained_accuracy": trained["accuracy"],
        "formats": results,
        "answer": answer,
        "seconds": seconds,
    }
