"""Whether a measurement can be believed, and whether what was asked holds."""

from dataclasses import dataclass

from loadtest.plan import Plan
from loadtest.tally import Tally

MIN_ACHIEVED = 0.99
MIN_REQUESTS_FOR_P99 = 100  # with fewer, the p99 is just the slowest request


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The judgement on one load test.

    Attributes:
        invalid: Reasons why the numbers cannot be believed; empty for a valid measurement.
        missed: What was asked and does not hold; empty when all of it does.
        slo_met: Whether the latency objective was met; None without one, or when the measurement is invalid.
    """

    invalid: tuple[str, ...]
    missed: tuple[str, ...]
    slo_met: bool | None

    @property
    def valid(self) -> bool:
        """Whether the numbers can be believed."""
        return not self.invalid

    @property
    def ok(self) -> bool:
        """Whether the measurement is valid and everything that was asked holds."""
        return self.valid and not self.missed

    @property
    def headline(self) -> str:
        """The judgement in a word or three."""
        if not self.valid:
            return "INVALID"
        if self.slo_met is None:
            return "TOO MANY ERRORS" if self.missed else "VALID"
        return "SLO MET" if self.ok else "SLO MISSED"


def judge(plan: Plan, tally: Tally) -> Verdict:
    """Judges what was measured against what was planned."""
    invalid = tuple(_find_invalid(plan, tally))
    missed = [] if invalid else _find_missed(plan, tally)
    judged = plan.slo_p99_ms is not None and not invalid
    return Verdict(invalid=invalid, missed=tuple(missed), slo_met=not missed if judged else None)


def _find_invalid(plan: Plan, tally: Tally) -> list[str]:
    reasons = []
    if not tally.right:
        examples = "; ".join(f"{kind}: {fault.example}" for kind, fault in tally.faults.items())
        reasons.append(f"no request got a right answer ({examples or 'none was sent'})")
    for number, share in enumerate(tally.cpu_shares):
        if share > plan.max_client_cpu:
            reasons.append(
                f"load process {number} used {share:.0%} of its core (at most {plan.max_client_cpu:.0%}): "
                "it measured itself; use more --processes or a lower rate"
            )
    if plan.open_loop:
        reasons += _find_invalid_sends(plan, tally)
    if plan.slo_p99_ms is not None and tally.requests < MIN_REQUESTS_FOR_P99:
        reasons.append(
            f"only {tally.requests} requests were measured, a p99 needs {MIN_REQUESTS_FOR_P99}: raise --duration"
        )
    return reasons


def _find_invalid_sends(plan: Plan, tally: Tally) -> list[str]:
    reasons = []
    (lag_ms,) = tally.send_lag.percentiles_ms([99])
    if lag_ms is not None and lag_ms > plan.max_send_lag_ms:
        reasons.append(
            f"the client sent late: send lag p99 is {lag_ms:.1f} ms (at most {plan.max_send_lag_ms:g} ms); "
            "use more --processes, a lower rate, or another machine"
        )
    # Against the requests that were planned, not rate x duration: a Poisson process misses that by chance alone.
    if tally.on_time < MIN_ACHIEVED * tally.requests:
        reasons.append(
            f"only {tally.on_time} of {tally.requests} planned requests were sent in time "
            f"({tally.on_time / tally.requests:.1%}, at least {MIN_ACHIEVED:.0%}): the target rate was not reached"
        )
    return reasons


def _find_missed(plan: Plan, tally: Tally) -> list[str]:
    missed = []
    share = tally.failed / tally.requests
    if share > plan.max_error_share:
        missed.append(f"{share:.2%} of the requests failed (at most {plan.max_error_share:.2%})")
    if plan.slo_p99_ms is not None:
        (p99_ms,) = tally.latency.percentiles_ms([99], failed=tally.failed)
        if p99_ms is None:
            missed.append("p99 is unbounded: more than 1% of the requests failed")
        elif p99_ms > plan.slo_p99_ms:
            missed.append(f"p99 is {p99_ms:.1f} ms (objective {plan.slo_p99_ms:g} ms)")
    return missed
