"""When an open loop sends its requests."""

import random
from collections.abc import Iterator


def poisson_arrivals(*, rate_rps: float, duration_s: float, seed: int, stream: int = 0) -> Iterator[float]:
    """Yields the planned send times of a Poisson process, in seconds from its start.

    Independent users produce Poisson arrivals, and the sum of P independent Poisson processes of rate R/P is one
    of rate R: that is why each load process may run a stream of its own.

    Args:
        rate_rps: Mean arrivals per second.
        duration_s: No arrival at or after this time.
        seed: The same seed and stream give the same times.
        stream: Which of several independent processes this is.
    """
    # A string seed is hashed whole, so neighbouring seeds and streams do not give related sequences.
    generator = random.Random(f"arrivals/{seed}/{stream}")
    planned_s = generator.expovariate(rate_rps)
    while planned_s < duration_s:
        yield planned_s
        planned_s += generator.expovariate(rate_rps)
