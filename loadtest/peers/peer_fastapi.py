"""FastAPI as most services use it: no batching, a thread a request.

`def`, not `async def`, as its documentation says for work that does not await: FastAPI then runs it in a thread pool,
and the threads compute side by side on as many cores as there are.
"""

from typing import Any

import uvicorn  # type: ignore[import-not-found,unused-ignore]  # in the peers' environment
from fastapi import FastAPI  # type: ignore[import-not-found,unused-ignore]

from loadtest.peers.model import PeerModel
from loadtest.peers.settings import HOST, PeerSettings


def build_app(model: PeerModel) -> FastAPI:
    """The application."""
    app = FastAPI()

    @app.post("/predict")  # type: ignore[untyped-decorator,unused-ignore]
    def predict(body: dict[str, Any]) -> dict[str, Any]:
        (answer,) = model.predict([model.decode(body)])
        return answer

    return app


if __name__ == "__main__":
    SETTINGS = PeerSettings.from_arguments()
    uvicorn.run(build_app(PeerModel.load(SETTINGS)), host=HOST, port=SETTINGS.port, log_level="warning")
