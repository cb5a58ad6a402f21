"""Metrics of a worker: counted at every batch, written for TorchServe's Prometheus page once in a while.

TorchServe takes metrics as lines on the worker's stdout. It would be one line for every value observed, at the price of
some tens of microseconds each on both sides, and its own histograms have buckets that suit none of these values. So
histograms are kept here, and what has been added to their buckets since the last time is written as counters, in the
form that Prometheus knows: ``NAME_bucket`` with the label ``le``, ``NAME_sum`` and ``NAME_count``.
"""

from __future__ import annotations

import bisect
import itertools
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

STAGE_SECONDS = "torchport_stage_seconds"
BATCH_SAMPLES = "torchport_batch_samples"
PADDING_SHARE = "torchport_padding_share"
ANSWERS = "torchport_answers_total"
SAMPLES = "torchport_samples_total"

STAGES = ("decode", "wait", "compute", "encode")

_SECONDS = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_BUCKETS: dict[str, Sequence[float]] = {
    STAGE_SECONDS: _SECONDS,
    BATCH_SAMPLES: (1, 2, 4, 8, 16, 32, 64, 128, 256),
    PADDING_SHARE: (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7),
}
_PERIOD_S = 1.0

Labels = tuple[tuple[str, str], ...]


@dataclass(slots=True)
class _Histogram:
    """What was observed of one name and one set of labels.

    Attributes:
        counts: How many values fell between two bounds; the last one, above all of them.
        total: The sum of the values.
    """

    counts: list[int]
    total: float = 0.0


class Meter:
    """Adds up what happens. Its methods take a microsecond; one thread may add while another one takes."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counters: Counter[tuple[str, Labels]] = Counter()
        self._histograms: dict[tuple[str, Labels], _Histogram] = {}

    def count(self, name: str, amount: float = 1, labels: Labels = ()) -> None:
        """Add to a counter."""
        with self._lock:
            self._counters[name, labels] += amount  # type: ignore[assignment]  # Counter takes any number

    def observe(self, name: str, value: float, labels: Labels = ()) -> None:
        """Add a value to one of the histograms named above."""
        place = bisect.bisect_left(_BUCKETS[name], value)
        with self._lock:
            histogram = self._histograms.get((name, labels))
            if histogram is None:
                histogram = self._histograms[name, labels] = _Histogram([0] * (len(_BUCKETS[name]) + 1))
            histogram.counts[place] += 1
            histogram.total += value

    def take(self) -> dict[tuple[str, Labels], float]:
        """What was added since the last time: counters, and of each histogram the counters that Prometheus knows."""
        with self._lock:
            counters, self._counters = self._counters, Counter()
            histograms, self._histograms = self._histograms, {}
        added: dict[tuple[str, Labels], float] = dict(counters)
        for (name, labels), histogram in histograms.items():
            added[f"{name}_sum", labels] = histogram.total
            added[f"{name}_count", labels] = sum(histogram.counts)
            bounds = (*(f"{bound:g}" for bound in _BUCKETS[name]), "+Inf")
            # Cumulative, as Prometheus has them.
            for bound, count in zip(bounds, itertools.accumulate(histogram.counts), strict=True):
                if count:
                    added[f"{name}_bucket", (*labels, ("le", bound))] = count
        return added


class Emitter:
    """Writes what a meter adds up to stdout, from a thread of its own.

    Args:
        meter: What to write.
        labels: Of every metric, such as the model's name.
        write: Takes text; by default to stdout.
        period_s: Seconds between two times.
    """

    def __init__(
        self,
        meter: Meter,
        labels: Labels,
        *,
        write: Callable[[str], object] | None = None,
        period_s: float = _PERIOD_S,
    ) -> None:
        self._meter = meter
        self._labels = labels
        self._write = write or _to_stdout
        self._period_s = period_s
        self._host = socket.gethostname()

    def start(self) -> None:
        """Begin; it ends with the process."""
        threading.Thread(target=self._run, name="torchport-metrics", daemon=True).start()

    def emit(self) -> None:
        """Write what there is."""
        now = int(time.time())
        lines = [
            f"[METRICS]{name}.Count:{amount:.9f}|#{_shown((*self._labels, *labels))}|#type:COUNTER"
            f"|#hostname:{self._host},{now}\n"
            for (name, labels), amount in self._meter.take().items()
        ]
        if lines:
            self._write("".join(lines))

    def _run(self) -> None:
        while True:
            time.sleep(self._period_s)
            self.emit()


def _shown(labels: Labels) -> str:
    return ",".join(f"{name}:{value}" for name, value in labels)


def _to_stdout(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
