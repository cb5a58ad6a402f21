"""Latency histograms: exact enough, small, and mergeable."""

import io
import math
from collections.abc import Iterator, Sequence
from typing import Self

from hdrh.histogram import HdrHistogram

LOWEST_US = 1
HIGHEST_US = 3_600_000_000  # one hour


class Histogram:
    """Durations in an HdrHistogram, recorded in microseconds.

    Histograms are merged, percentiles never are: the mean of two p99 is not the p99 of anything.

    Args:
        digits: Significant digits kept; 3 bounds the error of a percentile to 0.1 %.
    """

    def __init__(self, *, digits: int = 3) -> None:
        self._histogram = HdrHistogram(LOWEST_US, HIGHEST_US, digits)

    def __len__(self) -> int:
        """How many durations were recorded."""
        return int(self._histogram.get_total_count())

    def record(self, duration_s: float) -> None:
        """Adds one duration in seconds; below a microsecond counts as one, above an hour as an hour."""
        self._histogram.record_value(min(max(round(duration_s * 1e6), LOWEST_US), HIGHEST_US))

    def add(self, other: "Histogram") -> None:
        """Adds every duration of another histogram."""
        self._histogram.add(other._histogram)

    def percentiles_ms(self, levels: Sequence[float], *, failed: int = 0) -> list[float | None]:
        """Durations that the given shares of all requests did not exceed.

        Args:
            levels: Percentiles, 0 < level <= 100.
            failed: Requests without a duration. They count as slower than every recorded one, so that a server
                cannot improve its percentiles by failing.

        Returns:
            Milliseconds by level; None where the level falls among the failed, or nothing was recorded.
        """
        count = len(self)
        # Ranks are counted exactly; 1e-9 keeps 99.9 % of 1000 at the 999th despite binary fractions.
        ranks = [max(1, math.ceil(level / 100 * (count + failed) - 1e-9)) for level in levels]
        # The library rounds `level / 100 * count + 0.5` down to a rank, which inverts exactly for whole ranks.
        answered = {rank: rank / count * 100 for rank in ranks if rank <= count}
        values = self._histogram.get_percentile_to_value_dict(list(answered.values())) if answered else {}
        return [values[answered[rank]] / 1e3 if rank in answered else None for rank in ranks]

    def max_ms(self) -> float | None:
        """The longest duration in milliseconds; None when nothing was recorded."""
        return float(self._histogram.get_max_value()) / 1e3 if len(self) else None

    def curve_ms(self) -> Iterator[tuple[float, float]]:
        """Yields (percentile, milliseconds) with ever finer steps towards 100 %."""
        for step in self._histogram.get_percentile_iterator(5):
            yield step.percentile_level_iterated_to, step.value_iterated_to / 1e3

    def to_hgrm(self) -> bytes:
        """The percentile distribution in milliseconds, as HdrHistogram's own plotters read it."""
        buffer = io.BytesIO()
        self._histogram.output_percentile_distribution(buffer, 1000.0)
        # Left out: hdrhistogram 0.10.8 scales the mean to milliseconds but not the standard deviation beside it.
        lines = buffer.getvalue().splitlines(keepends=True)
        return b"".join(line for line in lines if not line.startswith(b"#[Mean"))

    def encode(self) -> str:
        """The whole histogram in HdrHistogram's compressed base64 form."""
        encoded = self._histogram.encode()
        return encoded.decode("ascii") if isinstance(encoded, bytes) else str(encoded)

    @classmethod
    def decode(cls, encoded: str) -> Self:
        """The inverse of `encode`."""
        histogram = cls.__new__(cls)
        histogram._histogram = HdrHistogram.decode(encoded)
        return histogram
