"""Ranking: which of several measured artifacts is the fastest, and whether that is more than chance."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from export.speed import Timing

# From the most exact one down: fp16 keeps three bits more than bf16.
PRECISION_ORDER = ("fp32", "fp16", "bf16", "int8")
# Two files with the same code differ by this much from one process to the next: memory lies elsewhere.
_LEAST_MARGIN = 0.02
# Of the standard error. The median of normally distributed values scatters 1.25 times as much as their mean.
_ERRORS = 2.0
_OF_MEDIAN = 1.2533
# Of the median distance from the median to the standard deviation of normally distributed values. One round in which
# somebody else had the core moves a standard deviation, but not this.
_OF_DISTANCE = 1.4826


@dataclass(frozen=True, kw_only=True, slots=True)
class Advantage:
    """How many times as fast one artifact is as another, over all shapes.

    Attributes:
        factor: Geometric mean over the shapes of the median over the rounds.
        margin: The share by which it may be off.
    """

    factor: float
    margin: float

    @property
    def is_tie(self) -> bool:
        """Whether chance may have decided which one is faster."""
        return abs(math.log(self.factor)) <= self.margin


@dataclass(frozen=True, kw_only=True, slots=True)
class Winner:
    """The artifact to serve.

    Attributes:
        name: Its name.
        reason: Why it is this one: a sentence.
        samples_per_s: Geometric mean over the shapes.
    """

    name: str
    reason: str
    samples_per_s: float


def speed_of(timings: Sequence[Timing]) -> float:
    """Samples computed in a second: the geometric mean over the shapes, in which each counts the same."""
    return math.exp(statistics.fmean(math.log(timing.samples_per_s) for timing in timings))


def times_as_fast(own: Timing, other: Timing) -> float:
    """How many times as fast one artifact is as another with one shape: the median over the rounds they shared."""
    return statistics.median(b / a for a, b in zip(own.rounds_s, other.rounds_s, strict=True))


def compare(own: Sequence[Timing], other: Sequence[Timing]) -> Advantage:
    """Compare two artifacts that took turns in the same rounds."""
    logs, variances = [], []
    for mine, theirs in zip(own, other, strict=True):
        rounds = [math.log(b / a) for a, b in zip(mine.rounds_s, theirs.rounds_s, strict=True)]
        logs.append(statistics.median(rounds))
        scatter = _OF_DISTANCE * statistics.median(abs(value - logs[-1]) for value in rounds)
        variances.append((_OF_MEDIAN * scatter) ** 2 / len(rounds))
    error = math.sqrt(sum(variances)) / len(variances)
    return Advantage(factor=math.exp(statistics.fmean(logs)), margin=max(_LEAST_MARGIN, _ERRORS * error))


def choose(timings: Mapping[str, Sequence[Timing]], precisions: Mapping[str, str]) -> Winner:
    """Choose the fastest artifact; where several are as fast as chance can tell, the most exact of them.

    Args:
        timings: By name, at least one, all measured in the same rounds.
        precisions: By name.
    """
    speeds = {name: speed_of(own) for name, own in timings.items()}
    order = sorted(speeds, key=lambda name: -speeds[name])
    fastest = order[0]
    tied = [name for name in order if name == fastest or compare(timings[fastest], timings[name]).is_tie]
    # The sort is stable: among equals the faster one stays first.
    name = min(tied, key=lambda one: PRECISION_ORDER.index(precisions[one]))
    return Winner(name=name, reason=_reason(name, order, tied, timings), samples_per_s=speeds[name])


def _reason(name: str, order: Sequence[str], tied: Sequence[str], timings: Mapping[str, Sequence[Timing]]) -> str:
    if len(order) == 1:
        return "nothing else was measured that passed"
    if name != order[0]:
        lead = compare(timings[order[0]], timings[name])
        return (
            f"{order[0]} is {lead.factor:.2f} times as fast, which is within the noise of {lead.margin:.0%}, "
            f"and {name} is the more exact of the two"
        )
    rival = order[1]
    lead = compare(timings[name], timings[rival])
    if rival in tied:
        return (
            f"{lead.factor:.2f} times as fast as {rival}, which is within the noise of {lead.margin:.0%}, "
            "and none of those as fast is more exact"
        )
    return f"the fastest, {lead.factor:.2f} times as fast as the next one, {rival}"
