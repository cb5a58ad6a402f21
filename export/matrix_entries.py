"""Entries of the matrix, and the matrix itself: what was found about each way to export a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from export.candidate import Candidate, Prepared
from export.combinations import Combination
from export.gates import GateResult
from export.memory import Memory
from export.ranking import Advantage, Winner, compare, speed_of, times_as_fast
from export.speed import SPEED_GATE, Shape, Timing
from export.task_gates import ON_DATA

PASSED, FAILED, REFUSED = "passed", "failed", "refused"

# Gates on evaluation data say more than those on random inputs, which stand in where there is none.
_NOISE = (f"noise{ON_DATA}", "noise")
_AGREEMENT = ("top-1 agreement", "top-1 on random inputs")
_ACCURACY = ("accuracy",)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of the matrix.

    Attributes:
        combination: Format, precision and device.
        wanted: Whether it was asked for; the others are fp32 artifacts to compare with, and never win.
        candidate: The artifact with its gates; None if it could not be converted.
        reason: Why it did not pass: a sentence; None if it did.
        bytes: Size of the artifact's file, for eager with its sources.
        difference: Largest absolute difference of a floating-point output from the checkpoint's, over the batches that
            are measured (random inputs); None if there is none, or it is not finite.
        memory: What a fresh process needed; None if it does not compute right, or fails there.
        timings: One a shape; empty where ``memory`` is None.
    """

    combination: Combination
    wanted: bool = True
    candidate: Candidate | None = None
    reason: str | None = None
    bytes: int | None = None
    difference: float | None = None
    memory: Memory | None = None
    timings: tuple[Timing, ...] = ()

    @property
    def name(self) -> str:
        """Format and precision."""
        return f"{self.combination.format} {self.combination.precision}"

    @property
    def status(self) -> str:
        """``passed``, ``failed`` (a gate) or ``refused`` (there is no artifact)."""
        if self.reason is None:
            return PASSED
        return REFUSED if self.candidate is None else FAILED

    @property
    def computes_right(self) -> bool:
        """Whether it passed every gate but that of speed, so that its speed is worth knowing."""
        return self.candidate is not None and all(
            gate.passed or gate.gate == SPEED_GATE for gate in self.candidate.gates
        )

    @property
    def noise(self) -> GateResult | None:
        """Differences as a share of what outputs vary by, on evaluation data if there is any."""
        return self._gate(_NOISE)

    @property
    def agreement(self) -> GateResult | None:
        """Share of samples on which the same class ranks first, on evaluation data if there is any."""
        return self._gate(_AGREEMENT)

    @property
    def accuracy(self) -> GateResult | None:
        """Share of the evaluation data that it gets right."""
        return self._gate(_ACCURACY)

    def _gate(self, names: Sequence[str]) -> GateResult | None:
        gates = {gate.gate: gate for gate in self.candidate.gates} if self.candidate is not None else {}
        return next((gates[name] for name in names if name in gates), None)


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """All combinations of one checkpoint on one device.

    Attributes:
        name: The model's name.
        device: ``cpu`` or ``cuda``.
        prepared: The checkpoint.
        entries: In the order in which they were made.
        not_offered: Why the other combinations are not offered on this device: a sentence each.
        baseline: Name of the entry that all speeds are held against; None if nothing passed.
        winner: The fastest that passed; None if nothing that was asked for did.
        loosened: What lets more through than the defaults of each precision: a sentence each.
        machine: What measured.
        versions: Of Python and the packages that count.
        measured_at: When it began.
    """

    name: str
    device: str
    prepared: Prepared
    entries: tuple[Entry, ...]
    not_offered: Mapping[str, str]
    baseline: str | None
    winner: Winner | None
    loosened: tuple[str, ...] = ()
    machine: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    measured_at: datetime

    @property
    def measured(self) -> tuple[Entry, ...]:
        """The entries that have timings."""
        return tuple(entry for entry in self.entries if entry.timings)

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """What was measured with."""
        return next((tuple(timing.shape for timing in entry.timings) for entry in self.measured), ())

    @property
    def ok(self) -> bool:
        """Whether at least one combination that was asked for passed."""
        return any(entry.wanted and entry.status == PASSED for entry in self.entries)

    def entry(self, name: str) -> Entry | None:
        """The entry of a name such as ``onnx int8``; None if there is none."""
        return next((entry for entry in self.entries if entry.name == name), None)

    def fp32_of(self, entry: Entry) -> Entry | None:
        """The measured fp32 artifact of the same format."""
        fp32 = self.entry(f"{entry.combination.format} fp32")
        return fp32 if fp32 is not None and fp32.timings else None

    def advantage(self, entry: Entry, other: Entry | None) -> Advantage | None:
        """How many times as fast one entry is as another; None where one of them was not measured."""
        if other is None or not entry.timings or not other.timings:
            return None
        return compare(entry.timings, other.timings)

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "name": self.name,
            "device": self.device,
            "threads": 1,
            "evaluated": len(self.prepared.requests),
            "checkpoint_sha256": self.prepared.checkpoint.sha256,
            "baseline": self.baseline,
            "best": None
            if self.winner is None
            else {
                "combination": self.winner.name,
                "reason": self.winner.reason,
                "samples_per_s": self.winner.samples_per_s,
            },
            "combinations": [self._entry_document(entry) for entry in self.entries],
            "not_offered": dict(self.not_offered),
            "loosened": list(self.loosened),
            "machine": dict(self.machine),
            "versions": dict(self.versions),
            "measured_at": self.measured_at.isoformat(timespec="seconds"),
        }

    def _entry_document(self, entry: Entry) -> dict[str, Any]:
        fp32, baseline = self.fp32_of(entry), self.entry(self.baseline or "")
        return {
            "format": entry.combination.format,
            "precision": entry.combination.precision,
            "device": entry.combination.device,
            "status": entry.status,
            "reason": entry.reason,
            "only_to_compare": not entry.wanted,
            "bytes": entry.bytes,
            "largest_difference": entry.difference,
            "noise": _measured(entry.noise),
            "agreement": _measured(entry.agreement),
            "accuracy": _measured(entry.accuracy),
            "memory": None if entry.memory is None else entry.memory.to_document(),
            "samples_per_s": speed_of(entry.timings) if entry.timings else None,
            "times_as_fast_as_fp32": _factor(self.advantage(entry, fp32)),
            "times_as_fast_as_baseline": _factor(self.advantage(entry, baseline)),
            "timings": [
                {
                    "batch": own.shape.batch,
                    "sizes": dict(own.shape.sizes),
                    "ms": own.ms,
                    "samples_per_s": own.samples_per_s,
                    "rounds": len(own.rounds_s),
                    "times_as_fast_as_fp32": None if fp32 is None else times_as_fast(own, fp32.timings[i]),
                    "times_as_fast_as_baseline": None if baseline is None else times_as_fast(own, baseline.timings[i]),
                }
                for i, own in enumerate(entry.timings)
            ],
            "gates": [gate.to_document() for gate in entry.candidate.gates] if entry.candidate is not None else [],
        }


def _measured(gate: GateResult | None) -> dict[str, Any] | None:
    if gate is None:
        return None
    document = gate.to_document()
    return {key: document[key] for key in ("gate", "measured", "bound", "passed")}


def _factor(advantage: Advantage | None) -> float | None:
    return None if advantage is None else advantage.factor
