"""Times on a device, and what the device can do at most, for gpu_limits.py."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Times calls on a device: wall time until the device is done, since launching is part of what is measured.

    Attributes:
        device: Where the calls compute.
        round_s: How long a round should take.
    """

    device: torch.device
    round_s: float

    def synchronise(self) -> None:
        """Wait until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], object]) -> float:
        """Of one call: the median over the rounds, warmed up."""
        return self.take_turns({"": run})[""]

    def take_turns(self, runs: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        """Seconds of one call of each, by name; they take turns within a round, so that all see the same machine."""
        times: dict[str, list[float]] = {name: [] for name in runs}
        repeats = {name: self._repeats(run) for name, run in runs.items()}
        for number in range(ROUNDS):
            for name in list(runs) if number % 2 else list(runs)[::-1]:
                times[name].append(self._once(runs[name], repeats[name]))
        return {name: statistics.median(found) for name, found in times.items()}

    def _repeats(self, run: Callable[[], object]) -> int:
        self._once(run, 2)
        return max(1, int(self.round_s / max(self._once(run, 1), 1e-6)))

    def _once(self, run: Callable[[], object], repeats: int) -> float:
        self.synchronise()
        started = time.perf_counter()
        for _ in range(repeats):
            run()
        self.synchronise()
        return (time.perf_counter() - started) / repeats


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the device was measured to do at most.

    Attributes:
        flops_per_s: Of one large bf16 matrix product.
        bytes_per_s: Of one large copy, bytes read and bytes written together.
    """

    flops_per_s: float
    bytes_per_s: float

    @classmethod
    def measure(cls, clock: Clock, *, tiny: bool) -> "Ceilings":
        """Random numbers: products of zeros run faster than any model's."""
        size, length = (256, 1 << 20) if tiny else (8192, 1 << 31)
        left, right = (torch.randn(size, size, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
        product = torch.empty_like(left)
        matrix_s = clock.seconds(lambda: torch.mm(left, right, out=product))
        source = torch.randint(0, 255, (length,), device=clock.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        copy_s = clock.seconds(lambda: target.copy_(source))
        return cls(flops_per_s=2 * size**3 / matrix_s, bytes_per_s=2 * length / copy_s)
