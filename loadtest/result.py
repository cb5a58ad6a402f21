"""What one load test found, ready to be printed, stored and compared."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Self

from loadtest.histogram import Histogram
from loadtest.machine import describe_hardware, describe_versions
from loadtest.payloads import Payload
from loadtest.plan import Plan
from loadtest.run import run_load
from loadtest.tally import FaultCount, Tally
from loadtest.verdict import Verdict, judge

FORMAT_VERSION = 1
LEVELS = (50.0, 90.0, 95.0, 99.0, 99.9)


@dataclass(frozen=True, slots=True, kw_only=True)
class Percentiles:
    """Percentiles of a duration in milliseconds; None where more requests failed than the percentile leaves out."""

    p50: float | None
    p90: float | None
    p95: float | None
    p99: float | None
    p99_9: float | None
    max: float | None

    @classmethod
    def of(cls, histogram: Histogram, *, failed: int = 0) -> Self:
        """Reads the percentiles out of a histogram; the failed requests count as slower than all in it."""
        return cls(
            **dict(
                zip(("p50", "p90", "p95", "p99", "p99_9"), histogram.percentiles_ms(LEVELS, failed=failed), strict=True)
            ),
            max=None if failed else histogram.max_ms(),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One load test.

    Attributes:
        plan: What was asked.
        tally: Every count and histogram.
        verdict: Whether it is valid, and whether what was asked holds.
        measured_at: When it ended.
        samples: How many different request bodies were sent.
        command: What repeats the test.
        hardware: The machine that sent the load.
        versions: The software that sent the load.
    """

    plan: Plan
    tally: Tally
    verdict: Verdict
    measured_at: datetime
    samples: int
    command: str
    hardware: dict[str, str]
    versions: dict[str, str]

    @property
    def planned_rps(self) -> float:
        """Requests per second that were due in the window; a closed loop has no plan, so as many as were sent."""
        return self.tally.requests / self.plan.duration_s

    @property
    def sent_rps(self) -> float:
        """Requests per second that left while the window was open."""
        return self.tally.on_time / self.plan.duration_s

    @property
    def throughput_rps(self) -> float:
        """Right answers per second that arrived while the window was open."""
        return sum(each.right for each in self.tally.intervals.values()) / self.plan.duration_s

    @property
    def latency(self) -> Percentiles:
        """From the planned send (closed loop: the actual send); failed requests count as slower than any other."""
        return Percentiles.of(self.tally.latency, failed=self.tally.failed)

    @property
    def service(self) -> Percentiles:
        """From the actual send, right answers only."""
        return Percentiles.of(self.tally.service)

    @property
    def send_lag(self) -> Percentiles:
        """How late the client itself was."""
        return Percentiles.of(self.tally.send_lag)

    @property
    def faults(self) -> list[tuple[str, FaultCount]]:
        """Failures by kind, most frequent first."""
        return sorted(self.tally.faults.items(), key=lambda item: -item[1].count)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON-serialisable values; the histograms are whole, so that runs can be merged later."""
        tally = self.tally
        return {
            "format": "torchport-loadtest",
            "format_version": FORMAT_VERSION,
            "ok": self.verdict.ok,
            "valid": self.verdict.valid,
            "invalid_reasons": list(self.verdict.invalid),
            "slo_met": self.verdict.slo_met,
            "missed": list(self.verdict.missed),
            "loop": "open" if self.plan.open_loop else "closed",
            "requests": tally.requests,
            "right": tally.right,
            "failed": tally.failed,
            "errors": {kind: {"count": fault.count, "example": fault.example} for kind, fault in self.faults},
            "target_rps": self.plan.rate_rps,
            "planned_rps": self.planned_rps,
            "sent_rps": self.sent_rps,
            "throughput_rps": self.throughput_rps,
            "latency_ms": asdict(self.latency),
            "service_ms": asdict(self.service),
            "send_lag_ms": asdict(self.send_lag) if self.plan.open_loop else None,
            "client_cpu_shares": tally.cpu_shares,
            "samples": self.samples,
            "seed": self.plan.seed,
            "command": self.command,
            "measured_at": self.measured_at.isoformat(timespec="seconds"),
            "plan": asdict(self.plan),
            "hardware": self.hardware,
            "versions": self.versions,
            "tally": tally.to_json(),
        }


def measure(
    plan: Plan,
    payloads: Sequence[Payload],
    *,
    token: str | None = None,
    command: str | None = None,
    on_progress: Callable[[float], None] | None = None,
) -> Result:
    """Runs one load test and judges it.

    Args:
        plan: What to do.
        payloads: Request bodies, at least one.
        token: Bearer token, or None.
        command: What the report names as the way to repeat the test; by default the plan as a command line.
        on_progress: Called often with the seconds since the start.

    Raises:
        RunError: The load generator failed.
    """
    tally = run_load(plan, payloads, token=token, on_progress=on_progress)
    return Result(
        plan=plan,
        tally=tally,
        verdict=judge(plan, tally),
        measured_at=datetime.now(UTC),
        samples=len(payloads),
        command=command or plan.command,
        hardware=describe_hardware(),
        versions=describe_versions(),
    )
