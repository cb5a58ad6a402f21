"""Records CUDA graphs with ONNX Runtime, which captures and replays them itself."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from handlers.onnx_binding import BoundSession
from handlers.staging import torch_dtype

# The option of the CUDA provider with which a session captures.
CAPTURING = {"enable_cuda_graph": "1"}


class OnnxRecorder:
    """Records with a session that was opened with :data:`CAPTURING`; see :class:`handlers.cuda_graphs.Recorder`.

    ONNX Runtime keeps graphs for the thread that captured them: one thread here captures and replays them all.

    Args:
        session: On the device.
        device: As torch calls it.
    """

    def __init__(self, session: BoundSession, device: torch.device) -> None:
        self._session = session
        self._device = device
        self._numbers = itertools.count()
        self._thread = ThreadPoolExecutor(1, "torchport-onnx")

    def memory(self, size: int) -> Tensor:
        """Memory of torch's."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def capture(self, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Run plainly, which tells the shapes of the outputs, and then let ONNX Runtime capture."""
        self._settle()
        binding = self._session.bind_device(inputs)
        outputs = [
            torch.empty(array.shape, dtype=torch_dtype(array.dtype), device=self._device)
            for array in self._session.run(binding)
        ]
        self._session.bind_outputs(binding, outputs)
        number = next(self._numbers)

        def replay() -> None:
            self._settle()
            self._thread.submit(self._session.run_graph, binding, number).result()

        replay()  # the first time it captures
        return replay, outputs

    def _settle(self) -> None:
        """Wait for what torch copies: inputs in, and the outputs of the last replay out. Its stream is another one."""
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
