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
from handlers.tensors import TensorBatch
from handlers.warm_up import warm_up
from loadtest.peers.settings import MAX_BATCH, PeerSettings

JSON = "application/json"
# The decoder then looks what it is; peers do not hand the header on.
UNDECLARED = ""


class PeerDecoder:
    """Reads requests as torchport does, with or without the model.

    Args:
        signature: What the model takes.
        folder: Where the archive's files lie; models of texts find their tokenizer there.
    """

    def __init__(self, signature: Signature, folder: Path) -> None:
        self._decoder = build_decoder(signature, max_samples=1, folder=folder)

    @classmethod
    def load(cls, settings: PeerSettings) -> Self:
        """The decoder of an archive."""
        return cls(_read_signature(settings.folder), settings.folder)

    def decode(self, document: object) -> Decoded:
        """Reads one request of JSON.

        Args:
            document: The request's body as a JSON value: ``{"instances": [sample]}``.
        """
        return self._decoder.decode([Part(value=document, content_type=JSON)])

    def decode_file(self, data: bytes) -> Decoded:
        """Reads one request that is a file: the same Pillow calls as in torchport.

        Args:
            data: The request's body, a JPEG or PNG file.
        """
        return self._decoder.decode([Part(value=data, content_type=UNDECLARED)])


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
        self._decoder = PeerDecoder(signature, folder)
        self._answerer = Answerer(signature)

    @classmethod
    def load(cls, settings: PeerSettings) -> Self:
        """Loads the model and runs every batch size once, as a worker of torchport does before it is ready."""
        signature = _read_signature(settings.folder)
        backend = build_backend(signature, settings.folder, threads=settings.threads)
        warm_up(backend, signature, MAX_BATCH)
        return cls(signature, backend, settings.folder)

    def decode(self, document: object) -> Decoded:
        """Reads one request of JSON; see `PeerDecoder.decode`."""
        return self._decoder.decode(document)

    def decode_file(self, data: bytes) -> Decoded:
        """Reads one request that is a file; see `PeerDecoder.decode_file`."""
        return self._decoder.decode_file(data)

    def predict(self, requests: Sequence[Decoded]) -> list[dict[str, Any]]:
        """Answers a batch, which is padded to its longest sample.

        Returns:
            What torchport answers, for each request: ``{"predictions": [prediction]}`` to JSON, else the prediction.
        """
        samples = [sample for request in requests for sample in request.samples]
        return self.answer(requests, self.compute(self.stack(samples)))

    def stack(self, samples: Sequence[TensorBatch]) -> TensorBatch:
        """The batch of some samples, padded."""
        return stack(samples, self._signature)

    def compute(self, batch: TensorBatch) -> TensorBatch:
        """The artifact's outputs."""
        return self._backend.run(batch)

    def answer(self, requests: Sequence[Decoded], outputs: TensorBatch) -> list[dict[str, Any]]:
        """The answers of a batch of requests with one sample each."""
        samples = [sample for request in requests for sample in request.samples]
        rows = split(outputs, samples, self._signature)
        return [self._answerer.answer(request, [row], {}) for request, row in zip(requests, rows, strict=True)]


def _read_signature(folder: Path) -> Signature:
    return Signature.from_document(json.loads((folder / SIGNATURE_FILE).read_bytes()))
