"""The in-process sections of gpu_limits.py: samples per second by batch size, and what limits them."""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from gpu_clock import Ceilings, Clock
from gpu_subjects import Subject
from gpu_work import WorkByShape
from torch import Tensor, nn

from export.combinations import Combination, allowed, refusal
from export.thresholds import Thresholds
from handlers.backend import Backend, build_backend
from handlers.batching import stack
from handlers.model import SIGNATURE_FILE, ServedModel
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
_COMPARED = 64
_COMPILED = "torch.compile, reduce-overhead, inputs on the device"


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What a model does at most without a server, in samples per second.

    Attributes:
        in_process_per_s: From NumPy to NumPy: through the planner or in full batches of one size, whichever does more.
        bare_module_per_s: Of the module alone, on inputs that lie on the device already.
    """

    in_process_per_s: float
    bare_module_per_s: float


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
        torch_compile: Whether the formats sections compile the bare module, too.
        limits: What each subject does at most, once it was measured.
    """

    device: torch.device
    folder: Path
    subjects: Mapping[str, Subject]
    clock: Clock
    formats: tuple[str, ...] = ()
    tiny: bool = False
    torch_compile: bool = False
    limits: dict[str, Limit] = field(default_factory=dict)
    _ceilings: Ceilings | None = None

    @property
    def ceilings(self) -> Ceilings:
        """What the device can do; measured when it is first asked for."""
        if self._ceilings is None:
            self._ceilings = Ceilings.measure(self.clock, tiny=self.tiny)
        return self._ceilings

    def artifact(self, subject: Subject, format: str, precision: str) -> Path:
        """The folder of an artifact, which is made when it is first asked for."""
        folder = self.folder / f"{subject.name}-{format}-{precision}"
        if not folder.exists():
            subject.write_artifact(folder, Combination(format=format, precision=precision, device=self.device.type))
        return folder

    def artifact_file(self, subject: Subject, format: str, precision: str) -> Path:
        """The artifact itself."""
        folder = self.artifact(subject, format, precision)
        return folder / json.loads((folder / SIGNATURE_FILE).read_bytes())["artifact"]["file"]

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
    _ = bench.ceilings  # so that the device's context is there before memory and time are looked at
    before, started = bench.memory(), time.perf_counter()
    served = ServedModel.load(folder, threads=1, max_batch=LARGEST)
    load_s, held = time.perf_counter() - started, bench.memory() - before
    served.warm_up()
    samples = _samples(subject, SAMPLES if not bench.tiny else 2 * LARGEST)
    batches = {size: in_batches(subject, samples, size) for size in BATCHES}
    plain = build_backend(served.signature, folder, threads=1)
    planned = _planned(bench, served, samples)
    rows = _by_batch_size(bench, subject, served.backend, batches)
    bench.limits[name] = Limit(
        in_process_per_s=max(planned["planned_per_s"], *(row["samples_per_s"] for row in rows)),
        bare_module_per_s=max(row["bare_module_samples_per_s"] for row in rows),
    )
    return {
        "title": subject.title,
        "precision": PRECISION,
        "load_and_capture_s": load_s,
        "memory_after_load_bytes": held,
        "in_process_per_s": bench.limits[name].in_process_per_s,
        "in_process_of_bare_module": bench.limits[name].in_process_per_s / bench.limits[name].bare_module_per_s,
        **planned,
        "agreement_with_fp32_on_the_cpu": [against_reference(subject, served.backend, PRECISION, samples[:_COMPARED])],
        "by_batch_size": rows,
        "graphs_against_plain": _against_plain(bench, served.backend, plain, batches),
    }


def measure_limit(bench: Bench, subject: Subject) -> Limit:
    """The limit alone, for who has not measured the model in process."""
    served = ServedModel.load(bench.artifact(subject, "eager", PRECISION), threads=1, max_batch=LARGEST)
    served.warm_up()
    samples = _samples(subject, SAMPLES if not bench.tiny else 2 * LARGEST)
    batches = {LARGEST: in_batches(subject, samples, LARGEST)}
    (row,) = _by_batch_size(bench, subject, served.backend, batches)
    planned = _planned(bench, served, samples)["planned_per_s"]
    return Limit(
        in_process_per_s=max(planned, row["samples_per_s"]), bare_module_per_s=row["bare_module_samples_per_s"]
    )


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
    precisions = {f"eager {PRECISION}": PRECISION}
    convert_s: dict[str, float] = {}
    for combination in wanted:
        label = f"{combination.format} {combination.precision}"
        precisions[label] = combination.precision
        started = time.perf_counter()
        folder = bench.artifact(subject, combination.format, combination.precision)
        convert_s[label] = time.perf_counter() - started
        backends[label] = ServedModel.load(folder, threads=1, max_batch=max(GRAPHED)).backend
        if combination.format != "torchscript":  # which has no graphs
            backends[f"{label} plain"] = ServedModel.load(folder, threads=1, cuda_graphs=False).backend
    compared = {
        label: against_reference(subject, backends[label], own, samples[:_COMPARED])
        for label, own in precisions.items()
    }
    rows: dict[str, Document] = {label: {"artifact": label} for label in backends}
    compiled = _compiled(subject, bench) if bench.torch_compile else None
    for size in GRAPHED:
        runs = {label: _all(backend, batches[size]) for label, backend in backends.items()}
        if compiled is not None:
            rows.setdefault(_COMPILED, {"artifact": _COMPILED})
            ready = [_input(batch[subject.input_name], bench.device) for batch in batches[size]]
            runs[_COMPILED] = lambda ready=ready: [compiled(one) for one in ready]
        with torch.inference_mode():
            times = bench.clock.take_turns(runs)
        for label, seconds in times.items():
            rows[label][f"batch_{size}_per_s"] = size * len(batches[size]) / seconds
    return {
        "samples_per_s": list(rows.values()),
        "conversion_s": [{"artifact": label, "seconds": seconds} for label, seconds in convert_s.items()],
        "agreement_with_fp32_on_the_cpu": [{"artifact": label, **row} for label, row in compared.items()],
        "refused": "; ".join(f"{format}: {reason}" for format, reason in refused.items()) or None,
    }


def _compiled(subject: Subject, bench: Bench) -> Callable[[Tensor], object]:
    """The bare module as other servers compile it where they serve: kernels fused, and CUDA graphs of torch's own."""
    compiled: Callable[[Tensor], object] = torch.compile(
        _on_device(subject.build(), bench.device), mode="reduce-overhead", dynamic=False
    )
    return compiled


def in_batches(subject: Subject, samples: Sequence[TensorBatch], size: int) -> list[TensorBatch]:
    """Samples of like length in batches, as the planner groups a full queue; a number of them, evenly spread."""
    name = subject.input_name
    ordered = sorted(samples, key=lambda sample: sample[name].shape[0]) if subject.shortest else list(samples)
    starts = range(0, len(ordered) - size + 1, size)
    count = min(MOST_BATCHES, len(starts))
    chosen = [starts[len(starts) * number // count] for number in range(count)]
    return [stack(ordered[start : start + size], subject.signature) for start in chosen]


def against_reference(subject: Subject, backend: Backend, precision: str, samples: Sequence[TensorBatch]) -> Document:
    """Answers against fp32 on the CPU, and whether the gates would let them pass.

    Returns:
        ``distance``: the root mean square of the differences, as a share of what outputs vary by; NaN of NaN.
        ``agreement``: the share of samples with the same most probable class. Their bounds are those of inputs that
        nothing was trained on (export/thresholds.py).
    """
    batch = stack(samples, subject.signature)
    with torch.inference_mode():
        expected: Array = subject.build()(torch.from_numpy(batch[subject.input_name])).numpy()
    (actual,) = backend.run(batch).values()
    spread = float((expected - expected.mean(0)).std())
    distance = float(np.sqrt(np.square(actual.astype(np.float64) - expected).mean())) / spread
    agreement = float((actual.argmax(1) == expected.argmax(1)).mean())
    bounds = Thresholds.of(precision)
    return {
        "distance": distance,
        "distance_bound": 2 * bounds.noise,
        "agreement": agreement,
        "agreement_bound": bounds.agreement,
        "passes": distance <= 2 * bounds.noise and agreement >= bounds.agreement,
    }


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
        floor = sum(one.floor_s(size, bench.ceilings.flops_per_s, bench.ceilings.bytes_per_s) for one in works)
        row: Document = {
            "batch": size,
            "samples_per_s": count / seconds,
            "ms_a_batch": 1e3 * seconds / len(group),
            "tflop_per_s": flops / 1e12,
            "gb_per_s": moved / 1e9,
            "bare_module_samples_per_s": count / times["module"],
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
                "graphs_times_faster": times["plain"] / times["graphs"],
            }
        )
    return rows


def _planned(bench: Bench, served: ServedModel, samples: Sequence[TensorBatch]) -> dict[str, float]:
    """Samples in their order of arrival through the planner, some hundred at once: what serving is held against."""
    served.measure_cost()
    times = planned_seconds(bench, served, samples)
    return {
        "in_flight": IN_FLIGHT,
        "planned_per_s": len(samples) / min(times.values()),
        "planned_one_batch_under_way_per_s": len(samples) / times["one"],
        "lanes_times_faster": times["one"] / times["lanes"],
    }


def planned_seconds(bench: Bench, served: ServedModel, samples: Sequence[TensorBatch]) -> dict[str, float]:
    """How long samples take through the planner, which sees some hundred at once; batches of one plan follow another's.

    Returns:
        With ``one`` batch under way at once, and with as many as the backend has ``lanes``, in a thread each.
    """
    chunks = [list(samples[start : start + IN_FLIGHT]) for start in range(0, len(samples), IN_FLIGHT)]
    with ThreadPoolExecutor(served.backend.lanes) as lanes, ThreadPoolExecutor(1) as one:

        def through(pool: Executor) -> Callable[[], None]:
            def run() -> None:
                jobs = [
                    pool.submit(served.run, [chunk[i] for i in indices])
                    for chunk in chunks
                    for indices in served.plan(chunk)
                ]
                for job in jobs:
                    for row in job.result():
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
