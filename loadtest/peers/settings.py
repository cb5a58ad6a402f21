"""What every peer is told: which model, where to listen, how many threads."""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

HOST = "127.0.0.1"
MAX_BATCH = 32
VARIABLE = "TORCHPORT_PEER_SETTINGS"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSettings:
    """The settings of one peer.

    Attributes:
        folder: The extracted archive whose model is served.
        port: Where to listen, on the loopback.
        threads: Threads that one batch may use.
        workers: Processes that compute, each with a model of its own.
        files: Whether requests are files as they are, such as images, instead of JSON.
    """

    folder: Path
    port: int
    threads: int
    workers: int = 1
    files: bool = False

    @classmethod
    def from_arguments(cls, arguments: Sequence[str] | None = None) -> Self:
        """Reads the command line, and leaves the settings to child processes, which see another one.

        Args:
            arguments: The command line without the program; None for this process's own.
        """
        parser = argparse.ArgumentParser()
        parser.add_argument("--folder", type=Path, required=True)
        parser.add_argument("--port", type=int, required=True)
        parser.add_argument("--threads", type=int, required=True)
        parser.add_argument("--workers", type=int, default=1)
        parser.add_argument("--files", action="store_true")
        settings = cls(**vars(parser.parse_args(arguments)))
        os.environ[VARIABLE] = json.dumps({**asdict(settings), "folder": str(settings.folder)})
        return settings

    @classmethod
    def from_environment(cls) -> Self:
        """Reads what the parent process left."""
        document = json.loads(os.environ[VARIABLE])
        return cls(**{**document, "folder": Path(document["folder"])})
