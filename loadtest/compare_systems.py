"""The systems that can be compared, and how each is started."""

import sys
from dataclasses import dataclass
from pathlib import Path

from loadtest.errors import PlanError
from loadtest.payloads import Payload

TORCHPORT = "torchport"
_BOUNDARY = "torchport-compare-5f1d0c7e9a"


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One system under load.

    Attributes:
        name: What options and results call it.
        title: What people call it.
        batching: How it makes batches, for the report; ``{workers}`` stands for how many workers it has.
        decoding: Where it decodes what comes as a file, for the report.
        form_field: The field of a multipart form that it takes files in; empty for a file as the whole body.
        path: Where it answers; empty for torchport, whose path has the model's name.
        module: Its server in `loadtest.peers`; empty for torchport.
        packages: What it needs from the peers' environment; nothing: it runs in torchport's own.
        options: More words of its command line.
        versions: Packages whose versions the report names.
    """

    name: str
    title: str
    batching: str
    decoding: str = ""
    form_field: str = ""
    path: str = "/predict"
    module: str = ""
    packages: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()

    def describe(self, *, files: bool, workers: int = 1) -> str:
        """How it serves, in words.

        Args:
            files: Whether it gets files.
            workers: How many workers it has.
        """
        batching = self.batching.format(workers="one worker" if workers == 1 else f"{workers} workers")
        return f"{batching}; {self.decoding}" if files and self.decoding else batching

    def envelope(self, body: Payload, *, files: bool) -> Payload:
        """The body that it gets: the same bytes as all, in a form if it takes files in no other way."""
        if not (files and self.form_field):
            return body
        head = (
            f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{self.form_field}"; filename="image"\r\n'
            f"Content-Type: {body.content_type}\r\n\r\n"
        )
        return Payload(
            body=b"".join([head.encode(), body.body, f"\r\n--{_BOUNDARY}--\r\n".encode()]),
            content_type=f"multipart/form-data; boundary={_BOUNDARY}",
        )

    def peer_command(
        self, python: Path, *, folder: Path, port: int, threads: int, workers: int, files: bool
    ) -> list[str]:
        """The command line of a peer.

        Args:
            python: Interpreter of its environment.
            folder: The extracted archive that it serves.
            port: Where it listens.
            threads: Threads of one batch.
            workers: Processes that compute, each with a model of its own.
            files: Whether requests are files as they are, instead of JSON.
        """
        # -P: a folder such as models/ where the user stands must not be taken for ours.
        command = [str(python), "-P", "-m", f"loadtest.peers.{self.module}"]
        command += ["--folder", str(folder), "--port", str(port)]
        command += ["--threads", str(threads), "--workers", str(workers)]
        return [*command, *(["--files"] if files else []), *self.options]


SYSTEMS = {
    system.name: system
    for system in (
        System(
            name=TORCHPORT,
            title="torchport",
            batching="`torchport serve` with the archive as it is, {workers}",
            decoding="decoded by its worker, beside computing",
            path="",
            versions=("torchserve", "torch"),
        ),
        System(
            name="torchserve",
            title="TorchServe, stock",
            batching="plain handler, {workers}, batches of 32 in arrival order, delay 10 ms, torchport's quiet log",
            decoding="decoded in the handler, a batch at a time",
            path="/predictions/peer",
            module="peer_torchserve",
            options=("--quiet",),
            versions=("torchserve",),
        ),
        System(
            name="torchserve-defaults",
            title="TorchServe, defaults",
            batching="plain handler, {workers}, batches of 32 in arrival order, delay 10 ms, its own log",
            decoding="decoded in the handler, a batch at a time",
            path="/predictions/peer",
            module="peer_torchserve",
            versions=("torchserve",),
        ),
        System(
            name="litserve",
            title="LitServe",
            batching="{workers}, batches of 32 in arrival order, timeout 10 ms, fast queue",
            decoding="decoded in decode_request, by the worker before it computes a batch",
            module="peer_litserve",
            packages=("litserve",),
            versions=("litserve",),
        ),
        System(
            name="mosec",
            title="Mosec",
            batching="{workers}, batches of 32 in arrival order, wait 10 ms",
            decoding="decoded in a stage of its own with two processes, as in its ResNet example",
            path="/inference",
            module="peer_mosec",
            packages=("mosec",),
            versions=("mosec",),
        ),
        System(
            name="bentoml",
            title="BentoML",
            batching="{workers}, adaptive batches of at most 32 in arrival order",
            decoding="files in a multipart form, which its batching needs; decoded by the worker, a batch at a time",
            form_field="images",
            module="peer_bentoml",
            packages=("bentoml",),
            versions=("bentoml",),
        ),
        System(
            name="ray",
            title="Ray Serve",
            batching="{workers}, batches of 32 in arrival order, wait 10 ms",
            decoding="decoded in __call__, before a batch is made",
            module="peer_ray",
            packages=("ray[serve]",),
            versions=("ray",),
        ),
        System(
            name="fastapi",
            title="FastAPI",
            batching="no batches: a thread a request, on all cores",
            decoding="decoded in the request's thread",
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


def serve_command(archive: Path, *, workers: int) -> list[str]:
    """The command line of torchport's own server, on ports that it finds free."""
    command = [sys.executable, "-P", "-m", "torchport", "serve", str(archive), "--port", "0"]
    return [*command, "--workers", str(workers)]
