"""The TorchScript backend."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from handlers.errors import BackendError, one_line
from handlers.signature import Signature
from handlers.staging import build_exchange
from handlers.tensors import Array, TensorBatch
from handlers.torch_device import check_device, free_cached, torch_device


class TorchScriptBackend:
    """Runs a traced or scripted module. It takes tensors in the signature's order and gives a tuple of them.

    Args:
        path: The file that ``torch.jit.save`` wrote.
        signature: The order of inputs and outputs.
        device: ``cpu`` or ``cuda``.
        threads: Intra-op threads of this process.
        gpu: Which GPU; None for torch's current one.

    Attributes:
        holds_lock: False: the interpreter lets other threads of Python run.

    Raises:
        BackendError: If the file does not load, or the device is missing.
    """

    holds_lock = False

    def __init__(self, path: Path, signature: Signature, *, device: str, threads: int, gpu: int | None = None) -> None:
        torch.set_num_threads(threads)
        self._device = torch_device(device, gpu)
        try:
            with warnings.catch_warnings():
                # torch.jit is deprecated but works in every torch we support; a worker's log need not say so.
                warnings.simplefilter("ignore", DeprecationWarning)
                module = torch.jit.load(str(path), map_location=self._device)  # type: ignore[no-untyped-call]
                self._module = module.eval()
        except (RuntimeError, ValueError, OSError) as error:
            reason = one_line(error)
            raise BackendError(
                f"{path.name} is not a TorchScript file that torch {torch.__version__} loads: {reason}"
            ) from error
        check_device(itertools.chain(self._module.parameters(), self._module.buffers()), self._device)
        self._exchange = build_exchange(signature, self._device)

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
        return self._exchange.run(batch, self._compute)

    def _compute(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        outputs = self._module(*tensors)
        return (outputs,) if isinstance(outputs, torch.Tensor) else outputs

    def free_memory(self) -> None:
        """Give back what torch keeps; see :class:`handlers.backend.Backend`."""
        free_cached(self._device)
