"""Closed and open loops for the serving_*.py scripts."""

import asyncio
import contextlib
import json
import random
import time
from array import array
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from serving_client import Pool, Reply

# Why an open loop has not sent a request that it had planned.
NO_ROOM = "in-flight limit"


@dataclass(kw_only=True)
class Load:
    """What a load saw.

    Attributes:
        seconds: Of each request that was answered 200.
        faults: Of the others, by kind.
        elapsed_s: How long it all took.
        client_cpu_share: Of one core.
        pauses: How often this process was stopped meanwhile, so that the figures are not the server's.
    """

    seconds: array = field(default_factory=lambda: array("d"))
    faults: Counter[str] = field(default_factory=Counter)
    elapsed_s: float = 0.0
    client_cpu_share: float = 0.0
    pauses: int = 0

    def add(self, reply: Reply, seconds: float) -> None:
        if reply.status == 200:
            self.seconds.append(seconds)
        else:
            self.faults[reply.fault or f"HTTP {reply.status}"] += 1

    @property
    def rate_rps(self) -> float:
        return len(self.seconds) / self.elapsed_s if self.elapsed_s else 0.0

    def percentile_ms(self, level: float) -> float | None:
        return float(np.quantile(self.seconds, level / 100, method="inverted_cdf")) * 1e3 if self.seconds else None

    def to_document(self) -> dict[str, object]:
        p50, p99 = self.percentile_ms(50), self.percentile_ms(99)
        return {
            "requests_per_s": round(self.rate_rps, 1),
            "p50_ms": None if p50 is None else round(p50, 3),
            "p99_ms": None if p99 is None else round(p99, 3),
            "answered": len(self.seconds),
            "faults": dict(self.faults),
            "client_cpu_share": round(self.client_cpu_share, 3),
            "pauses": self.pauses,
        }


@contextlib.asynccontextmanager
async def _measured(load: Load) -> AsyncIterator[None]:
    started, busy = time.perf_counter(), time.process_time()
    yield
    load.elapsed_s += time.perf_counter() - started
    load.client_cpu_share = (time.process_time() - busy) / max(time.perf_counter() - started, 1e-9)


async def closed_loop(
    address: tuple[str, int], messages: Sequence[bytes], *, in_flight: int, seconds: float, warm_up_s: float = 1.0
) -> Load:
    """So many requests in flight for so long, each sent when the one before is answered: capacity, not latency."""
    warm, load = Load(), Load()
    async with Pool(address) as pool:
        for target, duration in ((warm, warm_up_s), (load, seconds)):
            stop = time.perf_counter() + duration

            async def one(number: int, target: Load = target, stop: float = stop) -> None:
                while (before := time.perf_counter()) < stop:
                    reply = await pool.send(messages[number % len(messages)])
                    target.add(reply, time.perf_counter() - before)
                    number += in_flight

            async with _measured(target):
                await asyncio.gather(*(one(number) for number in range(in_flight)))
        load.pauses = pool.watch.count
    return load


async def open_loop(
    address: tuple[str, int],
    messages: Sequence[bytes],
    *,
    rate_rps: float,
    seconds: float,
    seed: int,
    load: Load | None = None,
    most_in_flight: int = 1000,
    stop: Callable[[], bool] = lambda: False,
) -> Load:
    """Requests at random times (Poisson), whatever the server does; timed from the planned send.

    A request for which there is no room among those in flight counts as a fault, never as one that was not planned.
    """
    load = load or Load()
    chance = random.Random(seed)
    running: set[asyncio.Task[None]] = set()
    async with Pool(address) as pool:

        async def one(message: bytes, planned: float) -> None:
            load.add(await pool.send(message), time.perf_counter() - planned)

        async with _measured(load):
            planned = time.perf_counter()
            end = planned + seconds
            while (planned := planned + chance.expovariate(rate_rps)) < end and not stop():
                if (ahead := planned - time.perf_counter()) > 0:
                    await asyncio.sleep(ahead)
                if len(running) >= most_in_flight:
                    load.faults[NO_ROOM] += 1
                    await asyncio.sleep(0)
                    continue
                task = asyncio.create_task(one(chance.choice(messages), planned))
                running.add(task)
                task.add_done_callback(running.discard)
            await asyncio.gather(*running)
        load.pauses += pool.watch.count
    return load


def say_json(document: dict[str, object]) -> None:
    """The last line of a script."""
    print(json.dumps(document), flush=True)
