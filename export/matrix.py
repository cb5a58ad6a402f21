"""The matrix: a checkpoint exported in every way that a device offers, side by side.

From a notebook or CI::

    import tempfile
    from pathlib import Path
    from export.matrix import pack_best, run_matrix
    from export.pipeline import ExportOptions

    options = ExportOptions(source=Path("runs/digits"), name="digits")
    with tempfile.TemporaryDirectory() as folder:
        matrix = run_matrix(options, Path(folder))
        for entry in matrix.entries:
            print(entry.combination, entry.status, entry.bytes, entry.reason)
        report = pack_best(options, matrix)

A combination that is refused or fails is a line of the matrix, never the end of it. What computes right is measured in
the same rounds, with one thread, so that the ratios hold on a busy machine too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from export.candidate import Candidate, Prepared, Step, convert_and_check, prepare
from export.combinations import Combination, allowed, refusal
from export.eager import SOURCE_FOLDER
from export.errors import CheckpointError, ConversionError, ExportError, GateError
from export.inputs import random_batch
from export.machine import describe_machine
from export.matrix_entries import PASSED, Entry, Matrix
from export.memory import measure_memory
from export.options import ExportOptions, resolve_thresholds, source_of
from export.pipeline import ExportReport, pack
from export.provenance import package_versions, quantisers
from export.ranking import Winner, choose
from export.speed import Timing, measure, shapes_to_measure
from export.thresholds import Thresholds
from handlers.artifact import FORMATS, PRECISIONS
from handlers.errors import one_line
from handlers.model import ServedModel
from handlers.signature import Signature
from handlers.tensors import Array

__all__ = ["Entry", "Matrix", "pack_best", "run_matrix"]

# Time for one shape and artifact; the speed gate gives as much to each of its two. Where that is enough, more rounds
# than there: what wins should win by more than chance.
_SHAPE_S = 4.0
_ROUNDS = 25
# What all speeds are held against: what most people serve today.
_BASELINES = ("torchscript fp32", "eager fp32")


def run_matrix(
    options: ExportOptions,
    folder: Path,
    *,
    formats: Sequence[str] = (),
    precisions: Sequence[str] = (),
    step: Step = lambda words: None,
) -> Matrix:
    """Export a checkpoint in every way that its device offers, check and measure each; nothing is packed.

    All artifacts are in memory at once while they are measured.

    Args:
        options: What to export; its format and precision do not count.
        folder: Where the artifacts go; they must lie there until the best one is packed.
        formats: Only these; empty for all.
        precisions: Only these; empty for all. The fp32 artifacts of the same formats are made all the same, to compare
            with.
        step: Called with a few words when each step begins: which combination of how many, and what is done to it.

    Raises:
        ConversionError: If the device, or what ``formats`` and ``precisions`` leave, is not offered.
        CheckpointError: If the checkpoint cannot be used.
        EvaluationError: If the evaluation data cannot be used.
        ThresholdError: If the thresholds cannot be used.
    """
    measured_at = datetime.now(UTC)
    combinations, wanted = _combinations(options, formats, precisions)
    thresholds = {one.precision: resolve_thresholds(options, one.precision) for one in combinations}
    step("reading the checkpoint")
    prepared = prepare(source_of(options))
    probe = _Probe(prepared)
    entries: list[Entry] = []
    for number, combination in enumerate(combinations):
        place = folder / f"{combination.format}-{combination.precision}"
        place.mkdir()
        entries.append(
            replace(
                _make(
                    options,
                    prepared,
                    combination,
                    place,
                    probe=probe,
                    thresholds=thresholds[combination.precision],
                    baseline=_fp32(entries, combination.format),
                    step=_counted(step, number, combinations),
                ),
                wanted=combination in wanted,
            )
        )
    entries = _measure(entries, prepared.checkpoint.signature, step)
    return Matrix(
        name=options.name,
        device=options.device,
        prepared=prepared,
        entries=tuple(entries),
        not_offered=_not_offered(options.device),
        baseline=_baseline(entries),
        winner=_winner(entries),
        loosened=_loosened(thresholds),
        machine=describe_machine(options.device),
        versions=package_versions(
            *dict.fromkeys(name for one in entries if one.candidate for name in quantisers(one.candidate.artifact))
        ),
        measured_at=measured_at,
    )


def pack_best(options: ExportOptions, matrix: Matrix, *, step: Step = lambda words: None) -> ExportReport:
    """Pack the fastest combination that passed.

    Args:
        options: Those of the matrix.
        matrix: What ``run_matrix`` gave; its folder must still be there.
        step: Called with a few words when each step begins.

    Raises:
        GateError: If nothing passed; nothing is written.
        ArchiveError: If the archive cannot be written.
    """
    best = matrix.entry(matrix.winner.name) if matrix.winner is not None else None
    if best is None or best.candidate is None:
        raise GateError("no combination passes every gate, so there is no archive")
    combination = best.combination
    options = replace(options, format=combination.format, precision=combination.precision)
    return pack(options, matrix.prepared, best.candidate, step=step)


def _combinations(
    options: ExportOptions, formats: Sequence[str], precisions: Sequence[str]
) -> tuple[list[Combination], set[Combination]]:
    """What to make, fp32 first in each format, and which of it was asked for."""
    device = options.device
    # Whether there is such a device and method at all.
    _refuse(Combination(format="torchscript", precision="fp32", device=device), options.method)
    for format in formats:
        _refuse(Combination(format=format, precision="fp32", device=device), "trace")
    offered = allowed(device)
    wanted = [
        one
        for one in offered
        if (not formats or one.format in formats) and (not precisions or one.precision in precisions)
    ]
    if not wanted:
        for format in formats or FORMATS:
            for precision in precisions:
                _refuse(Combination(format=format, precision=precision, device=device), "trace")
    used = {one.format for one in wanted}
    made = [one for one in offered if one in wanted or (one.precision == "fp32" and one.format in used)]
    return made, set(wanted)


def _refuse(combination: Combination, method: str) -> None:
    reason = refusal(combination, method=method)
    if reason is not None:
        raise ConversionError(reason)


def _not_offered(device: str) -> dict[str, str]:
    offered = allowed(device)
    every = [Combination(format=format, precision=name, device=device) for format in FORMATS for name in PRECISIONS]
    return {f"{one.format} {one.precision}": refusal(one) or "" for one in every if one not in offered}


def _loosened(thresholds: Mapping[str, Thresholds]) -> tuple[str, ...]:
    found = {precision: own.looser_than_defaults(precision) for precision, own in thresholds.items()}
    return tuple(f"{precision}: {words}" for precision, words in found.items() if words is not None)


def _counted(step: Step, number: int, combinations: Sequence[Combination]) -> Step:
    one = combinations[number]
    return lambda words: step(f"{number + 1} of {len(combinations)}, {one.format} {one.precision}: {words}")


def _fp32(entries: Sequence[Entry], format: str) -> ServedModel | None:
    """The fp32 artifact of a format, if it loads."""
    for entry in entries:
        if (entry.combination.format, entry.combination.precision) == (format, "fp32") and entry.candidate is not None:
            return entry.candidate.served
    return None


class _Probe:
    """The batches that are measured, with the checkpoint's answers to them.

    Args:
        prepared: The checkpoint.
    """

    def __init__(self, prepared: Prepared) -> None:
        signature = prepared.checkpoint.signature
        self.batches = [
            random_batch(signature, shape.batch, sizes=shape.sizes or None) for shape in shapes_to_measure(signature)
        ]
        self._reference = prepared.evidence.reference
        self._expected: list[dict[str, Array]] | None = None

    def difference(self, served: ServedModel) -> float | None:
        """See :attr:`Entry.difference`."""
        if self._expected is None:
            self._expected = [self._reference.run(batch) for batch in self.batches]
        largest = None
        for batch, expected in zip(self.batches, self._expected, strict=True):
            outputs = served.backend.run(batch)
            for name, right in expected.items():
                if np.issubdtype(right.dtype, np.floating):
                    found = float(np.abs(outputs[name].astype(np.float64) - right).max(initial=0.0))
                    largest = found if largest is None else float(np.maximum(largest, found))
        return largest if largest is not None and np.isfinite(largest) else None


def _make(
    options: ExportOptions,
    prepared: Prepared,
    combination: Combination,
    folder: Path,
    *,
    probe: _Probe,
    thresholds: Thresholds,
    baseline: ServedModel | None,
    step: Step,
) -> Entry:
    """Convert and check one combination; whatever goes wrong with it is its reason."""
    try:
        candidate = convert_and_check(
            prepared,
            combination,
            folder,
            method=options.method,
            thresholds=thresholds,
            allow_slower=options.allow_slower,
            baseline=baseline,
            step=step,
        )
    except CheckpointError:  # nothing that another combination could do better
        raise
    except ExportError as error:
        return Entry(combination=combination, reason=str(error))
    except Exception as error:  # a defect in the way of one combination is no reason to withhold the others
        return Entry(combination=combination, reason=f"unexpected {type(error).__name__}: {one_line(error)}")
    entry = Entry(combination=combination, candidate=candidate, bytes=_bytes(candidate))
    failed = [gate for gate in candidate.gates if not gate.passed]
    if failed:
        entry = replace(entry, reason="; ".join(f"{gate.gate}: {gate.detail}" for gate in failed))
    if candidate.served is None or not entry.computes_right:
        return entry
    step("measuring memory")
    try:
        memory = measure_memory(folder, probe.batches)
        return replace(entry, memory=memory, difference=probe.difference(candidate.served))
    except CheckpointError:
        raise
    except Exception as error:  # runtimes raise types of their own
        return replace(entry, reason=str(error) if isinstance(error, ExportError) else one_line(error))


def _bytes(candidate: Candidate) -> int:
    folder = candidate.folder
    sources = [path for path in (folder / SOURCE_FOLDER).rglob("*.py") if path.is_file()]
    return sum(path.stat().st_size for path in (folder / candidate.artifact.file, *sources))


def _measure(entries: Sequence[Entry], signature: Signature, step: Step) -> list[Entry]:
    """Let everything that computes what the checkpoint computes take turns; what is only too slow too."""
    backends = {
        entry.name: entry.candidate.served.backend
        for entry in entries
        if entry.memory is not None and entry.candidate is not None and entry.candidate.served is not None
    }
    timings: dict[str, list[Timing]] = {name: [] for name in backends}
    shapes = shapes_to_measure(signature) if backends else ()
    for number, shape in enumerate(shapes):
        step(f"{len(backends)} artifacts take turns: {shape} ({number + 1} of {len(shapes)})")
        found = measure(backends, signature, shapes=[shape], rounds=_ROUNDS, limit_s=_SHAPE_S * len(backends))
        for name, own in found.items():
            timings[name] += own
    return [replace(entry, timings=tuple(timings.get(entry.name, ()))) for entry in entries]


def _baseline(entries: Sequence[Entry]) -> str | None:
    measured = [entry for entry in entries if entry.timings]
    names = [entry.name for entry in measured]
    preferred = [*_BASELINES, *(entry.name for entry in measured if entry.combination.precision == "fp32"), *names]
    return next((name for name in preferred if name in names), None)


def _winner(entries: Sequence[Entry]) -> Winner | None:
    rivals = {entry.name: entry for entry in entries if entry.wanted and entry.status == PASSED}
    if not rivals:
        return None
    return choose(
        {name: entry.timings for name, entry in rivals.items()},
        {name: entry.combination.precision for name, entry in rivals.items()},
    )
