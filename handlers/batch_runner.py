"""Runs batches: in turn with other workers, metered, and halved when they fail."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from handlers.backend import Backend
from handlers.batching import split, stack
from handlers.errors import InferenceError, RequestError, defect
from handlers.gpu_memory import BatchCeilings, is_out_of_memory, let_go
from handlers.metrics import BATCH_SAMPLES, PADDING_SHARE, SAMPLES, STAGE_SECONDS, Meter
from handlers.planner import padding_share, positions
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch

logger = logging.getLogger("torchport")

Row = dict[str, Array] | RequestError
"""One sample's outputs by name, or why there are none."""


class BatchRunner:
    """Runs batches on a backend; as many threads may as the backend has lanes.

    Args:
        signature: Inputs and outputs.
        backend: What computes.
        meter: Counts what happens.
        slot: Held while the model computes; None where nobody has to wait.

    Attributes:
        ceilings: What was learned about batches that the memory did not hold.
    """

    def __init__(
        self,
        signature: Signature,
        backend: Backend,
        meter: Meter,
        slot: AbstractContextManager[object] | None = None,
    ) -> None:
        self.ceilings = BatchCeilings()
        self._signature = signature
        self._backend = backend
        self._meter = meter
        self._slot = slot or nullcontext()
        # By thread, when it began with the batch that it computes, on the monotonic clock.
        self._began: dict[int, float] = {}

    @property
    def busy_since(self) -> float | None:
        """When the oldest of the batches that are computed now began, on the monotonic clock; None between batches."""
        return min(list(self._began.values()), default=None)

    def run(self, batches: Sequence[list[TensorBatch]]) -> list[Row]:
        """Run one batch after the other, without leaving the slot.

        Args:
            batches: Samples that run together. They are stacked one batch at a time: all of them may be more than the
                memory holds.

        Returns:
            The rows of all samples, in order.
        """
        waiting = time.perf_counter()
        with self._slot:
            self._meter.observe(STAGE_SECONDS, time.perf_counter() - waiting, (("stage", "wait"),))
            return [row for samples in batches for row in self._run_metered(samples)]

    def _run_metered(self, samples: list[TensorBatch]) -> list[Row]:
        thread = threading.get_ident()
        self._began[thread] = began = time.monotonic()
        try:
            rows = self._run(samples)
        finally:
            del self._began[thread]
        self._meter.observe(STAGE_SECONDS, time.monotonic() - began, (("stage", "compute"),))
        self._meter.count(SAMPLES, len(samples))
        self._meter.observe(BATCH_SAMPLES, len(samples))
        self._meter.observe(PADDING_SHARE, padding_share(samples, self._signature))
        return rows

    def _run(self, samples: list[TensorBatch]) -> list[Row]:
        """Run one batch; when it fails, halve it, so that only the samples that fail alone are lost.

        What fails for want of the GPU's memory is not tried again at that size.
        """
        short = False
        try:
            outputs = self._backend.run(stack(samples, self._signature))
            return list(split(outputs, samples, self._signature))
        except Exception as error:  # runtimes raise types of their own; one sample must not fail its neighbours
            short = self._backend.device == "cuda" and is_out_of_memory(error)
            if len(samples) == 1:
                return [self._lost(error, short=short)]
            middle = len(samples) // 2
        # Outside of the clause: the error holds what the failed run had allocated, which the halves may need.
        if short:
            self._backend.free_memory()
            self._lower_ceiling(samples)
        return self._run(samples[:middle]) + self._run(samples[middle:])

    def _lost(self, error: Exception, *, short: bool) -> InferenceError:
        """The error of a sample that fails alone."""
        if not short:
            return defect("inference_failed", "The model failed on this input.", error)
        # The error is kept until it is answered and logged; what its calls had allocated is needed before.
        let_go(error)
        self._backend.free_memory()
        return defect(
            "out_of_memory",
            "The GPU has too little free memory for this input alone; send a smaller one, or try again later.",
            error,
        )

    def _lower_ceiling(self, samples: list[TensorBatch]) -> None:
        length = positions(samples, self._signature)
        most = self.ceilings.lower(len(samples), length)
        logger.warning(
            "the GPU's memory did not hold a batch of %d samples with %d positions each; "
            "such batches have at most %d from now on, until the worker is started again",
            len(samples),
            length,
            most,
        )
