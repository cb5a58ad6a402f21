"""A step of the export in a process of its own: a module run by ``python -m``, whose answer is a file.

Its stdout is for whatever the user's module prints. A crash takes only that process with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from export.errors import ExportError


def run_in_fresh_process(
    module: str,
    folder: Path,
    answer_file: str,
    *,
    what: str,
    error: type[ExportError],
    arguments: Sequence[str] = (),
    stdin: str = "",
    environment: Mapping[str, str] | None = None,
) -> Any:
    """Run a module that writes a JSON document, and read it.

    Args:
        module: Its import path.
        folder: The process's current folder.
        answer_file: The document's name there; it is removed afterwards.
        what: The process in words, for the message when it dies.
        error: What to raise then.
        arguments: Of its command line.
        stdin: What it reads.
        environment: Variables besides this process's own.

    Raises:
        ExportError: ``error``, if the process dies or leaves no answer.
    """
    answer = folder / answer_file
    answer.unlink(missing_ok=True)
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            input=stdin,
            env={**os.environ, "PYTHONPATH": _absolute_path(), **(environment or {})},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not answer.is_file():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1].strip()
            raise error(f"{what} died with exit code {done.returncode}: {last}")
        return json.loads(answer.read_bytes())
    finally:
        answer.unlink(missing_ok=True)


def _absolute_path() -> str:
    # The child stands elsewhere, and an empty path means the current folder.
    return os.pathsep.join(map(os.path.abspath, sys.path))
