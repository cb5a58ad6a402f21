"""A served model: everything from request bodies to answers, without TorchServe.

The worker, the export gates, ``torchport inspect --verify`` and in-process measurements all run this same code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.backend import Backend, build_backend
from handlers.classification import Classifier
from handlers.errors import (
    BackendError,
    GoldenError,
    InferenceError,
    LoadError,
    RequestError,
    SignatureError,
    one_line,
)
from handlers.golden import GoldenSet
from handlers.image import FloatArray, ImageDecoder
from handlers.request import Part, parse_request
from handlers.signature import Signature

SIGNATURE_FILE = "signature.json"
DEFAULT_MAX_BATCH = 32
MAX_SAMPLES_PER_REQUEST = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one request gets.

    Attributes:
        body: The JSON document.
        error: Why there is no prediction; None when there is one.
        outputs: The model's raw output rows, one a sample, for comparisons; empty for errors.
    """

    body: dict[str, Any]
    error: RequestError | None = None
    outputs: tuple[NDArray[np.float32], ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Decoded:
    """The samples of one valid request, ``[samples, ...]``."""

    samples: FloatArray
    many: bool


class ServedModel:
    """A loaded model that answers batches of requests.

    Args:
        signature: What it takes and gives.
        backend: What computes it.
        max_batch: Samples computed at once; larger batches run in pieces.
        identity: Fields that every answer carries, such as model and version.
    """

    def __init__(
        self,
        signature: Signature,
        backend: Backend,
        *,
        max_batch: int = DEFAULT_MAX_BATCH,
        identity: dict[str, str] | None = None,
    ) -> None:
        self.signature = signature
        self.backend = backend
        self._max_batch = max_batch
        self._identity = identity or {}
        self._decoder = ImageDecoder(signature.image, max_samples=MAX_SAMPLES_PER_REQUEST)
        self._classifier = Classifier(signature.labels)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        threads: int,
        max_batch: int = DEFAULT_MAX_BATCH,
        identity: dict[str, str] | None = None,
    ) -> ServedModel:
        """Load an extracted archive; see :func:`handlers.digests.verify_folder` for its digests.

        Raises:
            LoadError: If the signature or the artifact cannot be used.
        """
        try:
            signature = Signature.from_document(json.loads((folder / SIGNATURE_FILE).read_bytes()))
        except (OSError, ValueError, SignatureError) as error:
            raise LoadError(f"{SIGNATURE_FILE} cannot be used: {error}") from error
        backend = build_backend(signature, folder, threads=threads)
        return cls(signature, backend, max_batch=max_batch, identity=identity)

    def warm_up(self) -> None:
        """Run every batch size up to the largest, in powers of two, so that no client pays for first calls.

        Raises:
            BackendError: If the model fails, or gives another shape than the signature says.
        """
        sizes = {1 << power for power in range(self._max_batch.bit_length())} | {self._max_batch}
        classes = len(self.signature.labels)
        for size in sorted(size for size in sizes if size <= self._max_batch):
            # Twice: TorchScript's profiling executor records on the first run and optimises on the second.
            for _ in range(2):
                try:
                    output = self.backend.run(self._zeros(size))
                except Exception as error:  # whatever a runtime raises here, this worker must not become ready
                    raise BackendError(f"the model fails on a batch of {size} zeros: {one_line(error)}") from error
                if output.shape != (size, classes):
                    raise BackendError(
                        f"the model gives the shape {output.shape} for a batch of {size}; "
                        f"the signature says {(size, classes)}"
                    )

    def replay(self, folder: Path) -> float:
        """Answer the golden samples of an extracted archive and compare.

        Returns:
            The largest absolute difference of an output from the checkpoint's.

        Raises:
            GoldenError: If an answer differs beyond the tolerances.
        """
        golden = GoldenSet.load(folder, self.signature.outputs[0].name)
        outputs: list[NDArray[np.float32]] = []
        labels: list[str] = []
        for sample in golden.samples:
            try:
                body = (folder / sample.file).read_bytes()
            except OSError as error:
                raise GoldenError(f"{sample.file} cannot be read: {error.strerror}") from error
            (answer,) = self.answer([[Part(value=body, content_type=sample.content_type)]])
            if answer.error is not None:
                raise GoldenError(f"{sample.file} is refused: {answer.error.message}") from answer.error
            if len(answer.outputs) != 1:
                raise GoldenError(f"{sample.file} holds {len(answer.outputs)} samples; a golden file holds one")
            outputs.append(answer.outputs[0])
            labels.append(answer.body["label"])
        return golden.check(outputs, labels)

    def answer(self, requests: Sequence[Sequence[Part]]) -> list[Answer]:
        """Answer a batch of requests, in order; an error in one leaves the others alone.

        Args:
            requests: For each request, its fields.
        """
        decoded = [self._decode(parts) for parts in requests]
        valid = [item for item in decoded if isinstance(item, _Decoded)]
        rows = self._compute(np.concatenate([item.samples for item in valid])) if valid else []
        answers = []
        start = 0
        for item in decoded:
            if isinstance(item, RequestError):
                answers.append(error_answer(item))
                continue
            stop = start + len(item.samples)
            answers.append(self._build_answer(rows[start:stop], many=item.many))
            start = stop
        return answers

    def decode(self, parts: Sequence[Part]) -> FloatArray:
        """The input tensor of one request, ``[samples, ...]``, for comparisons with other ways to compute it.

        Raises:
            RequestError: If the request is not valid.
        """
        decoded = self._decode(parts)
        if isinstance(decoded, RequestError):
            raise decoded
        return decoded.samples

    def _decode(self, parts: Sequence[Part]) -> _Decoded | RequestError:
        """Decode one request; its error is returned, so that it stays with its request."""
        try:
            parsed = parse_request(parts, max_samples=MAX_SAMPLES_PER_REQUEST)
            pieces = [self._decoder.decode(payload) for payload in parsed.payloads]
        except RequestError as error:
            return error
        samples = np.concatenate([samples for samples, _ in pieces])
        return _Decoded(samples=samples, many=parsed.many or any(many for _, many in pieces))

    def _compute(self, samples: FloatArray) -> list[NDArray[np.float32] | InferenceError]:
        """Run all samples, in pieces of the largest batch; one output row or error a sample."""
        rows: list[NDArray[np.float32] | InferenceError] = []
        for start in range(0, len(samples), self._max_batch):
            rows.extend(self._run(samples[start : start + self._max_batch]))
        return rows

    def _run(self, batch: FloatArray) -> list[NDArray[np.float32] | InferenceError]:
        """Run one batch; when it fails, halve it, so that only the samples that fail alone are lost."""
        try:
            output = self.backend.run(batch)
            if len(output) != len(batch):  # or rows would go to the wrong requests
                raise ValueError(f"the model gave {len(output)} rows for a batch of {len(batch)}")
            return list(output)
        except Exception as error:  # runtimes raise types of their own; one sample must not fail its neighbours
            if len(batch) == 1:
                failure = InferenceError("inference_failed", "The model failed on this input.")
                failure.__cause__ = error
                return [failure]
            middle = len(batch) // 2
            return self._run(batch[:middle]) + self._run(batch[middle:])

    def _build_answer(self, rows: list[NDArray[np.float32] | InferenceError], *, many: bool) -> Answer:
        predictions = []
        outputs = []
        try:
            for row in rows:
                if isinstance(row, InferenceError):
                    raise row
                predictions.append(self._classifier.answer(row))
                outputs.append(row)
        except InferenceError as error:
            return error_answer(error)
        body = {"predictions": predictions} if many else predictions[0]
        return Answer(body={**body, **self._identity}, outputs=tuple(outputs))

    def _zeros(self, size: int) -> FloatArray:
        image = self.signature.image
        return np.zeros((size, image.channels, image.height, image.width), dtype=np.float32)


def error_answer(error: RequestError) -> Answer:
    """The answer of a request that failed."""
    return Answer(body={"error": {"code": error.code, "message": error.message}}, error=error)
