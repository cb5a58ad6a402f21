"""The benchmark of an archive: the model alone, in this process, without HTTP.

Three depths, so that it shows where the time goes: the artifact on ready-made batches, a stream of samples through the
planner, and whole requests from bytes to bytes. The best throughput of the second is the limit of serving.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from export.archive import handlers_folder
from export.bench_limit import Limit, measure_limit
from export.bench_points import Point, Step, measure_points, shapes_for
from export.bench_workload import Workload, collect, decode_all
from export.errors import MeasurementError
from export.inputs import SEED, random_batch
from export.inspection import Inspection, inspect_archive
from export.machine import describe_machine
from export.memory import Memory, measure_memory
from export.provenance import package_versions
from export.speed import Shape
from export.table import Columns
from handlers.errors import LoadError
from handlers.model import DEFAULT_MAX_BATCH, ServedModel
from handlers.signature import Signature

IN_FLIGHT = (64, 256)
LEAST_CPU_SHARE = 0.95
# Load, warm up, memory; and the length of the stream.
_OTHER_STEPS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchOptions:
    """What to measure.

    Attributes:
        archive: The ``.mar`` file.
        batch_sizes: Of the artifact alone; empty for 1, 8 and 32.
        lengths: Sizes that every dynamic axis takes; empty for a quarter of the longest and the longest.
        threads: Cores that one batch may use. One, as a worker has unless its archive says otherwise.
        duration_s: Seconds of each point and each way, over all rounds.
        rounds: How often each takes its turn: more show how steady the machine is.
        in_flight: Requests that the planner sees at once.
        inputs: Files with one request each, instead of the golden samples.
        texts: A file of texts, instead of the golden samples.
        columns: Where it has its text, if it is a table.
        random: Random requests instead of the golden samples.
        seed: Of the stream and of random inputs.
    """

    archive: Path
    batch_sizes: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    threads: int = 1
    duration_s: float = 1.0
    rounds: int = 5
    in_flight: tuple[int, ...] = IN_FLIGHT
    inputs: tuple[Path, ...] = ()
    texts: Path | None = None
    columns: Columns | None = None
    random: bool = False
    seed: int = SEED


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """What was measured.

    Attributes:
        inspection: The archive.
        options: What was asked for.
        batch: The archive's largest batch.
        workload: Where the stream comes from.
        points: The artifact alone.
        limit: The stream.
        memory: Of a fresh process that runs the largest of the points.
        cpu_share: CPU time of this process while it measured, over the time that passed. Well below 1 on a CPU, others
            took the rest, and latency percentiles are theirs as much as the model's.
        machine: Where.
    """

    inspection: Inspection
    options: BenchOptions
    batch: int
    workload: Workload
    points: tuple[Point, ...]
    limit: Limit
    memory: Memory
    cpu_share: float
    machine: dict[str, str]

    @property
    def disturbed(self) -> bool:
        """Whether others took more of the processor's time than figures can bear. A GPU is waited for, not computed."""
        artifact = self.inspection.signature.artifact
        return self.cpu_share < LEAST_CPU_SHARE and (artifact is None or artifact.device == "cpu")

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        signature, options = self.inspection.signature, self.options
        return {
            "archive": str(self.inspection.archive.path),
            "name": self.inspection.archive.name,
            "version": self.inspection.archive.version,
            "sha256": self.inspection.archive.sha256,
            "artifact": None if signature.artifact is None else signature.artifact.to_document(),
            "threads": options.threads,
            "batch_size": self.batch,
            "duration_s": options.duration_s,
            "rounds": options.rounds,
            "seed": options.seed,
            "workload": self.workload.to_document(signature),
            "points": [point.to_document() for point in self.points],
            "limit": self.limit.to_document(),
            "memory": asdict(self.memory),
            "cpu_share": self.cpu_share,
            "disturbed": self.disturbed,
            "machine": self.machine,
            "versions": package_versions(),
        }


def count_steps(options: BenchOptions, signature: Signature) -> int:
    """How often :func:`run_bench` calls ``step``, at most."""
    shapes = shapes_for(signature, batch_sizes=options.batch_sizes, lengths=options.lengths)
    ways = 1 + 2 * len(options.in_flight) + 1
    return _OTHER_STEPS + len(shapes) * (options.rounds + 1) + ways * options.rounds


def open_for_bench(options: BenchOptions) -> Inspection:
    """Verify the archive and refuse what cannot be measured, before any of the slow steps.

    Raises:
        ArchiveError: If the archive is damaged.
        MeasurementError: If an option does not fit the model.
    """
    inspection = inspect_archive(options.archive)
    shapes_for(inspection.signature, batch_sizes=options.batch_sizes, lengths=options.lengths)
    return inspection


def run_bench(options: BenchOptions, inspection: Inspection, *, step: Step = lambda words: None) -> Bench:
    """Load an archive's model in this process, which runs the code of an eager one, and measure it.

    Args:
        options: What to measure.
        inspection: What :func:`open_for_bench` gave.
        step: Told what comes next.

    Raises:
        MeasurementError: If the model does not load here, refuses a request, or fails.
    """
    signature = inspection.signature
    shapes = shapes_for(signature, batch_sizes=options.batch_sizes, lengths=options.lengths)
    batch = _batch_size(inspection)
    source, requests = collect(
        inspection,
        inputs=options.inputs,
        texts=options.texts,
        columns=options.columns,
        random=options.random,
        seed=options.seed,
    )
    with tempfile.TemporaryDirectory(prefix="torchport-bench-") as temporary:
        folder = Path(temporary)
        step("loading")
        served = _load(inspection, folder, threads=options.threads, batch=batch)
        workload = decode_all(served, source, requests)
        step("warming up")
        try:
            served.warm_up()
            served.measure_cost()  # as a worker does before it plans
        except LoadError as error:
            raise MeasurementError(f"{options.archive} cannot be measured here: {error}") from error
        started, busy = time.perf_counter(), time.process_time()
        points = measure_points(
            served.backend, signature, shapes, duration_s=options.duration_s, rounds=options.rounds, step=step
        )
        limit = measure_limit(
            served,
            workload,
            batch=batch,
            in_flight=options.in_flight,
            duration_s=options.duration_s,
            rounds=options.rounds,
            seed=options.seed,
            step=step,
        )
        cpu_share = (time.process_time() - busy) / max(time.perf_counter() - started, 1e-9)
        step("memory of a fresh process")
        memory = _memory(folder, signature, shapes)
    device = "cpu" if signature.artifact is None else signature.artifact.device
    return Bench(
        inspection=inspection,
        options=options,
        batch=batch,
        workload=workload,
        points=tuple(points),
        limit=limit,
        memory=memory,
        cpu_share=cpu_share,
        machine=describe_machine(device),
    )


def _batch_size(inspection: Inspection) -> int:
    """What TorchServe hands to a worker of this archive at once."""
    size = inspection.config.get("batchSize", DEFAULT_MAX_BATCH)
    return size if isinstance(size, int) and size > 0 else DEFAULT_MAX_BATCH


def _load(inspection: Inspection, folder: Path, *, threads: int, batch: int) -> ServedModel:
    archive = inspection.archive
    try:
        archive.extract(folder)
        # A fresh process in this folder would import the archive's own copy; what is measured is what runs here.
        shutil.rmtree(folder / handlers_folder().name, ignore_errors=True)
        identity = {"model": archive.name, "version": archive.version}
        return ServedModel.load(folder, threads=threads, max_batch=batch, identity=identity)
    except LoadError as error:
        raise MeasurementError(f"{archive.path} cannot be measured here: {error}") from error
    except OSError as error:
        raise MeasurementError(f"{archive.path} cannot be unpacked: {error.strerror or error}") from error


def _memory(folder: Path, signature: Signature, shapes: Sequence[Shape]) -> Memory:
    """The largest batch at every size of the axes; smaller ones need less."""
    largest = max(shape.batch for shape in shapes)
    batches = [
        random_batch(signature, shape.batch, sizes=shape.sizes or None) for shape in shapes if shape.batch == largest
    ]
    return measure_memory(folder, batches)
