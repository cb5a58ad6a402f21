"""The systems that can be compared, and how each is started."""

import sys
from dataclasses import dataclass
from pathlib import Path

from loadtest.errors import PlanError

TORCHPORT = "torchport"


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One system under load.

    Attributes:
        name: What options and results call it.
        title: What people call it.
        batching: How it makes batches, for the report.
        path: Where it answers; empty for torchport, whose path has the model's name.
        module: Its server in `loadtest.peers`; empty for torchport.
        packages: What it needs from the peers' environment; nothing: it runs in torchport's own.
        options: More words of its command line.
        versions: Packages whose versions the report names.
    """

    name: str
    title: str
    batching: str
    path: str = "/predict"
    module: str = ""
    packages: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()

    def peer_command(self, python: Path, *, folder: Path, port: int, threads: int) -> list[str]:
        """The command line of a peer.

        Args:
            python: Interpreter of its environment.
            folder: The extracted archive that it serves.
            port: Where it listens.
            threads: Threads of one batch.
        """
        # -P: a folder such as models/ where the user stands must not be taken for ours.
        command = [str(python), "-P", "-m", f"loadtest.peers.{self.module}"]
        command += ["--folder", str(folder), "--port", str(port), "--threads", str(threads)]
        return [*command, *self.options]


SYSTEMS = {
    system.name: system
    for system in (
        System(
            name=TORCHPORT,
            title="torchport",
            batching="`torchport serve` with the archive as it is",
            path="",
            versions=("torchserve", "torch"),
        ),
        System(
            name="torchserve",
            title="TorchServe, stock",
            batching="plain handler, batches of 32 in arrival order, delay 10 ms, torchport's quiet log",
            path="/predictions/peer",
            module="peer_torchserve",
            options=("--quiet",),
            versions=("torchserve",),
        ),
        System(
            name="torchserve-defaults",
            title="TorchServe, defaults",
            batching="plain handler, batches of 32 in arrival order, delay 10 ms, its own log",
            path="/predictions/peer",
            module="peer_torchserve",
            versions=("torchserve",),
        ),
        System(
            name="litserve",
            title="LitServe",
            batching="one worker, batches of 32 in arrival order, timeout 10 ms, fast queue",
            module="peer_litserve",
            packages=("litserve",),
            versions=("litserve",),
        ),
        System(
            name="mosec",
            title="Mosec",
            batching="one worker, batches of 32 in arrival order, wait 10 ms",
            path="/inference",
            module="peer_mosec",
            packages=("mosec",),
            versions=("mosec",),
        ),
        System(
            name="bentoml",
            title="BentoML",
            batching="one worker, adaptive batches of at most 32 in arrival order",
            module="peer_bentoml",
            packages=("bentoml",),
            versions=("bentoml",),
        ),
        System(
            name="ray",
            title="Ray Serve",
            batching="one replica, batches of 32 in arrival order, wait 10 ms",
            module="peer_ray",
            packages=("ray[serve]",),
            versions=("ray",),
        ),
        System(
            name="fastapi",
            title="FastAPI",
            batching="no batches: a thread a request, on all cores",
            module="peer_fastapi",
            packages=("fastapi", "uvicorn[standard]"),
            versions=("fastapi", "uvicorn"),
        ),
    )
}
DEFAULT_PEERS = tuple(name for name in SYSTEMS if name not in (TORCHPORT, "torchserve-defaults"))
PEERS = tuple(name for name in SYSTEMS if name != TORCHPORT)
NO_PEERS = "none"


def parse_peers(text: str) -> tuple[str, ...]:
    """Reads ``--peers``: names with commas between them, ``all`` or ``none``.

    Raises:
        PlanError: A name is not known, or given twice.
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if names == (NO_PEERS,):
        return ()
    if names == ("all",):
        return PEERS
    unknown = [name for name in names if name not in PEERS]
    if unknown or not names or len(set(names)) < len(names):
        fault = f"{unknown[0]!r} is none" if unknown else "a name is given twice" if names else "there is no name"
        raise PlanError(f"--peers {text!r}: {fault}; choose from {', '.join(PEERS)}, or give all or {NO_PEERS}")
    return names


def serve_command(archive: Path) -> list[str]:
    """The command line of torchport's own server, on ports that it finds free."""
    return [sys.executable, "-P", "-m", "torchport", "serve", str(archive), "--port", "0"]
