"""The AOTInductor backend: machine code that torch compiled at export, in a ``.pt2`` package."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from handlers.compiled_container import CompiledContainer
from handlers.cuda_graphs import CudaGraphs
from handlers.cuda_recorder import CudaRecorder
from handlers.errors import BackendError, one_line
from handlers.signature import Signature
from handlers.staging import DirectExchange, Exchange, Staging
from handlers.tensors import Array, TensorBatch
from handlers.torch_device import check_device, free_cached, torch_device

# What aoti_compile_and_package calls the one model of a package.
_MODEL = "model"


class Pt2Backend:
    """Runs a compiled package. It takes tensors in the signature's order and gives them in the signature's order.

    On a GPU the usual shapes of batches are replayed as CUDA graphs.

    Check the artifact's requirements first: code for another torch or processor kills the process.

    Args:
        path: The ``.pt2`` file.
        signature: The order of inputs and outputs.
        device: ``cpu`` or ``cuda``.
        threads: Intra-op threads of this process.
        gpu: Which GPU; None for torch's current one.
        max_batch: Samples of the largest batch that CUDA graphs are captured for; 0 for no graphs.

    Attributes:
        holds_lock: Whether other threads of Python stand still while it computes. On a GPU they do not: calling it only
            launches what is to be computed.

    Raises:
        BackendError: If the file does not load, was compiled for another device, or the device is missing.
    """

    def __init__(
        self,
        path: Path,
        signature: Signature,
        *,
        device: str,
        threads: int,
        gpu: int | None = None,
        max_batch: int = 0,
    ) -> None:
        torch.set_num_threads(threads)
        self._device = torch_device(device, gpu)
        # Read when a package loads: tensors of a wrong shape or dtype then raise, instead of ending the process.
        os.environ["AOTI_RUNTIME_CHECK_INPUTS"] = "1"
        try:
            # What torch._inductor.aoti_load_package ends in. That function first compiles and runs small programs to
            # name the processor's vector width: it takes seconds, and logs a misleading warning without a compiler.
            index = -1 if self._device.index is None else self._device.index
            # For a GPU without a look whether the last batch is done, which may not be asked during a capture, and for
            # which a batch would wait with Python's lock. One thread at a time launches, and the stream has the order.
            unwatched = device != "cpu"
            loader = torch._C._aoti.AOTIModelPackageLoader(str(path), _MODEL, unwatched, 1, index)
            compiled_for = loader.get_metadata().get("AOTI_DEVICE_KEY")
        except (RuntimeError, AttributeError) as error:
            raise BackendError(
                f"{path.name} is not a pt2 package that torch {torch.__version__} loads: {one_line(error)}"
            ) from error
        if compiled_for != device:
            raise BackendError(
                f"{path.name} was compiled for {compiled_for}, and the signature says {device}; export it again"
            )
        container = CompiledContainer.of_package(path) if device == "cpu" else None
        # Not both: each has a copy of the weights.
        self._call: Callable[[list[torch.Tensor]], list[torch.Tensor]] = (
            loader.run if container is None else container.run
        )
        self.holds_lock = container is None and device == "cpu"
        self._exchange: Exchange
        self._graphs: CudaGraphs | None = None
        if device == "cpu":
            self._exchange = DirectExchange(signature)
            return
        self._exchange = staging = Staging.on(self._device, signature)
        if max_batch:
            recorder = CudaRecorder(self._device, self._compute, tune=not signature.axes)
            self._graphs = CudaGraphs(signature, staging, recorder, max_batch=max_batch)

    @property
    def device(self) -> str:
        """The device that it runs on."""
        return self._device.type

    @property
    def lanes(self) -> int:
        """Batches under way at once."""
        return self._exchange.lanes

    def run(self, batch: TensorBatch) -> dict[str, Array]:
        """Compute one batch; see :class:`handlers.backend.Backend`."""
        outputs = self._graphs.run(batch) if self._graphs else None
        return self._exchange.run(batch, self._compute) if outputs is None else outputs

    def _compute(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        outputs = self._call(list(tensors))
        # A package does not show where its weights lie; what it computes lies beside them.
        check_device(outputs, self._device)
        return outputs

    def free_memory(self) -> None:
        """Give back what torch keeps; see :class:`handlers.backend.Backend`."""
        free_cached(self._device)
