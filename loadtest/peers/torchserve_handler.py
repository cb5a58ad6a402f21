"""The plain handler of stock TorchServe: a batch in arrival order, an answer a row.

TorchServe imports this file by its bare name out of the archive and wants exactly one class in it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from loadtest.peers import model, settings


class Handler:
    """The model behind stock TorchServe."""

    def initialize(self, context: Any) -> None:
        """Loads the model in the worker."""
        given = settings.PeerSettings.from_environment()
        self._model = model.PeerModel.load(given)
        self._files = given.files

    def handle(self, data: Sequence[Mapping[str, Any]], context: Any) -> list[dict[str, Any]]:
        """A batch's replies."""
        return self._model.predict([self._decode(row.get("body") or row.get("data")) for row in data])

    def _decode(self, body: Any) -> Any:
        if self._files:
            return self._model.decode_file(bytes(body))
        return self._model.decode(json.loads(body) if isinstance(body, bytes | bytearray) else body)
