"""BentoML: its adaptive batching, which learns how long to wait."""

import os
import sys
from typing import Any

import bentoml  # type: ignore[import-not-found,unused-ignore]  # in the peers' environment
from PIL.Image import Image

from loadtest.peers.model import PeerModel
from loadtest.peers.settings import HOST, MAX_BATCH, VARIABLE, PeerSettings

# Not a wait but a bound: BentoML refuses requests that it expects to take longer. As long as its own default, so that
# it refuses none.
MAX_LATENCY_MS = 60_000
# Of the processes that serve; the one that starts them only names the service.
WORKERS = PeerSettings.from_environment().workers if VARIABLE in os.environ else 1


@bentoml.service(workers=WORKERS, traffic={"timeout": MAX_LATENCY_MS / 1000})  # type: ignore[untyped-decorator,unused-ignore]
class Model:
    """The model behind BentoML. Its batching needs a list, so a reply is ``[prediction]`` instead of an object."""

    def __init__(self) -> None:
        self._model = PeerModel.load(PeerSettings.from_environment())

    @bentoml.api(  # type: ignore[untyped-decorator,unused-ignore]
        batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=MAX_LATENCY_MS
    )
    def predict(self, instances: list[Any]) -> list[dict[str, Any]]:
        """A batch's answers."""
        answers = self._model.predict([self._model.decode({"instances": [instance]}) for instance in instances])
        return [answer["predictions"][0] for answer in answers]


@bentoml.service(workers=WORKERS, traffic={"timeout": MAX_LATENCY_MS / 1000})  # type: ignore[untyped-decorator,unused-ignore]
class FileModel:
    """The same for images, in the form of its documentation's examples: files of a multipart form.

    BentoML has Pillow open each; what it opened is read again from its bytes, so that all decode alike.
    """

    def __init__(self) -> None:
        self._model = PeerModel.load(PeerSettings.from_environment())

    @bentoml.api(  # type: ignore[untyped-decorator,unused-ignore]
        batchable=True, max_batch_size=MAX_BATCH, max_latency_ms=MAX_LATENCY_MS
    )
    def predict(self, images: list[Image]) -> list[dict[str, Any]]:
        """A batch's answers."""
        return self._model.predict([self._model.decode_file(_bytes_of(image)) for image in images])


def _bytes_of(image: Image) -> bytes:
    """The file that Pillow has opened, and not decoded yet."""
    file = image.fp  # type: ignore[attr-defined]  # of an ImageFile
    file.seek(0)
    data: bytes = file.read()
    return data


if __name__ == "__main__":
    SETTINGS = PeerSettings.from_arguments()
    SERVE = [
        "serve",
        f"loadtest.peers.peer_bentoml:{'FileModel' if SETTINGS.files else 'Model'}",
        "--host",
        HOST,
        "--port",
        str(SETTINGS.port),
    ]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "bentoml", *SERVE])
