"""Mosec: dynamic batching with its default wait of 10 ms.

Images are decoded in a stage before it, as in the ResNet example of its documentation.
"""

import json
import sys
from typing import Any

from mosec import Server, Worker  # type: ignore[import-not-found,unused-ignore]  # in the peers' environment

from handlers.decoder import Decoded
from loadtest.peers.model import PeerDecoder, PeerModel
from loadtest.peers.settings import HOST, MAX_BATCH, PeerSettings

MAX_WAIT_MS = 10
# Processes that decode images.
DECODERS = 2
# Its default of 3 s would refuse what slower peers may answer late.
TIMEOUT_MS = 60_000


class ModelWorker(Worker):  # type: ignore[misc,unused-ignore]
    """The model behind Mosec."""

    def __init__(self) -> None:
        super().__init__()
        self._model = PeerModel.load(PeerSettings.from_environment())

    def deserialize(self, data: bytes) -> Decoded:
        """One request, read."""
        return self._model.decode(json.loads(data))

    def forward(self, data: list[Decoded]) -> list[dict[str, Any]]:
        """A batch's answers."""
        return self._model.predict(data)


class FileWorker(Worker):  # type: ignore[misc,unused-ignore]
    """Decodes images for the model, in processes of its own beside it."""

    def __init__(self) -> None:
        super().__init__()
        self._decoder = PeerDecoder.load(PeerSettings.from_environment())

    def deserialize(self, data: bytes) -> bytes:
        """The file as it came."""
        return data

    def forward(self, data: bytes) -> Decoded:
        """One image, decoded."""
        return self._decoder.decode_file(data)


if __name__ == "__main__":
    SETTINGS = PeerSettings.from_arguments()
    # Mosec reads its own options from the command line.
    sys.argv[1:] = ["--address", HOST, "--port", str(SETTINGS.port), "--timeout", str(TIMEOUT_MS)]
    sys.argv += ["--log-level", "warning"]
    SERVER = Server()
    if SETTINGS.files:
        SERVER.append_worker(FileWorker, num=DECODERS)
    SERVER.append_worker(ModelWorker, num=SETTINGS.workers, max_batch_size=MAX_BATCH, max_wait_time=MAX_WAIT_MS)
    SERVER.run()
