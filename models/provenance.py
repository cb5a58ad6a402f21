"""Which code wrote a checkpoint."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

_SOURCE_FOLDER = Path(__file__).parent
_GIT_TIMEOUT_S = 10


def versions() -> dict[str, str]:
    """Of what decides the bytes of a checkpoint."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchport": version("torchport"),
    }


def git_revision(folder: Path = _SOURCE_FOLDER) -> str | None:
    """The commit that torchport's source is at, "-dirty" when tracked files were changed.

    Returns:
        None without git, outside a repository, before its first commit, and for source that the surrounding
        repository does not track, such as an installation inside another project's virtual environment.
    """
    tracked = _git(folder, "ls-files", "--", ".")
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") if tracked else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=_GIT_TIMEOUT_S,
            # Reading must not rewrite the index under the feet of a commit.
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
