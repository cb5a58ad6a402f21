"""A served model: everything from request bodies to answers, without TorchServe.

The worker, the export gates, ``torchport inspect --verify`` and in-process measurements all run this same code.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.answering import build_answerer
from handlers.backend import Backend, build_backend
from handlers.batching import group, split, stack
from handlers.decoder import Decoded, build_decoder
from handlers.errors import GoldenError, InferenceError, LoadError, RequestError, SignatureError
from handlers.golden import GoldenSet
from handlers.request import Part
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch
from handlers.warm_up import warm_up

SIGNATURE_FILE = "signature.json"
DEFAULT_MAX_BATCH = 32
MAX_SAMPLES_PER_REQUEST = 256

Row = dict[str, Array] | InferenceError
"""One sample's outputs by name, or why there are none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What one request gets.

    Attributes:
        body: The JSON document.
        error: Why there is no prediction; None when there is one.
        outputs: For each sample, the model's raw outputs by name, for comparisons; empty for errors.
    """

    body: dict[str, Any]
    error: RequestError | None = None
    outputs: tuple[dict[str, Array], ...] = ()


class ServedModel:
    """A loaded model that answers batches of requests.

    Args:
        signature: What it takes and gives.
        backend: What computes it.
        max_batch: Samples computed at once; larger batches run in pieces.
        identity: Fields that every answer carries, such as model and version.
        folder: Where the archive's files lie; models of texts find their tokenizer there.

    Raises:
        LoadError: If the tokenizer cannot be used.
    """

    def __init__(
        self,
        signature: Signature,
        backend: Backend,
        *,
        max_batch: int = DEFAULT_MAX_BATCH,
        identity: dict[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.signature = signature
        self.backend = backend
        self._max_batch = max_batch
        self._identity = identity or {}
        self._decoder = build_decoder(signature, max_samples=MAX_SAMPLES_PER_REQUEST, folder=folder)
        self._answerer = build_answerer(signature)

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
            LoadError: If the signature, the tokenizer or the artifact cannot be used.
        """
        try:
            signature = Signature.from_document(json.loads((folder / SIGNATURE_FILE).read_bytes()))
        except (OSError, ValueError, SignatureError) as error:
            raise LoadError(f"{SIGNATURE_FILE} cannot be used: {error}") from error
        backend = build_backend(signature, folder, threads=threads)
        return cls(signature, backend, max_batch=max_batch, identity=identity, folder=folder)

    def warm_up(self) -> None:
        """Run every batch size and the extremes of every axis; see :func:`handlers.warm_up.warm_up`.

        Raises:
            BackendError: If the model fails, or gives another name, shape or dtype than the signature says.
        """
        warm_up(self.backend, self.signature, self._max_batch)

    def replay(self, folder: Path) -> float:
        """Answer the golden samples of an extracted archive and compare.

        Returns:
            The largest absolute difference of an output from the checkpoint's.

        Raises:
            GoldenError: If an answer differs beyond the tolerances.
        """
        golden = GoldenSet.load(folder)
        outputs: list[dict[str, Array]] = []
        labels: list[str | None] = []
        for sample in golden.samples:
            try:
                body = (folder / sample.file).read_bytes()
            except OSError as error:
                raise GoldenError(f"{sample.file} cannot be read: {error.strerror}") from error
            (answer,) = self.answer([[Part(value=body, content_type=sample.content_type)]])
            if answer.error is not None:
                raise GoldenError(f"{sample.file} is refused: {answer.error.message}") from answer.error
            if len(answer.outputs) != 1 or "predictions" in answer.body:
                raise GoldenError(f"{sample.file} holds a list of samples; a golden file holds one, not in a list")
            outputs.append(answer.outputs[0])
            labels.append(answer.body.get("label"))
        return golden.check(folder, outputs, labels)

    def answer(self, requests: Sequence[Sequence[Part]]) -> list[Answer]:
        """Answer a batch of requests, in order; an error in one leaves the others alone.

        Args:
            requests: For each request, its fields.
        """
        decoded = [self._decode(parts) for parts in requests]
        rows = self.compute([sample for item in decoded if isinstance(item, Decoded) for sample in item.samples])
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

    def decode(self, parts: Sequence[Part]) -> list[TensorBatch]:
        """The samples of one request, for comparisons with other ways to compute them.

        Raises:
            RequestError: If the request is not valid.
        """
        return self._decoder.decode(parts).samples

    def compute(self, samples: Sequence[TensorBatch]) -> list[Row]:
        """Run samples, in batches of at most the largest size.

        Args:
            samples: Inputs by name, without the batch axis.

        Returns:
            In order, each sample's outputs by name without the batch axis, or the error of a sample that fails alone.
        """
        rows: dict[int, Row] = {}
        for indices in group(samples, self.signature, self._max_batch):
            rows.update(zip(indices, self._run([samples[i] for i in indices]), strict=True))
        return [rows[i] for i in range(len(samples))]

    def _decode(self, parts: Sequence[Part]) -> Decoded | RequestError:
        """Decode one request; its error is returned, so that it stays with its request."""
        try:
            return self._decoder.decode(parts)
        except RequestError as error:
            return error

    def _run(self, samples: list[TensorBatch]) -> list[Row]:
        """Run one batch; when it fails, halve it, so that only the samples that fail alone are lost."""
        try:
            outputs = self.backend.run(stack(samples, self.signature))
            return list(split(outputs, samples, self.signature))
        except Exception as error:  # runtimes raise types of their own; one sample must not fail its neighbours
            if len(samples) == 1:
                failure = InferenceError("inference_failed", "The model failed on this input.")
                failure.__cause__ = error
                return [failure]
            middle = len(samples) // 2
        # Outside of the clause: the error holds what the failed run had allocated, which the halves may need.
        return self._run(samples[:middle]) + self._run(samples[middle:])

    def _build_answer(self, rows: Sequence[Row], *, many: bool) -> Answer:
        predictions = []
        outputs = []
        try:
            for row in rows:
                if isinstance(row, InferenceError):
                    raise row
                predictions.append(self._answerer(row))
                outputs.append(row)
        except InferenceError as error:
            return error_answer(error)
        body = {"predictions": predictions} if many else predictions[0]
        return Answer(body={**body, **self._identity}, outputs=tuple(outputs))


def error_answer(error: RequestError) -> Answer:
    """The answer of a request that failed."""
    return Answer(body={"error": {"code": error.code, "message": error.message}}, error=error)
