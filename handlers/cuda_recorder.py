"""Records CUDA graphs of what torch launches: a module, or a package that torch compiled."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# cuDNN tries its algorithms for every shape: a worker has to be ready before TorchServe loses patience.
_TUNING_LIMIT_S = 10.0
# What torch's documentation asks for before a capture: libraries set themselves up when they are first called.
_RUNS_BEFORE = 3


class CudaRecorder:
    """Records on a stream of its own; all graphs share one pool of memory.

    They may: none reads what another one wrote, they run one after the other, and their outputs, which the pool keeps
    apart, are copied before the next replay. See "Graph memory management" in torch's notes on CUDA.

    Args:
        device: A GPU.
        model: Takes the inputs on the device in the signature's order, and gives the outputs in the signature's order.
        tune: Whether cuDNN should try out which of its algorithms is fastest. It does so for every new shape, which
            takes long: only for models whose shapes are all captured, and for the first of them if it takes too long.
        clock: Seconds.
    """

    def __init__(
        self,
        device: torch.device,
        model: Callable[[Sequence[Tensor]], Sequence[Tensor]],
        *,
        tune: bool,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device = device
        self._model = model
        self._tune = tune
        self._clock = clock
        self._tuned_s = 0.0
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def memory(self, size: int) -> Tensor:
        """Memory that graphs do not share with anything else."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def capture(self, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Run it on the stream of the graphs, on which libraries then have what they need, and record it there.

        See :class:`handlers.cuda_graphs.Recorder`.
        """
        computing = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(computing)
        graph = torch.cuda.CUDAGraph()
        began = self._clock()
        # torch.cuda.graph leaves its stream current when a capture fails (2.13); this context then does not.
        with torch.cuda.stream(self._stream), _tuned(self._tune and self._tuned_s < _TUNING_LIMIT_S):
            for _ in range(_RUNS_BEFORE):
                self._model(inputs)
            try:
                # Other threads may use CUDA meanwhile, such as those of another model in this process.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                    outputs = self._model(inputs)
            except Exception:
                self._forget_capture()
                raise
        self._tuned_s += self._clock() - began
        computing.wait_stream(self._stream)
        return graph.replay, outputs

    def _forget_capture(self) -> None:
        """Tell torch that a capture is over, which it notices by itself only when one succeeds.

        Otherwise its allocator would no longer give cached memory back when it is short of it, and its generator of
        random numbers would take every later one for part of the capture.
        """
        pool = self._pool
        self._pool = torch.cuda.graph_pool_handle()
        # Raised where the allocator knows. The pool is then not released either: releasing twice ends the process.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, pool)
            torch._C._cuda_releasePool(self._device.index, pool)
        # The end of a capture that succeeds is the end for the generator (until 2.11; later ones know).
        with contextlib.suppress(RuntimeError), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=self._stream, capture_error_mode="thread_local"):
                torch.zeros(1, device=self._device)


@contextlib.contextmanager
def _tuned(wanted: bool) -> Iterator[None]:
    """Let cuDNN try its algorithms, and leave the setting as it was."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = before or wanted
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
