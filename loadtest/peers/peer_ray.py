"""Ray Serve: replicas on a local Ray, `serve.batch` with its default wait of 10 ms."""

import os
import secrets
import signal
import tempfile
from typing import Any

import ray  # type: ignore[import-not-found,unused-ignore]  # in the peers' environment
from ray import serve  # type: ignore[import-not-found,unused-ignore]
from starlette.requests import Request  # type: ignore[import-not-found,unused-ignore]

from handlers.decoder import Decoded
from loadtest.peers.model import PeerModel
from loadtest.peers.settings import HOST, MAX_BATCH, PeerSettings

BATCH_WAIT_S = 0.01
# Ray's default of 5 would keep batches from ever filling.
MAX_ONGOING = 1024
# The least that Ray allows is 75 MiB; a request and its answer are a few kilobytes.
OBJECT_STORE_BYTES = 128 << 20


@serve.deployment(  # type: ignore[untyped-decorator,unused-ignore]
    max_ongoing_requests=MAX_ONGOING, ray_actor_options={"num_cpus": 1}
)
class Model:
    """The model behind Ray Serve."""

    def __init__(self, settings: PeerSettings) -> None:
        self._model = PeerModel.load(settings)
        self._files = settings.files

    @serve.batch(  # type: ignore[untyped-decorator,unused-ignore]
        max_batch_size=MAX_BATCH, batch_wait_timeout_s=BATCH_WAIT_S
    )
    async def _predict(self, requests: list[Decoded]) -> list[dict[str, Any]]:
        return self._model.predict(requests)

    async def __call__(self, request: Request) -> dict[str, Any]:
        """One request's answer."""
        model = self._model
        decoded = model.decode_file(await request.body()) if self._files else model.decode(await request.json())
        answer: dict[str, Any] = await self._predict(decoded)
        return answer


if __name__ == "__main__":
    SETTINGS = PeerSettings.from_arguments()
    # A token for this one run; without it Ray makes one and leaves it in the user's home.
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    # The proxy and the controller need a share of a CPU each, which says nothing about cores: Ray counts, it pins
    # nothing.
    ray.init(
        num_cpus=3 + SETTINGS.workers,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=OBJECT_STORE_BYTES,
        _temp_dir=f"{tempfile.gettempdir()}/ray",
    )
    serve.start(http_options={"host": HOST, "port": SETTINGS.port})
    serve.run(Model.options(num_replicas=SETTINGS.workers).bind(SETTINGS), route_prefix="/predict")  # type: ignore[attr-defined,unused-ignore]
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()
