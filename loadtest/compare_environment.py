"""The virtual environment of the peers, made on first use.

Their dependencies are theirs: torchport's own environment stays as it is, whatever a peer pins. It sees this
environment's packages all the same, through a ``.pth`` file, and *after* its own: so torch, NumPy, tokenizers and ONNX
Runtime are the very ones that torchport runs with (or there would be nothing to compare; and torch is a gigabyte), and
where a peer needs another version of something, its own comes first. pip sees them too, and installs only what is
missing. ``--system-site-packages`` would not do: it shows the packages of the interpreter below, not those of the
virtual environment that torchport itself is in.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator, Sequence
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

import platformdirs

from deploy.state import STATE_VARIABLE
from loadtest.compare_errors import PeersError
from loadtest.files import write_atomically

REQUIREMENTS = Path(__file__).parent / "peers" / "requirements.txt"
ROOT = Path(__file__).parents[1]
INSTALLED_FILE = "installed.json"
_PATH_FILE = "torchport.pth"
# What a peer's model runs on must be what torchport's runs on: pip may not replace these.
_SHARED = ("torch", "numpy", "pillow", "tokenizers", "onnxruntime", "onnxruntime-gpu")
_INSTALL_TIMEOUT_S = 1800.0


class PeerEnvironment:
    """The peers' virtual environment.

    Args:
        folder: Where it lies, or is to be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def default(cls) -> "PeerEnvironment":
        """The one in the user's cache folder, or where ``TORCHPORT_STATE_DIR`` says.

        Another Python, torch, set of pins or place of torchport makes another one. Old ones may be deleted.
        """
        root = os.environ.get(STATE_VARIABLE)
        parent = Path(root).absolute() if root else platformdirs.user_cache_path("torchport")
        key = [platform.python_version(), sys.prefix, str(ROOT), *_shared_pins(), REQUIREMENTS.read_text("utf-8")]
        return cls(parent / f"peers-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]}")

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def missing(self, packages: Sequence[str]) -> tuple[str, ...]:
        """Which of some packages have not been installed here."""
        installed = self._installed()
        return tuple(package for package in packages if package not in installed)

    def install(self, packages: Sequence[str]) -> None:
        """Makes the environment if need be, and installs what is missing.

        Args:
            packages: Names, as in the pinned requirements; extras are allowed.

        Raises:
            PeersError: It cannot be made, or the packages cannot be installed.
        """
        if not self.missing(packages):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(self.folder / "lock"):
                if not self.missing(packages):  # another comparison has installed them meanwhile
                    return
                if not self._installed():
                    self._make()
                self._install(sorted({*self._installed(), *packages}))
        except OSError as error:
            raise PeersError(
                f"the peers' environment {self.folder} cannot be made ({error.strerror or error}); "
                f"name another place with {STATE_VARIABLE}"
            ) from error

    def versions(self, packages: Sequence[str]) -> dict[str, str]:
        """The versions of packages in it; those that it lacks are left out."""
        found: dict[str, str] = {}
        paths = [str(self._site_packages), sysconfig.get_path("purelib")]
        for package in packages:
            for distribution in metadata.distributions(name=package, path=paths):
                found.setdefault(package, distribution.version)
        return found

    @property
    def _site_packages(self) -> Path:
        return Path(sysconfig.get_path("purelib", vars={"base": str(self.folder)}))

    def _installed(self) -> list[str]:
        try:
            document: list[str] = json.loads((self.folder / INSTALLED_FILE).read_bytes())
        except (OSError, ValueError):
            return []
        return document if self.python.exists() else []

    def _make(self) -> None:
        """An empty environment over whatever an interrupted attempt has left."""
        # Ours installs into the other environment; unpacking another pip there takes seconds. Looked for on the path
        # alone: setuptools has a finder of its own, which takes a question for pip as the start of pip.
        has_pip = PathFinder.find_spec("pip") is not None
        venv.EnvBuilder(symlinks=True, with_pip=not has_pip).create(self.folder)
        places = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), str(ROOT)])
        (self._site_packages / _PATH_FILE).write_text("".join(f"{place}\n" for place in places), encoding="utf-8")

    def _install(self, packages: Sequence[str]) -> None:
        constraints = self.folder / "constraints.txt"
        constraints.write_text("".join(f"{pin}\n" for pin in _shared_pins()), encoding="utf-8")
        command = [str(self.python), "-P", "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
        command += ["--quiet", "--constraint", str(REQUIREMENTS), "--constraint", str(constraints), *packages]
        try:
            done = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_INSTALL_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise PeersError(
                f"the peers' packages were not installed within {_INSTALL_TIMEOUT_S:.0f} s; try again, or leave them "
                "out with --peers torchserve"
            ) from error
        if done.returncode != 0:
            raise PeersError(
                f"pip cannot install {', '.join(packages)}: {_reason(done.stderr)}; see whether pip reaches its index, "
                "or leave them out with --peers torchserve"
            )
        write_atomically(self.folder / INSTALLED_FILE, json.dumps(packages).encode())


def _shared_pins() -> list[str]:
    """The versions that both environments share, as pip writes them."""
    pins = []
    for package in _SHARED:
        with contextlib.suppress(metadata.PackageNotFoundError):
            pins.append(f"{package}=={metadata.version(package)}")
    return pins


def _reason(stderr: str) -> str:
    """What pip calls the error."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines[-1:] or ["it says nothing"])[0]


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock file: two comparisons that start together must not install into each other."""
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
