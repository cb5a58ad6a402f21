"""What happened to the requests: counted in each load process, then merged."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

from loadtest.answers import Fault
from loadtest.histogram import Histogram


def _coarse_histogram() -> Histogram:
    # Two digits: a tenth of the memory, and a plot shows no more. There is one for every second.
    return Histogram(digits=2)


@dataclass(slots=True, kw_only=True)
class FaultCount:
    """Failures of one kind.

    Attributes:
        count: How many.
        example: Detail of the first one.
    """

    count: int
    example: str


@dataclass(slots=True, kw_only=True)
class Interval:
    """One step of the plots over time.

    Attributes:
        requests: Requests whose planned send falls in the interval.
        latency: Durations of the right answers among those.
        right: Right answers that arrived in the interval, whenever their requests were sent.
        failed: Requests that failed in the interval, whenever they were sent.
    """

    requests: int = 0
    latency: Histogram = field(default_factory=_coarse_histogram)
    right: int = 0
    failed: int = 0


@dataclass(slots=True, kw_only=True)
class Tally:
    """Counts and histograms of the measured window.

    Attributes:
        requests: Requests planned in the window: right answers plus faults.
        on_time: Requests that left while the window was open.
        latency: From the planned send (closed loop: the actual send) to the whole right answer.
        service: From the actual send to the whole right answer.
        send_lag: From the planned to the actual send.
        faults: Failures by kind.
        intervals: By number, from the start of the window.
        cpu_shares: For each load process, the share of one core it used during the window.
    """

    requests: int = 0
    on_time: int = 0
    latency: Histogram = field(default_factory=Histogram)
    service: Histogram = field(default_factory=Histogram)
    send_lag: Histogram = field(default_factory=Histogram)
    faults: dict[str, FaultCount] = field(default_factory=dict)
    intervals: dict[int, Interval] = field(default_factory=dict)
    cpu_shares: list[float] = field(default_factory=list)

    @property
    def failed(self) -> int:
        """Requests without a right answer."""
        return sum(fault.count for fault in self.faults.values())

    @property
    def right(self) -> int:
        """Requests with a right answer."""
        return len(self.latency)

    def interval(self, number: int) -> Interval:
        """The interval of that number, made on first use."""
        return self.intervals.setdefault(number, Interval())

    def count_fault(self, fault: Fault) -> None:
        """Adds one failed request."""
        self._add_faults(fault.kind, FaultCount(count=1, example=fault.detail))

    def add(self, other: "Tally") -> None:
        """Adds another load process's tally of the same test."""
        self.requests += other.requests
        self.on_time += other.on_time
        self.latency.add(other.latency)
        self.service.add(other.service)
        self.send_lag.add(other.send_lag)
        self.cpu_shares += other.cpu_shares
        for kind, faults in other.faults.items():
            self._add_faults(kind, faults)
        for number, theirs in other.intervals.items():
            ours = self.interval(number)
            ours.requests += theirs.requests
            ours.right += theirs.right
            ours.failed += theirs.failed
            ours.latency.add(theirs.latency)

    def _add_faults(self, kind: str, faults: FaultCount) -> None:
        known = self.faults.setdefault(kind, FaultCount(count=0, example=faults.example))
        known.count += faults.count

    def to_json(self) -> dict[str, Any]:
        """The tally as JSON-serialisable values."""
        return {
            "requests": self.requests,
            "on_time": self.on_time,
            "latency": self.latency.encode(),
            "service": self.service.encode(),
            "send_lag": self.send_lag.encode(),
            "faults": {kind: [fault.count, fault.example] for kind, fault in self.faults.items()},
            "intervals": [
                [number, each.requests, each.latency.encode(), each.right, each.failed]
                for number, each in self.intervals.items()
            ],
            "cpu_shares": self.cpu_shares,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> Self:
        """The inverse of `to_json`."""
        return cls(
            requests=document["requests"],
            on_time=document["on_time"],
            latency=Histogram.decode(document["latency"]),
            service=Histogram.decode(document["service"]),
            send_lag=Histogram.decode(document["send_lag"]),
            faults={kind: FaultCount(count=n, example=text) for kind, (n, text) in document["faults"].items()},
            intervals={
                number: Interval(requests=requests, latency=Histogram.decode(latency), right=right, failed=failed)
                for number, requests, latency, right, failed in document["intervals"]
            },
            cpu_shares=document["cpu_shares"],
        )


def merge_tallies(tallies: Iterable[Tally]) -> Tally:
    """One tally of what several load processes saw."""
    merged = Tally()
    for tally in tallies:
        merged.add(tally)
    return merged
