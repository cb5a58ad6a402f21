"""Memory of workers and of the frontend under half an hour of steady load: does it grow?

    python tests/benchmarks/serving_soak.py model_store/digits.mar
    python tests/benchmarks/serving_soak.py --minutes 3 --share 0.5 model_store/tickets.mar

Saturation is measured by a short closed loop; then golden samples arrive at random times (open loop) at a share of it.
It is measured anew every minute: a shared machine does not stay as fast as it was, and 80 % of what it could do half an
hour ago may be more than it can do now. Resident memory is read every few seconds. Compared are the medians of half a
minute around the 5th minute, when everything is warm, and at the end: their ratio must be at most 1.02 for the workers
together. Exit code 1 if it is more, or any request failed; the last line is JSON. In it, `not_sent` are requests for
which a thousand others were still in flight, as happens where the machine gets slower within a minute by more than the
share leaves room for; the server has not seen them. `stolen_share` is what other machines took of the cores' time
(Linux). `--samples FILE` keeps every reading as CSV.
"""

import argparse
import asyncio
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from serving_load import NO_ROOM, Load, closed_loop, open_loop, say_json
from serving_server import Server, golden_answers, golden_message, serving

BOUND = 1.02
SATURATING_IN_FLIGHT = 64
SATURATION_S = 5.0
# Tokens expire after an hour; each piece of the load has a fresh one, and a rate for the machine as it is then.
PIECE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Reading:
    """Resident memory at one moment, in bytes."""

    after_s: float
    workers: int
    java: int
    worker_count: int


class Sampler(threading.Thread):
    """Reads resident memory until it is told to stop."""

    def __init__(self, server: Server, every_s: float) -> None:
        super().__init__(daemon=True)
        self._workers = [pid for pids in server.worker_pids().values() for pid in pids]
        self._java = server.java_pids()
        self._every_s = every_s
        self._ended = threading.Event()
        self.readings: list[Reading] = []

    def run(self) -> None:
        started = time.monotonic()
        while not self._ended.is_set():
            alive = [pid for pid in self._workers if psutil.pid_exists(pid)]
            self.readings.append(
                Reading(
                    after_s=time.monotonic() - started,
                    workers=sum(map(resident_bytes, alive)),
                    java=sum(map(resident_bytes, self._java)),
                    worker_count=len(alive),
                )
            )
            self._ended.wait(self._every_s)

    def stop(self) -> list[Reading]:
        self._ended.set()
        self.join()
        return self.readings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs="+", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--share", type=float, default=0.8, help="of saturation")
    parser.add_argument("--rate", type=float, help="requests a second, instead of a share of saturation")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--every-s", type=float, default=5.0, help="between two readings of the memory")
    parser.add_argument("--compare-minutes", type=float, default=5.0, help="when it is warm; a third of a shorter run")
    parser.add_argument("--samples", type=Path, help="CSV file of every reading")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with serving(options.archives, workers=options.workers) as server:
        known = [one for archive in server.archives for one in golden_answers(archive)]

        def messages() -> list[bytes]:
            token = server.token()
            return [golden_message(one, token) for one in known]

        pids = server.worker_pids()
        began, stolen = time.monotonic(), stolen_s()
        sampler = Sampler(server, options.every_s)
        saturations: list[float] = []
        rates: list[float] = []
        load, left_s = Load(), options.minutes * 60
        while left_s > 0:
            seconds = min(left_s, PIECE_S)
            saturation = asyncio.run(
                closed_loop(server.address, messages(), in_flight=SATURATING_IN_FLIGHT, seconds=SATURATION_S)
            )
            rate_rps = options.rate or options.share * saturation.rate_rps
            print(f"saturation {saturation.rate_rps:.0f} requests/s; {rate_rps:.0f} for {seconds:.0f} s", flush=True)
            if not sampler.is_alive():
                sampler.start()
            asyncio.run(
                open_loop(
                    server.address,
                    messages(),
                    rate_rps=rate_rps,
                    seconds=seconds,
                    seed=options.seed + len(rates),
                    load=load,
                )
            )
            left_s -= seconds
            saturations.append(saturation.rate_rps)
            rates.append(rate_rps)
            load.faults.update(saturation.faults)
            print(f"{load.to_document()}", flush=True)
        readings = sampler.stop()
        stolen_share = (stolen_s() - stolen) / (time.monotonic() - began) / (psutil.cpu_count() or 1)
        restarted = server.worker_pids() != pids
    not_sent = load.faults.pop(NO_ROOM, 0)
    if options.samples:
        write_csv(options.samples, readings)
    result = compare(readings, min(options.compare_minutes * 60, options.minutes * 20))
    ok = result["workers_ratio"] <= BOUND and not load.faults and not restarted
    say_json(
        {
            "ok": ok,
            "archives": [archive.name for archive in server.archives],
            "minutes": options.minutes,
            "saturations": [round(rate) for rate in saturations],
            "not_sent": not_sent,
            "stolen_share": round(stolen_share, 4),
            "rates": [round(rate) for rate in rates],
            **load.to_document(),
            **result,
            "bound": BOUND,
            "restarted": restarted,
        }
    )
    sys.exit(not ok)


def compare(readings: Sequence[Reading], warm_s: float) -> dict[str, float]:
    """Memory when warm and at the end, in megabytes, and their ratio: medians over half a minute, or a tenth."""
    width_s = min(30.0, readings[-1].after_s / 10)
    end_s = readings[-1].after_s

    def median(field: str, middle_s: float) -> float:
        near = [getattr(one, field) for one in readings if abs(one.after_s - middle_s) <= width_s]
        return float(statistics.median(near))

    found = {}
    for field in ("workers", "java"):
        warm, last = median(field, warm_s), median(field, end_s)
        found |= {
            f"{field}_warm_mb": round(warm / 1e6, 2),
            f"{field}_end_mb": round(last / 1e6, 2),
            f"{field}_ratio": round(last / warm, 4),
        }
    return {"warm_after_s": round(warm_s, 1), **found}


def stolen_s() -> float:
    """Seconds of the cores together that the hypervisor gave to others; 0 where nobody says."""
    return float(getattr(psutil.cpu_times(), "steal", 0.0))


def resident_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it ended
        return 0


def write_csv(path: Path, readings: Sequence[Reading]) -> None:
    lines = [f"{one.after_s:.1f},{one.workers},{one.java},{one.worker_count}" for one in readings]
    path.write_text("\n".join(["seconds,workers_bytes,java_bytes,worker_count", *lines]) + "\n")


if __name__ == "__main__":
    main()
