"""Where a request's time goes in torchport: stage by stage, in process and served, side by side."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from loadtest.compare_result import Comparison
from loadtest.compare_systems import TORCHPORT

# A row's words, its stage in process (`compare_whole.STAGES`), and its stage in a worker (`handlers.metrics.STAGES`).
_ROWS = (
    ("decode", "decode", "decode"),
    ("wait for a compute slot", "", "wait"),
    ("stack", "stack", ""),
    ("compute (served: with the stacking)", "compute", "compute"),
    ("answer and encode", "encode", "encode"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRow:
    """One stage.

    Attributes:
        stage: In words.
        in_process_ms: A request's share without a server; None where there is no such stage.
        served_ms: A request's share by the worker's own clock, or the client's; None where it is part of another.
    """

    stage: str
    in_process_ms: float | None
    served_ms: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """All stages at one number of users.

    Attributes:
        users: Requests in flight.
        batch: Size of the batches in process.
        rows: In the order of a request; the last is the whole.
        cpu_ms: CPU milliseconds a request by the name of the process, the client's own included.
    """

    users: int
    batch: int
    rows: tuple[StageRow, ...]
    cpu_ms: dict[str, float]


def break_down(comparison: Comparison, users: int) -> Breakdown | None:
    """Medians over the rounds; None when torchport was not measured at this number of users.

    Served stages overlap when several requests are in flight: one is decoded while others are computed. Then the whole,
    the client's median latency, is mostly waiting for others, and what says where time goes is CPU time.
    """
    visits = comparison.visits_of(TORCHPORT, users)
    cell = comparison.cell(TORCHPORT, users)
    if not visits or cell is None:
        return None
    whole = comparison.whole(ours=True)
    batch = 1 if users == 1 else whole[0].one_batch
    inside = [each.stages_ms[batch] for each in whole]
    rows = [
        StageRow(
            stage=words,
            in_process_ms=_median([each[within] for each in inside]) if within else None,
            served_ms=_median([visit.stages_ms[served] for visit in visits if served in visit.stages_ms]),
        )
        for words, within, served in _ROWS
    ]
    known = sum(row.served_ms or 0.0 for row in rows)
    rest = "HTTP, frontend, threads" if users == 1 else "HTTP, frontend, threads, waiting for others"
    whole_ms = sum(row.in_process_ms or 0.0 for row in rows)
    rows += [
        StageRow(stage=rest, in_process_ms=None, served_ms=None if cell.p50_ms is None else cell.p50_ms - known),
        StageRow(stage="a request (served: median latency)", in_process_ms=whole_ms, served_ms=cell.p50_ms),
    ]
    names = dict.fromkeys(name for visit in visits for name in visit.cpu_ms)
    cpu_ms = {name: statistics.median(visit.cpu_ms.get(name, 0.0) for visit in visits) for name in names}
    client = [visit.record.cpu_share * 1e3 / visit.record.throughput_rps for visit in visits if visit.record.right]
    cpu_ms["client"] = statistics.median(client) if client else 0.0
    return Breakdown(users=users, batch=batch, rows=tuple(rows), cpu_ms=cpu_ms)


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
