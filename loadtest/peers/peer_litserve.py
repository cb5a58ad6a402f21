"""LitServe: its workers, and its own batching with the timeout of its documentation's example.

`fast_queue` is what its documentation advises from a hundred requests a second on.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import litserve  # type: ignore[import-not-found,unused-ignore]  # in the peers' environment
from fastapi import Body  # type: ignore[import-not-found,unused-ignore]

from handlers.decoder import Decoded
from loadtest.peers.model import PeerModel
from loadtest.peers.settings import HOST, MAX_BATCH, PeerSettings

BATCH_TIMEOUT_S = 0.01


class Api(litserve.LitAPI):  # type: ignore[misc,unused-ignore]
    """The model behind LitServe, whatever requests are."""

    def setup(self, device: str) -> None:
        """Loads the model in the worker."""
        self._model = PeerModel.load(PeerSettings.from_environment())

    def batch(self, inputs: list[Decoded]) -> list[Decoded]:
        """The requests as they are: the model pads them."""
        return inputs

    def predict(self, x: Sequence[Decoded]) -> list[dict[str, Any]]:
        """A batch's answers."""
        return self._model.predict(x)

    def unbatch(self, output: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The answers as they are."""
        return output

    def encode_response(self, output: dict[str, Any]) -> dict[str, Any]:
        """One request's answer."""
        return output


class ModelApi(Api):
    """Takes requests of JSON."""

    def decode_request(self, request: dict[str, Any]) -> Decoded:
        """One request, read."""
        return self._model.decode(request)


class FileApi(Api):
    """Takes images, whose bytes FastAPI hands over as they came: LitServe is built on it."""

    def decode_request(self, request: Annotated[bytes, Body(media_type="image/jpeg")]) -> Decoded:
        """One image, decoded."""
        return self._model.decode_file(request)


if __name__ == "__main__":
    SETTINGS = PeerSettings.from_arguments()
    API = (FileApi if SETTINGS.files else ModelApi)(max_batch_size=MAX_BATCH, batch_timeout=BATCH_TIMEOUT_S)
    SERVER = litserve.LitServer(API, accelerator="cpu", workers_per_device=SETTINGS.workers, fast_queue=True)
    SERVER.run(host=HOST, port=SETTINGS.port, log_level="warning", generate_client_file=False, num_api_servers=1)
