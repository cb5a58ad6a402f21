"""Backends: what computes a batch. One small interface over every artifact format."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from handlers.errors import BackendError
from handlers.signature import FORMATS, Signature


class Backend(Protocol):
    """A loaded artifact."""

    @property
    def device(self) -> str:
        """The device that it really runs on, such as ``cpu``."""
        ...

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute one batch.

        Args:
            batch: The input, ``[batch, ...]`` as in the signature.

        Returns:
            The output, ``[batch, ...]`` as in the signature.
        """
        ...


def build_backend(signature: Signature, folder: Path, *, threads: int) -> Backend:
    """Load the artifact that a signature names.

    Args:
        signature: A signature with an artifact.
        folder: Where the artifact's file lies.
        threads: Cores that one batch may use. Never "all of them": workers share the machine.

    Raises:
        BackendError: If the runtime is missing, or the artifact does not load.
    """
    artifact = signature.artifact
    if artifact is None:
        raise BackendError("the signature names no artifact; export the model first")
    path = folder / artifact.file
    # Imported here so that an archive needs only the runtime of its own format.
    if artifact.format == "torchscript":
        from handlers.torchscript import TorchScriptBackend  # noqa: PLC0415

        return TorchScriptBackend(path, threads=threads)
    if artifact.format == "onnx":
        from handlers.onnx import OnnxBackend  # noqa: PLC0415

        return OnnxBackend(path, signature, threads=threads)
    raise BackendError(f"there is no backend for the format {artifact.format!r}; known are: {', '.join(FORMATS)}")
