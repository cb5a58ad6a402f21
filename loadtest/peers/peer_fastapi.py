"""FastAPI as most services use it: no batching, a thread a request.

`def`, not `async def`, as its documentation says for work that does not await: FastAPI then runs it in a thread pool,
and the threads compute side by side on as many cores as there are.
"""

from typing import Annotated, Any

import uvicorn  # type: ignore[import-not-found,unused-ignore]  # in the peers' environment
from fastapi import Body, FastAPI  # type: ignore[import-not-found,unused-ignore]

from loadtest.peers.model import PeerModel
from loadtest.peers.settings import HOST, PeerSettings


def build_app(model: PeerModel, *, files: bool) -> FastAPI:
    """The application.

    Args:
        model: What it serves.
        files: Whether a body is an image, and not JSON.
    """
    app = FastAPI()
    if files:

        @app.post("/predict")  # type: ignore[untyped-decorator,unused-ignore]
        def predict_file(image: Annotated[bytes, Body(media_type="image/jpeg")]) -> dict[str, Any]:
            (answer,) = model.predict([model.decode_file(image)])
            return answer

        return app

    @app.post("/predict")  # type: ignore[untyped-decorator,unused-ignore]
    def predict(body: dict[str, Any]) -> dict[str, Any]:
        (answer,) = model.predict([model.decode(body)])
        return answer

    return app


if __name__ == "__main__":
    SETTINGS = PeerSettings.from_arguments()
    uvicorn.run(
        build_app(PeerModel.load(SETTINGS), files=SETTINGS.files), host=HOST, port=SETTINGS.port, log_level="warning"
    )
