"""Runs the closed-loop client in a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from loadtest.closed_loop import LoadJob, LoadRecord
from loadtest.errors import RunError

ROOT = Path(__file__).parents[1]
# Importing, connecting, writing the record.
_GRACE_S = 30.0


def own_environment() -> dict[str, str]:
    """The environment of processes that run our own code with our own interpreter.

    The packages are found also when torchport runs from a checkout that is not installed.
    """
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def send_load(job: LoadJob) -> LoadRecord:
    """Does one job in a process of its own, whose CPU time is then the load's alone.

    Raises:
        RunError: The client failed, or did not end in time.
    """
    limit_s = job.warm_up_s + job.duration_s + 2 * job.timeout_s + _GRACE_S
    with tempfile.TemporaryDirectory(prefix="torchport-load-") as folder:  # private: the job may hold a token
        job_file, record_file = Path(folder) / "job.json", Path(folder) / "record.json"
        job_file.write_text(json.dumps(job.to_json()), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "loadtest.closed_loop", str(job_file), str(record_file)]
        try:
            done = subprocess.run(
                command,
                env=own_environment(),
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limit_s,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RunError(f"the load generator was not done after {limit_s:.0f} s; run it again") from error
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
            raise RunError(f"the load generator ended with exit code {done.returncode}: {reason}")
        return LoadRecord.from_json(json.loads(record_file.read_bytes()))
