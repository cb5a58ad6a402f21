"""What a comparison found: medians over rounds, ratios within rounds, and what of it cannot be believed."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any

from loadtest.closed_loop import LoadRecord
from loadtest.compare_limit import Limit
from loadtest.compare_plan import ComparePlan
from loadtest.compare_systems import TORCHPORT, System
from loadtest.compare_whole import Whole
from loadtest.histogram import Histogram

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One system's turn at one number of users.

    Attributes:
        system: Its name.
        users: Requests in flight.
        round: Number of the round, from 0.
        record: What the client saw.
        cpu_ms: CPU milliseconds of the server a request, by the name of the process.
        stages_ms: Milliseconds a request in each stage of torchport's workers; empty for others.
    """

    system: str
    users: int
    round: int
    record: LoadRecord
    cpu_ms: dict[str, float] = field(default_factory=dict)
    stages_ms: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One system at one number of users, over all rounds.

    Attributes:
        rps: Median of the rounds' right answers per second.
        lowest_rps: The slowest round's.
        highest_rps: The fastest round's.
        p50_ms: Median latency of all rounds' requests; failed ones count as slower than any other.
        p99_ms: 99th percentile of the same; None when more than one in a hundred failed.
        failed: Failed requests.
        requests: All requests.
        client_cpu: The most that the client used of its core in any round.
        stall_s: The longest that the client stood still in any round.
        torchport_ratio: Median over the rounds of torchport's rate over this one's; None without a torchport.
        of_limit: Median over the rounds of this rate over the limit in arrival order of the artifact it serves.
        of_one: The same over the limit of whole requests, decoding and encoding included, one batch after the other.
        of_all: The same over that of whole requests on all cores.
        added_ms: Median over the rounds of the median latency less that of a request alone in process; None for more
            than one request in flight.
        cpu_ms: Median over the rounds of the server's CPU milliseconds a request.
        faults: Number and first example by kind.
    """

    rps: float
    lowest_rps: float
    highest_rps: float
    p50_ms: float | None
    p99_ms: float | None
    failed: int
    requests: int
    client_cpu: float
    stall_s: float
    torchport_ratio: float | None
    of_limit: float | None
    of_one: float | None
    of_all: float | None
    added_ms: float | None
    cpu_ms: float
    faults: dict[str, tuple[int, str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that one comparison found.

    Attributes:
        plan: What was asked.
        visits: Every turn.
        failures: Why a system could not be measured, by its name.
        lost: Turns in which the measuring itself failed, and why.
        limits: In-process limits of each round: of the peers' artifact, and of torchport's.
        archives: What torchport and the peers served.
        requests: Where the requests came from.
        bodies: How many different ones there are.
        files: Whether they are files as they are, instead of JSON.
        cores: What was done about cores, in words.
        measured_at: When it ended.
        command: What repeats it.
        hardware: The machine.
        versions: Versions by package.
    """

    plan: ComparePlan
    visits: Sequence[Visit]
    failures: dict[str, str]
    lost: Sequence[str]
    limits: Sequence[tuple[Limit, Limit]]
    archives: tuple[dict[str, Any], dict[str, Any]]
    requests: str
    bodies: int
    files: bool
    cores: str
    measured_at: datetime
    command: str
    hardware: dict[str, str]
    versions: dict[str, str]

    @property
    def one_artifact(self) -> bool:
        """Whether torchport and the peers serve the same archive."""
        return self.plan.archive == self.plan.reference

    def limit(self, *, ours: bool, grouped: bool) -> float:
        """A limit's median over the rounds, in samples per second."""
        return statistics.median(self._limit(number, ours, grouped) for number in range(len(self.limits)))

    def _limit(self, number: int, ours: bool, grouped: bool) -> float:
        limit = self.limits[number][ours]
        return limit.grouped_per_s if grouped else limit.arrival_per_s

    def whole(self, *, ours: bool) -> list[Whole]:
        """The limits of whole requests, of each round."""
        return [limits[ours].whole for limits in self.limits]

    def visits_of(self, system: str, users: int) -> list[Visit]:
        """A system's turns at a number of users."""
        return [visit for visit in self.visits if visit.system == system and visit.users == users]

    def records(self, system: str, users: int) -> dict[int, LoadRecord]:
        """What the client saw of a system, by round."""
        return {visit.round: visit.record for visit in self.visits_of(system, users)}

    def cell(self, system: str, users: int) -> Cell | None:
        """A system at a number of users; None when it was never measured there."""
        records = self.records(system, users)
        if not records:
            return None
        rates = [record.throughput_rps for record in records.values()]
        merged = Histogram()
        faults: dict[str, tuple[int, str]] = {}
        for record in records.values():
            merged.add(record.latency)
            for kind, (count, example) in record.faults.items():
                known = faults.get(kind, (0, example))
                faults[kind] = (known[0] + count, known[1])
        failed = sum(record.failed for record in records.values())
        p50_ms, p99_ms = merged.percentiles_ms([50, 99], failed=failed)
        ours = self.records(TORCHPORT, users)
        whole = self.whole(ours=system == TORCHPORT)
        return Cell(
            rps=statistics.median(rates),
            lowest_rps=min(rates),
            highest_rps=max(rates),
            p50_ms=p50_ms,
            p99_ms=p99_ms,
            failed=failed,
            requests=len(merged) + failed,
            client_cpu=max(record.cpu_share for record in records.values()),
            stall_s=max(record.stall_s for record in records.values()),
            torchport_ratio=_median_ratio(
                records, lambda number: ours[number].throughput_rps if number in ours else None, inverse=True
            ),
            of_limit=_median_ratio(records, lambda number: self._limit(number, system == TORCHPORT, False)),
            of_one=_median_ratio(records, lambda number: whole[number].one_per_s),
            of_all=_median_ratio(records, lambda number: whole[number].all_per_s),
            added_ms=_median_added(records, whole) if users == 1 else None,
            cpu_ms=statistics.median(sum(visit.cpu_ms.values()) for visit in self.visits_of(system, users)),
            faults=faults,
        )

    @property
    def invalid(self) -> list[str]:
        """Why numbers cannot be believed; empty when all can."""
        reasons = [*self.failures.values(), *self.lost]
        for system in self.plan.systems:
            for users in self.plan.users:
                cell = self.cell(system.name, users)
                if cell is not None:
                    reasons += _faults_of(cell, system, users, self.plan)
        return reasons

    @property
    def ok(self) -> bool:
        """Whether every system was measured, and every measurement can be believed."""
        return not self.invalid

    def to_json(self, *, whole: bool = True) -> dict[str, Any]:
        """The comparison as JSON-serialisable values.

        Args:
            whole: With every turn and its histogram; without them it is a summary.
        """
        document: dict[str, Any] = {
            "format": "torchport-compare",
            "format_version": FORMAT_VERSION,
            "ok": self.ok,
            "invalid_reasons": self.invalid,
            "archive": self.archives[0],
            "reference": self.archives[1],
            "systems": {
                system.name: {
                    "title": system.title,
                    "batching": system.describe(files=self.files, workers=self.plan.workers),
                    "failure": self.failures.get(system.name),
                    "users": {
                        str(users): asdict(cell)
                        for users in self.plan.users
                        if (cell := self.cell(system.name, users)) is not None
                    },
                }
                for system in self.plan.systems
            },
            "limits_per_s": {
                "reference_arrival": self.limit(ours=False, grouped=False),
                "reference_grouped": self.limit(ours=False, grouped=True),
                "archive_arrival": self.limit(ours=True, grouped=False),
                "archive_grouped": self.limit(ours=True, grouped=True),
                **{
                    f"{whose}_{way}": statistics.median(
                        getattr(whole, f"{way}_per_s") for whole in self.whole(ours=ours)
                    )
                    for whose, ours in (("reference", False), ("archive", True))
                    for way in ("one", "all")
                },
            },
            "requests": self.requests,
            "bodies": self.bodies,
            "cores": self.cores,
            "command": self.command,
            "measured_at": self.measured_at.isoformat(timespec="seconds"),
            "plan": {**asdict(self.plan), "archive": str(self.plan.archive), "reference": str(self.plan.reference)},
            "hardware": self.hardware,
            "versions": self.versions,
        }
        if whole:
            document["rounds"] = [
                {
                    "system": visit.system,
                    "users": visit.users,
                    "round": visit.round,
                    "cpu_ms": visit.cpu_ms,
                    "stages_ms": visit.stages_ms,
                    **visit.record.to_json(),
                }
                for visit in self.visits
            ]
            document["limit_rounds"] = [
                {
                    whose: {
                        "arrival_per_s": limit.arrival_per_s,
                        "grouped_per_s": limit.grouped_per_s,
                        "whole": limit.whole.to_json(),
                    }
                    for whose, limit in zip(("reference", "archive"), limits, strict=True)
                }
                for limits in self.limits
            ]
        return document


def _median_ratio(
    records: dict[int, LoadRecord], other: Callable[[int], float | None], *, inverse: bool = False
) -> float | None:
    """The median over the rounds of a rate's ratio to another of the same round, or of its inverse."""
    ratios = []
    for number, record in records.items():
        base, rate = other(number), record.throughput_rps
        if base and rate:
            ratios.append(base / rate if inverse else rate / base)
    return statistics.median(ratios) if ratios else None


def _median_added(records: dict[int, LoadRecord], whole: Sequence[Whole]) -> float | None:
    """The median over the rounds of what a lone request's median takes longer than in process, in milliseconds."""
    added = []
    for number, record in records.items():
        (p50_ms,) = record.latency.percentiles_ms([50], failed=record.failed)
        if p50_ms is not None:
            added.append(p50_ms - whole[number].alone_ms)
    return statistics.median(added) if added else None


def _faults_of(cell: Cell, system: System, users: int, plan: ComparePlan) -> list[str]:
    where = f"{system.title} at {users} in flight"
    reasons = []
    if cell.client_cpu > plan.max_client_cpu:
        reasons.append(
            f"{where}: the client used {cell.client_cpu:.0%} of its core (at most {plan.max_client_cpu:.0%}): "
            "it measured itself; compare a larger model, or fewer users"
        )
    if cell.stall_s > plan.max_stall_s:
        reasons.append(
            f"{where}: the client stood still for {cell.stall_s:.1f} s (at most {plan.max_stall_s:g} s): the machine "
            "was suspended or overloaded; compare again"
        )
    if not cell.requests or cell.failed / cell.requests > plan.max_error_share:
        examples = "; ".join(f"{kind}: {example}" for kind, (_, example) in cell.faults.items())
        share = cell.failed / cell.requests if cell.requests else 1.0
        reasons.append(f"{where}: {share:.1%} of the requests failed ({examples or 'none was answered'})")
    return reasons
