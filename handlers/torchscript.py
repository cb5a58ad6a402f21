"""The TorchScript backend."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from handlers.errors import BackendError


class TorchScriptBackend:
    """Runs a traced or scripted module on the CPU.

    Args:
        path: The file that ``torch.jit.save`` wrote.
        threads: Intra-op threads of this process.

    Raises:
        BackendError: If the file does not load.
    """

    def __init__(self, path: Path, *, threads: int) -> None:
        torch.set_num_threads(threads)
        try:
            with warnings.catch_warnings():
                # torch.jit is deprecated but works in every torch we support; a worker's log need not say so.
                warnings.simplefilter("ignore", DeprecationWarning)
                self._module = torch.jit.load(str(path), map_location="cpu").eval()  # type: ignore[no-untyped-call]
        except (RuntimeError, ValueError, OSError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise BackendError(
                f"{path.name} is not a TorchScript file that torch {torch.__version__} loads: {reason}"
            ) from error

    @property
    def device(self) -> str:
        """The device that it runs on."""
        return "cpu"

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute one batch; see :class:`handlers.backend.Backend`."""
        with torch.inference_mode():
            # A copy: a module that works in place must not change what a retry would run on.
            output: torch.Tensor = self._module(torch.from_numpy(np.array(batch)))
        result: NDArray[np.float32] = output.numpy()
        return result
