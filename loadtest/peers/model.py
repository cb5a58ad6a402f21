"""The model that every peer serves, with the decoding and the answers of the archive's own handlers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from handlers.answering import Answerer
from handlers.backend import Backend, build_backend
from handlers.batching import split, stack
from handlers.decoder import Decoded, build_decoder
from handlers.model import SIGNATURE_FILE
from handlers.request import Part
from handlers.signature import Signature
from handlers.warm_up import warm_up
from loadtest.peers.settings import MAX_BATCH, PeerSettings

JSON = "application/json"


class PeerModel:
    """An extracted archive's model without torchport's own batching: whatever comes together runs together.

    Args:
        signature: What it takes and gives.
        backend: What computes it.
        folder: Where the archive's files lie; models of texts find their tokenizer there.
    """

    def __init__(self, signature: Signature, backend: Backend, folder: Path) -> None:
        self._signature = signature
        self._backend = backend
        self._decoder = build_decoder(signature, max_samples=1, folder=folder)
        self._answerer = Answerer(signature)

    @classmethod
    def load(cls, settings: PeerSettings) -> Self:
        """Loads the model and runs every batch size once, as a worker of torchport does before it is ready."""
        signature = Signature.from_document(json.loads((settings.folder / SIGNATURE_FILE).read_bytes()))
        backend = build_backend(signature, settings.folder, threads=settings.threads)
        warm_up(backend, signature, MAX_BATCH)
        return cls(signature, backend, settings.folder)

    def decode(self, document: object) -> Decoded:
        """Reads one request.

        Args:
            document: The request's body as a JSON value: ``{"instances": [sample]}``.
        """
        return self._decoder.decode([Part(value=document, content_type=JSON)])

    def predict(self, requests: Sequence[Decoded]) -> list[dict[str, Any]]:
        """Answers a batch, which is padded to its longest sample.

        Returns:
            ``{"predictions": [prediction]}`` for each request, as torchport answers ``instances``.
        """
        samples = [sample for request in requests for sample in request.samples]
        outputs = self._backend.run(stack(samples, self._signature))
        rows = split(outputs, samples, self._signature)
        return [self._answerer.answer(request, [row], {}) for request, row in zip(requests, rows, strict=True)]
