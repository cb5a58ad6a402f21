"""The in-process sections of gpu_limits.py: samples per second by batch size, and what limits them."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from gpu_clock import Ceilings, Clock
from gpu_subjects import Subject
from gpu_work import WorkByShape
from torch import Tensor, nn

from export.combinations import Combination, allowed, refusal
from handlers.backend import Backend, build_backend
from handlers.batching import stack
from handlers.model import ServedModel
from handlers.tensors import Array, TensorBatch

Document = dict[str, object]

PRECISION = "bf16"
BATCHES = (1, 8, 32, 64, 128)
GRAPHED = (1, 8, 32)
LARGEST = max(BATCHES)
# Texts to group by length into batches; of each size this many batches stand for all.
SAMPLES = 1024
MOST_BATCHES = 16
IN_FLIGHT = 256
_SEED = 61
_COMPARED = 16


@dataclass(kw_only=True)
class Bench:
    """What the sections share.

    Attributes:
        device: Where the models run.
        folder: For artifacts.
        subjects: The models by name.
        clock: Times.
        formats: Formats to measure beside eager; empty for all that the device has.
        tiny: Whether this is a rehearsal.
        ceilings: What the device can do, once it was measured.
    """

    device: torch.device
    folder: Path
    subjects: Mapping[str, Subject]
    clock: Clock
    formats: tuple[str, ...] = ()
    tiny: bool = False
    ceilings: Ceilings | None = None

    def artifact(self, subject: Subject, format: str, precision: str) -> Path:
        """The folder of an artifact, which is made when it is first asked for."""
        folder = self.folder / f"{subject.name}-{format}-{precision}"
        if not folder.exists():
            subject.write_artifact(folder, Combination(format=format, precision=precision, device=self.device.type))
        return folder

    def memory(self) -> int:
        """Bytes of the device that are in use, by whomever; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        return total - free


def measure_in_process(bench: Bench, name: str) -> Document:
    """One model in this process: by batch size, with and without CUDA graphs, and against fp32 on the CPU."""
    subject = bench.subjects[name]
    folder = bench.artifact(subject, "eager", PRECISION)
    before, started = bench.memory(), time.perf_counter()
    served = ServedModel.load(folder, threads=1, max_batch=LARGEST)
    load_s, held = time.perf_counter() - started, bench.memory() - before
    served.warm_up()
    samples = _samples(subject, SAMPLES if not bench.tiny else 2 * LARGEST)
    batches = {size: in_batches(subject, samples, size) for size in BATCHES}
    plain = build_backend(served.signature, folder, threads=1)
    return {
        "title": subject.title,
        "precision": PRECISION,
        "distance_from_fp32_on_the_cpu": distance(subject, served.backend, samples[:_COMPARED]),
        "load_s": load_s,
        "memory_after_load_bytes": held,
        **_planned(bench, served, samples),
        "by_batch_size": _by_batch_size(bench, subject, served.backend, batches),
        "graphs_against_plain": _against_plain(bench, served.backend, plain, batches),
    }


def measure_formats(bench: Bench, name: str) -> Document | str:
    """Other artifacts of the same weights beside the eager one."""
    subject = bench.subjects[name]
    wanted: list[Combination] = []
    refused: dict[str, str] = {}
    for combination in allowed(bench.device.type):
        # ONNX Runtime has no bf16 kernels.
        own = "fp16" if combination.format == "onnx" and bench.device.type == "cuda" else PRECISION
        own = "fp32" if combination.format == "onnx" and bench.device.type == "cpu" else own
        if combination.precision != own or combination.format == "eager":
            continue
        if bench.formats and combination.format not in bench.formats:
            continue
        reason = refusal(combination)
        if reason is None:
            wanted.append(combination)
        else:
            refused[combination.format] = reason
    if not wanted:
        return f"no other format can be had here: {refused}"
    samples = _samples(subject, 2 * LARGEST)
    batches = {size: in_batches(subject, samples, size) for size in GRAPHED}
    eager = ServedModel.load(bench.artifact(subject, "eager", PRECISION), threads=1, max_batch=max(GRAPHED))
    backends: dict[str, Backend] = {f"eager {PRECISION}": eager.backend}
    convert_s: dict[str, float] = {}
    for combination in wanted:
        label = f"{combination.format} {combination.precision}"
        started = time.perf_counter()
        folder = bench.artifact(subject, combination.format, combination.precision)
        convert_s[label] = time.perf_counter() - started
        backends[label] = ServedModel.load(folder, threads=1, max_batch=max(GRAPHED)).backend
        if combination.format != "torchscript":  # which has no graphs
            backends[f"{label} plain"] = ServedModel.load(folder, threads=1, cuda_graphs=False).backend
    rows = []
    for size in GRAPHED:
        times = bench.clock.take_turns({label: _all(backend, batches[size]) for label, backend in backends.items()})
        count = size * len(batches[size])
        rows.append({"batch": size, **{f"{label}_per_s": count / seconds for label, seconds in times.items()}})
    distances = {label: distance(subject, backend, samples[:_COMPARED]) for label, backend in backends.items()}
    return {
        "samples_per_s": rows,
        "conversion_s": [convert_s],
        "distance_from_fp32_on_the_cpu": [distances],
        "refused": "; ".join(f"{format}: {reason}" for format, reason in refused.items()) or None,
    }


def in_batches(subject: Subject, samples: Sequence[TensorBatch], size: int) -> list[TensorBatch]:
    """Samples of like length in batches, as the planner groups a full queue; a number of them, evenly spread."""
    name = subject.input_name
    ordered = sorted(samples, key=lambda sample: sample[name].shape[0]) if subject.shortest else list(samples)
    starts = range(0, len(ordered) - size + 1, size)
    count = min(MOST_BATCHES, len(starts))
    chosen = [starts[len(starts) * number // count] for number in range(count)]
    return [stack(ordered[start : start + size], subject.signature) for start in chosen]


def distance(subject: Subject, backend: Backend, samples: Sequence[TensorBatch]) -> float:
    """Root mean square of the differences from fp32 on the CPU, as a share of what outputs vary by; NaN of NaN."""
    batch = stack(samples, subject.signature)
    with torch.inference_mode():
        expected: Array = subject.build()(torch.from_numpy(batch[subject.input_name])).numpy()
    (actual,) = backend.run(batch).values()
    spread = float((expected - expected.mean(0)).std())
    return float(np.sqrt(np.square(actual.astype(np.float64) - expected).mean())) / spread


def _samples(subject: Subject, count: int) -> list[TensorBatch]:
    """So many samples; of pictures, which take long to draw, some come again."""
    drawn = subject.samples(count if subject.shortest else min(count, LARGEST), seed=_SEED)
    return [drawn[number % len(drawn)] for number in range(count)]


def _by_batch_size(
    bench: Bench, subject: Subject, backend: Backend, batches: Mapping[int, Sequence[TensorBatch]]
) -> list[Document]:
    """The backend from NumPy to NumPy, and beside it the bare module on tensors that lie on the device already."""
    module = _on_device(subject.build(), bench.device)
    work = WorkByShape(module, lambda shape: _random_input(subject, shape, bench.device))
    rows: list[Document] = []
    for size, group in batches.items():
        ready = [_input(batch[subject.input_name], bench.device) for batch in group]
        with torch.inference_mode():
            times = bench.clock.take_turns(
                {"backend": _all(backend, group), "module": lambda ready=ready: [module(one) for one in ready]}
            )
        count, seconds = size * len(group), times["backend"]
        works = [work.of(batch[subject.input_name].shape[1:]) for batch in group]
        flops = sum(size * one.flops for one in works) / seconds
        moved = sum(one.bytes(size) for one in works) / seconds
        row: Document = {
            "batch": size,
            "samples_per_s": count / seconds,
            "ms_a_batch": 1e3 * seconds / len(group),
            "tflop_per_s": flops / 1e12,
            "gb_per_s": moved / 1e9,
            "bare_module_samples_per_s": count / times["module"],
        }
        if bench.ceilings is not None:
            floor = sum(one.floor_s(size, bench.ceilings.flops_per_s, bench.ceilings.bytes_per_s) for one in works)
            row |= {
                "share_of_matrix_rate": flops / bench.ceilings.flops_per_s,
                "share_of_bandwidth": moved / bench.ceilings.bytes_per_s,
                "share_of_floor": floor / seconds,
            }
        rows.append(row)
    return rows


def _against_plain(
    bench: Bench, graphed: Backend, plain: Backend, batches: Mapping[int, Sequence[TensorBatch]]
) -> list[Document]:
    rows: list[Document] = []
    for size in GRAPHED:
        times = bench.clock.take_turns({"graphs": _all(graphed, batches[size]), "plain": _all(plain, batches[size])})
        number = len(batches[size])
        rows.append(
            {
                "batch": size,
                "plain_ms": 1e3 * times["plain"] / number,
                "graphs_ms": 1e3 * times["graphs"] / number,
                "ratio": times["plain"] / times["graphs"],
            }
        )
    return rows


def _planned(bench: Bench, served: ServedModel, samples: Sequence[TensorBatch]) -> Document:
    """Samples in their order of arrival through the planner: what serving is held against."""
    served.measure_cost()
    chunks = [list(samples[start : start + IN_FLIGHT]) for start in range(0, len(samples), IN_FLIGHT)]
    times = planned_seconds(bench, served, chunks)
    return {
        "in_flight": IN_FLIGHT,
        "planned_samples_per_s": len(samples) / min(times.values()),
        "planned_one_batch_under_way_samples_per_s": len(samples) / times["one"],
        "lanes_against_one": times["one"] / times["lanes"],
    }


def planned_seconds(bench: Bench, served: ServedModel, chunks: Sequence[list[TensorBatch]]) -> dict[str, float]:
    """How long samples take through the planner, chunk after chunk.

    Returns:
        With ``one`` batch under way at once, and with as many as the backend has ``lanes``, in a thread each.
    """
    with ThreadPoolExecutor(served.backend.lanes) as lanes, ThreadPoolExecutor(1) as one:

        def through(pool: Executor) -> Callable[[], None]:
            def run() -> None:
                for chunk in chunks:
                    batches = [[chunk[i] for i in indices] for indices in served.plan(chunk)]
                    for rows in pool.map(served.run, batches):
                        for row in rows:
                            if isinstance(row, Exception):
                                raise row

            return run

        return bench.clock.take_turns({"one": through(one), "lanes": through(lanes)})


def _all(backend: Backend, batches: Sequence[TensorBatch]) -> Callable[[], None]:
    def run() -> None:
        for batch in batches:
            backend.run(batch)

    return run


def _on_device(module: nn.Module, device: torch.device) -> nn.Module:
    module = module.to(device, torch.bfloat16)
    if any(isinstance(layer, nn.Conv2d) for layer in module.modules()):
        module = module.to(memory_format=torch.channels_last)
    return module


def _input(array: Array, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array).to(device)
    if not tensor.is_floating_point():
        return tensor
    tensor = tensor.to(torch.bfloat16)
    return tensor.to(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def _random_input(subject: Subject, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if subject.shortest is None:
        return _input(np.ones((1, *shape), np.float32), device)
    return torch.ones((1, math.prod(shape)), dtype=torch.int64, device=device)
