"""BentoML: one worker, its adaptive batching, which learns how long to wait."""

import os
import sys
from typing import Any

import bentoml  # type: ignore[import-not-found,unused-ignore]  # in the peers' environment

from loadtest.peers.model import PeerModel
from loadtest.peers.settings import HOST, MAX_BATCH, PeerSettings

# Not a wait but a bound: BentoML refuses requests that it expects to take longer. As long as its own default, so that
# it refuses none.
MAX_LATENCY_MS = 60_000


@bentoml.service(workers=1, traffic={"timeout": MAX_LATENCY_MS / 1000})  # type: ignore[untyped-decorator,unused-ignore]
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


if __name__ == "__main__":
    SETTINGS = PeerSettings.from_arguments()
    SERVE = ["serve", "loadtest.peers.peer_bentoml:Model", "--host", HOST, "--port", str(SETTINGS.port)]
    os.execv(sys.executable, [sys.executable, "-P", "-m", "bentoml", *SERVE])
