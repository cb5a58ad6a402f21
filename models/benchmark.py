"""How fast a model answers, measured so that the number means something."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from models.errors import BenchmarkError, DeviceError

Inputs = Tensor | tuple[Tensor, ...] | Mapping[str, Tensor]
"""A model's arguments: one, several by position, or several by name; [B, ...] each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkResult:
    """Latencies of one batch, from the call until its outputs are computed."""

    p50_ms: float
    """Half of the runs were at most this slow."""

    p90_ms: float
    """Nine of ten runs were at most this slow."""

    p99_ms: float
    """All but one in a hundred runs were at most this slow."""

    mean_ms: float
    """Over all runs."""

    std_ms: float
    """Standard deviation of the runs."""

    samples_per_s: float
    """Samples of all runs by their time: one batch after the other."""

    batch_size: int
    """Samples per run."""

    num_runs: int
    """Runs that were timed, after the warm-up."""

    device: str
    """Where the model is."""

    threads: int
    """That torch may use for one operation on the CPU."""

    def as_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.mean_ms:.3f} ms ± {self.std_ms:.3f} (p50 {self.p50_ms:.3f}, p90 {self.p90_ms:.3f}, "
            f"p99 {self.p99_ms:.3f}), {self.samples_per_s:,.0f} samples/s in batches of {self.batch_size} on "
            f"{self.device}"
        )


def benchmark_model(
    model: nn.Module,
    inputs: Inputs,
    *,
    num_runs: int = 100,
    warmup: int = 10,
    device: torch.device | str | None = None,
) -> BenchmarkResult:
    """Times a model in eval mode, without gradients; its modes are as before afterwards.

    On a GPU each run is timed with its queue drained before and after: a caller's latency, launches included.

    Args:
        model: is not moved.
        inputs: are copied to the device first, outside the timing.
        num_runs: how many to time, each on the same inputs.
        warmup: runs before those; the first ones allocate memory and choose kernels.
        device: where the model must be; by default where its parameters are.

    Raises:
        BenchmarkError: for arguments that give no measurement, and for a model on another device.
        DeviceError: for a GPU that is absent.
    """
    if num_runs < 1 or warmup < 0:
        raise BenchmarkError(
            f"num_runs is {num_runs} and warmup {warmup}; time at least one run, after zero or more to warm up."
        )
    arguments, named = _arguments(inputs)
    target = _target(model, (*arguments, *named.values()), device)
    arguments = tuple(tensor.to(target) for tensor in arguments)
    named = {name: tensor.to(target) for name, tensor in named.items()}
    batch_size = _batch_size((*arguments, *named.values()))
    with _eval_mode(model), torch.inference_mode():
        for _ in range(warmup):
            model(*arguments, **named)
        latencies_ms = [_run_ms(model, arguments, named, target) for _ in range(num_runs)]
    p50, p90, p99 = np.percentile(latencies_ms, [50, 90, 99])
    return BenchmarkResult(
        p50_ms=float(p50),
        p90_ms=float(p90),
        p99_ms=float(p99),
        mean_ms=float(np.mean(latencies_ms)),
        std_ms=float(np.std(latencies_ms)),
        samples_per_s=1000 * batch_size * num_runs / sum(latencies_ms),
        batch_size=batch_size,
        num_runs=num_runs,
        device=str(target),
        threads=torch.get_num_threads(),
    )


def _run_ms(
    model: nn.Module, arguments: tuple[Tensor, ...], named: Mapping[str, Tensor], device: torch.device
) -> float:
    _synchronize(device)
    started = time.perf_counter_ns()
    model(*arguments, **named)
    _synchronize(device)
    return (time.perf_counter_ns() - started) / 1e6


def _synchronize(device: torch.device) -> None:
    """Waits for the device: a GPU's calls return before it has computed anything."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    # Module by module: frozen parts of a model in training are in eval mode already, and must stay so.
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _arguments(inputs: Inputs) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """The arguments by position and by name."""
    by_position = (inputs,) if isinstance(inputs, Tensor) else inputs if isinstance(inputs, tuple) else ()
    by_name = dict(inputs) if isinstance(inputs, Mapping) else {}
    tensors = (*by_position, *by_name.values())
    if not tensors or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise BenchmarkError(
            f"The inputs are a {type(inputs).__name__} that does not hold tensors; "
            "give a tensor, a tuple of tensors or a dict of tensors."
        )
    return by_position, by_name


def _batch_size(tensors: tuple[Tensor, ...]) -> int:
    return len(tensors[0]) if tensors[0].ndim else 1


def _target(model: nn.Module, inputs: tuple[Tensor, ...], device: torch.device | str | None) -> torch.device:
    """Where the benchmark runs; compared with where the model is."""
    weights = next((tensor for tensors in (model.parameters(), model.buffers()) for tensor in tensors), None)
    if device is None:
        return (inputs[0] if weights is None else weights).device
    target = torch.device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"The benchmark is to run on {target}, and torch finds no CUDA device here; use cpu.")
    if target.type == "cuda" and target.index is None:
        target = torch.device("cuda", torch.cuda.current_device())
    if weights is not None and weights.device != target:
        raise BenchmarkError(
            f"The model is on {weights.device} and the benchmark on {target}; move it there first with "
            f'model.to("{target}").'
        )
    return target
