"""An ONNX Runtime session on a GPU: its options, how batches get there, and its CUDA graphs."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch

from handlers.cuda_graphs import CudaGraphs
from handlers.errors import BackendError
from handlers.onnx_binding import BoundSession
from handlers.onnx_recorder import CAPTURING, OnnxRecorder
from handlers.signature import Signature
from handlers.staging import Staging
from handlers.tensors import Array, TensorBatch

logger = logging.getLogger("torchport")

# See https://github.com/microsoft/onnxruntime/pull/32121.
_FIRST_WITH_GRAPHS = (1, 31)


class OnnxOnGpu:
    """Runs a session on a GPU. The usual shapes of batches are replayed as CUDA graphs.

    Args:
        open_session: Opens a session with options of the CUDA provider.
        signature: Inputs and outputs.
        gpu: Which GPU.
        memory_bytes: The most of its memory that the session may take; None for no limit.
        max_batch: Samples of the largest batch that graphs are captured for; 0 for no graphs.

    Raises:
        BackendError: If the session does not open.
    """

    def __init__(
        self,
        open_session: Callable[[Mapping[str, str]], Any],
        signature: Signature,
        *,
        gpu: int,
        memory_bytes: int | None,
        max_batch: int,
    ) -> None:
        self._open = open_session
        self._signature = signature
        self._gpu = gpu
        self._staging = _staging(signature, gpu)
        options = cuda_options(gpu, memory_bytes=memory_bytes)
        self._graphs: CudaGraphs | None = None
        if self._staging is not None and max_batch and _replays_rightly():
            self._capture(options, self._staging, max_batch)
        if self._graphs is None:
            self._session = self._bound(options)

    def _capture(self, options: Mapping[str, str], staging: Staging, max_batch: int) -> None:
        """Open a session that captures, and keep it if it does: one whose capture failed may not compute any more."""
        try:
            session = self._bound({**options, **CAPTURING})
        except BackendError as error:
            logger.warning("the model runs without CUDA graphs, since it cannot be captured: %s", error)
            return
        recorder = OnnxRecorder(session, torch.device("cuda", self._gpu))
        graphs = CudaGraphs(self._signature, staging, recorder, max_batch=max_batch)
        if graphs.captured:
            self._session, self._graphs = session, graphs

    def _bound(self, options: Mapping[str, str]) -> BoundSession:
        return BoundSession(self._open(options), self._signature, device="cuda", index=self._gpu)

    @property
    def lanes(self) -> int:
        """Batches under way at once."""
        return 1 if self._staging is None else self._staging.lanes

    def run(self, batch: TensorBatch) -> dict[str, Array]:
        """Compute one batch; see :class:`handlers.backend.Backend`."""
        outputs = self._graphs.run(batch) if self._graphs else None
        if outputs is not None:
            return outputs
        if self._staging is None:
            results = self._session.run(self._session.bind_host(batch))
        else:
            # ONNX Runtime computes on a stream of its own, which does not wait for torch's.
            with self._staging.lent(batch) as tensors:
                results = self._session.run(self._session.bind_device(tensors))
        return {spec.name: result for spec, result in zip(self._signature.outputs, results, strict=True)}


def _replays_rightly() -> bool:
    """Whether this ONNX Runtime keeps what its graphs read of the host: others free it after the capture."""
    import onnxruntime  # noqa: PLC0415  # only ONNX archives need it

    release = re.match(r"(\d+)\.(\d+)", onnxruntime.__version__)
    if release is not None and (int(release[1]), int(release[2])) >= _FIRST_WITH_GRAPHS:
        return True
    logger.warning(
        "the model runs without CUDA graphs, which ONNX Runtime %s replays wrongly; install %d.%d or newer",
        onnxruntime.__version__,
        *_FIRST_WITH_GRAPHS,
    )
    return False


def cuda_options(gpu: int, *, memory_bytes: int | None = None) -> dict[str, str]:
    """The options of ONNX Runtime's CUDA provider.

    Args:
        gpu: Which GPU.
        memory_bytes: The most memory that its arena may have; None for no limit.
    """
    options = {
        "device_id": str(gpu),
        # By default it tries every algorithm for every new shape, and batches have many.
        "cudnn_conv_algo_search": "HEURISTIC",
        # By default memory grows in powers of two, which other workers on the GPU would miss.
        "arena_extend_strategy": "kSameAsRequested",
        # As in torch (handlers/torch_device.py): fp32 means fp32.
        "use_tf32": "0",
    }
    if memory_bytes is not None:
        options["gpu_mem_limit"] = str(memory_bytes)
    return options


def _staging(signature: Signature, gpu: int) -> Staging | None:
    """How batches get to the GPU: as torch does it, if it is a torch for GPUs."""
    return Staging.on(torch.device("cuda", gpu), signature) if torch.cuda.is_available() else None
