"""Backends: what computes a batch. One small interface over every artifact format."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from handlers.artifact import FORMATS
from handlers.errors import BackendError
from handlers.requirements import check_requirements
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch

# Batches under way at once. A third would wait: one computes, and one is brought to the device or back.
MOST_LANES = 2


class Backend(Protocol):
    """A loaded artifact."""

    @property
    def device(self) -> str:
        """The device that it really runs on: ``cpu`` or ``cuda``."""
        ...

    @property
    def holds_lock(self) -> bool:
        """Whether other threads of Python stand still while it computes."""
        ...

    @property
    def lanes(self) -> int:
        """How many batches can be under way at once, each in a thread of its own.

        A GPU computes one batch after the other; others are copied to it and back meanwhile.
        """
        ...

    def run(self, batch: TensorBatch) -> dict[str, Array]:
        """Compute one batch. So many threads as there are lanes may call it at once.

        Args:
            batch: The signature's inputs by name, each ``[batch, ...]`` with the signature's dtype.

        Returns:
            The signature's outputs by name, each ``[batch, ...]``. Floats are float32 or float64, whatever the
            artifact's precision.
        """
        ...

    def free_memory(self) -> None:
        """Give back what the runtime keeps of a GPU's memory for later batches, after one found too little."""
        ...


def build_backend(
    signature: Signature,
    folder: Path,
    *,
    threads: int,
    gpu: int | None = None,
    gpu_memory_bytes: int | None = None,
    max_batch: int = 0,
) -> Backend:
    """Load the artifact that a signature names.

    Args:
        signature: A signature with an artifact.
        folder: Where the artifact's file lies.
        threads: Cores that one batch may use. Never "all of them": workers share the machine.
        gpu: Which GPU an artifact for GPUs runs on; None for the runtime's own choice, which is usually the first.
        gpu_memory_bytes: The most of the GPU's memory that ONNX Runtime may allocate, of which torch knows nothing;
            None for no limit.
        max_batch: Samples of the largest batch, up to which CUDA graphs are captured; 0 for no graphs.

    Raises:
        BackendError: If the runtime, its version, the device or the processor is not what the artifact needs, or the
            artifact does not load.
    """
    artifact = signature.artifact
    if artifact is None:
        raise BackendError("the signature names no artifact; export the model first")
    check_requirements(artifact)
    path = folder / artifact.file
    # Imported here so that an archive needs only the runtime of its own format.
    if artifact.format == "torchscript":
        from handlers.torchscript import TorchScriptBackend  # noqa: PLC0415

        return TorchScriptBackend(path, signature, device=artifact.device, threads=threads, gpu=gpu)
    if artifact.format == "onnx":
        from handlers.onnx import OnnxBackend  # noqa: PLC0415

        return OnnxBackend(
            path,
            signature,
            device=artifact.device,
            threads=threads,
            gpu=gpu,
            gpu_memory_bytes=gpu_memory_bytes,
            max_batch=max_batch,
        )
    if artifact.format == "pt2":
        from handlers.pt2 import Pt2Backend  # noqa: PLC0415

        return Pt2Backend(path, signature, device=artifact.device, threads=threads, gpu=gpu, max_batch=max_batch)
    if artifact.format == "eager":
        from handlers.eager import EagerBackend  # noqa: PLC0415

        return EagerBackend(path, signature, artifact, threads=threads, gpu=gpu, max_batch=max_batch)
    raise BackendError(f"there is no backend for the format {artifact.format!r}; known are: {', '.join(FORMATS)}")
