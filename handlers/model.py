"""A served model: everything from request bodies to answers, without TorchServe.

The worker, the export gates, ``torchport inspect --verify`` and in-process measurements all run this same code.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.allocator import keep_freed_memory
from handlers.answering import Answerer
from handlers.backend import Backend, build_backend
from handlers.batch_runner import BatchRunner, Row
from handlers.cost import CostModel, measure_cost
from handlers.decoder import Decoded, build_decoder
from handlers.errors import BackendError, GoldenError, LoadError, RequestError, SignatureError, defect
from handlers.golden import GoldenSet
from handlers.gpu_memory import MemoryWatch, watch_memory
from handlers.jpeg_batches import JpegBatches, build_jpeg_batches
from handlers.metrics import STAGE_SECONDS, Meter
from handlers.planner import in_turn, plan, positions
from handlers.preemption import interrupt_nobody
from handlers.request import Part
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch
from handlers.warm_up import plain_batch, warm_up

logger = logging.getLogger("torchport")

SIGNATURE_FILE = "signature.json"
DEFAULT_MAX_BATCH = 32
MAX_SAMPLES_PER_REQUEST = 256
_COST_LIMIT_S = 1.0
_MOST_DECODERS = 8
# See docs/decisions/014 for what was measured.
_QUICK_S = 0.0005


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
        slot: Held while the model computes; by default nobody has to wait.
        decoding: Requests that are decoded at once; more than one pays for images, whose codecs leave Python alone.
        memory: Watches the GPU's memory since before the backend was loaded; None on the CPU.
        jpeg: Decodes JPEG files on the GPU; None for the CPU.

    Attributes:
        meter: Counts what happens.
        decoders: Threads that decode; None where the caller's own does.

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
        slot: AbstractContextManager[object] | None = None,
        decoding: int = 1,
        memory: MemoryWatch | None = None,
        jpeg: JpegBatches | None = None,
    ) -> None:
        self.signature = signature
        self.backend = backend
        self.meter = Meter()
        self._runner = BatchRunner(signature, backend, self.meter, slot)
        self.decoders = ThreadPoolExecutor(decoding, "torchport-decode", interrupt_nobody) if decoding > 1 else None
        # Until it is measured: calls alone cost, so batches are as few as they can be.
        self._cost = CostModel()
        self._max_batch = max_batch
        self._memory = memory
        self._identity = identity or {}
        self._decoder = build_decoder(signature, max_samples=MAX_SAMPLES_PER_REQUEST, folder=folder, jpeg=jpeg)
        self._answerer = Answerer(signature)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        threads: int,
        max_batch: int = DEFAULT_MAX_BATCH,
        identity: dict[str, str] | None = None,
        slot: AbstractContextManager[object] | None = None,
        decoding: int = 1,
        gpu: int | None = None,
        gpu_memory_bytes: int | None = None,
        jpeg_on_gpu: bool = False,
        cuda_graphs: bool = True,
    ) -> ServedModel:
        """Load an extracted archive; see :func:`handlers.digests.verify_folder` for its digests.

        Args:
            folder: The archive's files.
            threads: Intra-op threads.
            max_batch: See the class, as for what follows.
            identity: Fields of every answer.
            slot: Held while the model computes.
            decoding: 0 for as many as suit what the model takes and this machine.
            gpu: Which GPU an artifact for GPUs runs on; None for the runtime's own choice.
            gpu_memory_bytes: The most of its memory that torch or ONNX Runtime may allocate; None for no limit.
            jpeg_on_gpu: Whether JPEG files are decoded there too.
            cuda_graphs: Whether CUDA graphs are captured for batches of up to the largest size.

        Raises:
            LoadError: If the signature, the tokenizer or the artifact cannot be used, or the GPU's memory is too small;
                if JPEG files are to be decoded on a GPU, and cannot be.
        """
        try:
            signature = Signature.from_document(json.loads((folder / SIGNATURE_FILE).read_bytes()))
        except (OSError, ValueError, SignatureError) as error:
            raise LoadError(f"{SIGNATURE_FILE} cannot be used: {error}") from error
        keep_freed_memory()
        memory = watch_memory(signature.artifact, gpu, gpu_memory_bytes)
        with memory.explaining("its weights") if memory else nullcontext():
            backend = build_backend(
                signature,
                folder,
                threads=threads,
                gpu=gpu,
                gpu_memory_bytes=gpu_memory_bytes,
                max_batch=max_batch if cuda_graphs else 0,
            )
        return cls(
            signature,
            backend,
            max_batch=max_batch,
            identity=identity,
            folder=folder,
            slot=slot,
            decoding=decoding or _decoders(signature),
            memory=memory,
            jpeg=build_jpeg_batches(signature.artifact, gpu) if jpeg_on_gpu and signature.image is not None else None,
        )

    def warm_up(self) -> None:
        """Run every batch size and the extremes of every axis; see :func:`handlers.warm_up.warm_up`.

        Raises:
            BackendError: If the model fails, or gives another name, shape or dtype than the signature says; or if the
                GPU's memory is too small for the largest batch.
        """
        if self._memory is None:
            warm_up(self.backend, self.signature, self._max_batch)
            return
        what = f"batches of {self._max_batch}"
        with self._memory.explaining(what):
            warm_up(self.backend, self.signature, self._max_batch)
        self._memory.check(what)

    def warm_up_beside(self) -> None:
        """Run the same in another thread that will compute: CUDA's libraries keep plans and handles for each thread.

        Nothing that fails here keeps the worker from serving: it was warmed up before, and batches that the memory does
        not hold are halved.
        """
        try:
            warm_up(self.backend, self.signature, self._max_batch)
        except BackendError as error:
            logger.warning("a second thread that computes could not be warmed up: %s", error)

    def measure_cost(self, *, limit_s: float = _COST_LIMIT_S) -> CostModel:
        """Time small batches, and plan by what they cost from now on.

        Args:
            limit_s: About how many seconds to take.
        """
        self._cost = measure_cost(
            lambda size, sizes: self.backend.run(plain_batch(self.signature, size, sizes)),
            self.signature,
            self._max_batch,
            limit_s=limit_s,
        )
        return self._cost

    @property
    def busy_since(self) -> float | None:
        """When the oldest of the batches that are computed now began, on the monotonic clock; None between batches."""
        return self._runner.busy_since

    def wants_one_thread(self) -> bool:
        """Whether decoding, computing and answering should take turns in one thread.

        They should where the runtime does not let other threads run meanwhile, and where a sample of usual size, in a
        full batch, takes less to compute than to hand it to another thread. While a GPU computes, the CPU has nothing
        else to do.
        """
        if self.backend.holds_lock:
            return True
        if self.backend.device != "cpu":
            return False
        sizes = [(axis.minimum + axis.maximum) / 2 for axis in self.signature.axes.values()]
        return bool(self._cost.seconds(self._max_batch, math.prod(sizes)) < self._max_batch * _QUICK_S)

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
        began = time.perf_counter()
        decoded = list((self.decoders.map if self.decoders else map)(self.read, requests))
        self.meter.observe(STAGE_SECONDS, time.perf_counter() - began, (("stage", "decode"),))
        rows = self.compute([sample for item in decoded if isinstance(item, Decoded) for sample in item.samples])
        answers = []
        start = 0
        for item in decoded:
            if isinstance(item, RequestError):
                answers.append(error_answer(item))
                continue
            stop = start + len(item.samples)
            answers.append(self.build_answer(item, rows[start:stop]))
            start = stop
        return answers

    def decode(self, parts: Sequence[Part]) -> list[TensorBatch]:
        """The samples of one request, for comparisons with other ways to compute them.

        Raises:
            RequestError: If the request is not valid.
        """
        return self._decoder.decode(parts).samples

    def compute(self, samples: Sequence[TensorBatch]) -> list[Row]:
        """Run samples, in the batches that cost least; see :func:`handlers.planner.plan`.

        Args:
            samples: Inputs by name, without the batch axis.

        Returns:
            In order, each sample's outputs by name without the batch axis, or the error of a sample that fails alone.
        """
        if not samples:
            return []
        batches = self.plan(samples)
        found = self._runner.run([[samples[i] for i in indices] for indices in batches])
        rows = dict(zip(itertools.chain.from_iterable(batches), found, strict=True))
        return [rows[i] for i in range(len(samples))]

    def plan(self, samples: Sequence[TensorBatch]) -> list[list[int]]:
        """Which samples should run together: positions, see :func:`handlers.planner.plan`."""
        batches = plan(samples, self.signature, self._cost, max_batch=self._max_batch)
        return self._runner.ceilings.cut(batches, lambda batch: positions([samples[i] for i in batch], self.signature))

    def plan_in_turn(self, samples: Sequence[TensorBatch], waited: Sequence[float]) -> list[list[int]]:
        """The same, in the order in which the batches should run; see :func:`handlers.planner.in_turn`.

        Args:
            samples: Inputs by name.
            waited: Seconds that each has waited.
        """
        return in_turn(self.plan(samples), samples, waited, self.signature, self._cost)

    def expected_seconds(self, samples: Sequence[TensorBatch]) -> float:
        """How long a batch of these samples takes, if the cost was measured."""
        return float(self._cost.seconds(len(samples), positions(samples, self.signature)))

    def run(self, samples: list[TensorBatch]) -> list[Row]:
        """Run one batch, which :meth:`plan` has chosen; see :meth:`compute`."""
        return self._runner.run([samples])

    def read(self, parts: Sequence[Part]) -> Decoded | RequestError:
        """Decode one request; its error is returned, so that it stays with its request."""
        try:
            return self._decoder.decode(parts)
        except RequestError as error:
            return error
        except Exception as error:  # our own defect, and still one request's alone
            return defect("request_failed", "The server failed to read this request.", error)

    def build_answer(self, decoded: Decoded, rows: Sequence[Row]) -> Answer:
        """The answer of a request, given the row of each of its samples."""
        outputs = []
        for row in rows:
            if isinstance(row, RequestError):
                return error_answer(row, open_protocol=decoded.reply is not None)
            outputs.append(row)
        try:
            body = self._answerer.answer(decoded, outputs, self._identity)
        except RequestError as error:
            return error_answer(error, open_protocol=decoded.reply is not None)
        except Exception as error:  # as in reading
            failure = defect("answer_failed", "The server failed to answer this request.", error)
            return error_answer(failure, open_protocol=decoded.reply is not None)
        return Answer(body=body, outputs=tuple(outputs))


def _decoders(signature: Signature) -> int:
    """How many requests to decode at once, on the cores that this process may use."""
    if signature.image is None:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_DECODERS, cores)


def error_answer(error: RequestError, *, open_protocol: bool = False) -> Answer:
    """The answer of a request that failed; see :meth:`handlers.errors.RequestError.document`."""
    return Answer(body=error.document(open_protocol=open_protocol), error=error)
