"""The limit: the same artifact on the same threads in this process, with no server, no HTTP and no JSON.

Two of decoded samples. In arrival order, batches of 32 padded to their longest, is what a server that batches as
requests come can reach. Grouped by length, all requests sorted first, is what nobody can pass with this artifact. And
those of whole requests, decoding and encoding included: see `compare_whole.py`.

`python -m loadtest.compare_limit JOB RECORD` runs it in a process of its own: torch's threads are set once a process.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from handlers.allocator import keep_freed_memory
from handlers.decoder import Decoded
from loadtest.compare_answers import Expected, expect
from loadtest.compare_load import own_environment
from loadtest.compare_plan import usable_cores
from loadtest.compare_requests import is_file
from loadtest.compare_whole import Whole, measure_whole
from loadtest.errors import RunError
from loadtest.files import write_atomically
from loadtest.payloads import Payload
from loadtest.peers.model import PeerModel
from loadtest.peers.settings import MAX_BATCH, PeerSettings

# Requests in the queue that is batched; drawn like the client's.
_QUEUE = 512
_GRACE_S = 120.0
_STRIDE = 4
_ORDERS = ("arrival", "grouped")


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What one artifact computes in process.

    Attributes:
        arrival_per_s: Samples per second, batches in arrival order, padded.
        grouped_per_s: Samples per second, batches of samples of like size.
        whole: Of whole requests.
        expected: For each body, what a right answer says.
    """

    arrival_per_s: float
    grouped_per_s: float
    whole: Whole
    expected: tuple[Expected, ...]


def measure_limit(folder: Path, bodies: Sequence[Payload], *, threads: int, duration_s: float, seed: int) -> Limit:
    """Measures an artifact in a process of its own, and asks for its answers.

    Args:
        folder: The extracted archive.
        bodies: Requests of one sample each, all of one kind.
        threads: Of one batch.
        duration_s: Seconds: half for both orders, which take turns, half for whole requests.
        seed: Decides the order of arrival.

    Raises:
        RunError: It fails, or takes far longer.
    """
    document = {"folder": str(folder), "bodies": [body.to_json() for body in bodies], "threads": threads}
    with tempfile.TemporaryDirectory(prefix="torchport-limit-") as work:
        job, record = Path(work) / "job.json", Path(work) / "record.json"
        job.write_text(json.dumps({**document, "duration_s": duration_s, "seed": seed}), encoding="utf-8")
        environment = {**own_environment(), "OMP_NUM_THREADS": str(threads)}
        try:
            done = subprocess.run(
                [sys.executable, "-P", "-m", "loadtest.compare_limit", str(job), str(record)],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=duration_s + _GRACE_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise RunError(
                f"the model was not measured in process within {duration_s + _GRACE_S:.0f} s; send fewer or smaller "
                "inputs"
            ) from error
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise RunError(f"the model cannot be run in process: {reason}; see `torchport inspect --verify`")
        found = json.loads(record.read_bytes())
    return Limit(
        arrival_per_s=found["arrival"],
        grouped_per_s=found["grouped"],
        whole=Whole.from_json(found["whole"]),
        expected=expect(found["answers"]),
    )


def run_job(job: dict[str, Any]) -> dict[str, Any]:
    """Answers every body, then times both orders in turn, then whole requests."""
    keep_freed_memory()  # as torchport's workers do
    model = PeerModel.load(PeerSettings(folder=Path(job["folder"]), port=0, threads=job["threads"]))
    bodies = [Payload.from_json(body) for body in job["bodies"]]

    def read(body: bytes) -> Decoded:
        return model.decode_file(body) if files else model.decode(json.loads(body))

    files = is_file(bodies[0])
    requests = [read(body.body) for body in bodies]
    answers = [model.predict([request])[0] for request in requests]
    dice = random.Random(job["seed"])
    drawn = [dice.randrange(len(requests)) for _ in range(_QUEUE)]
    queue = [requests[i] for i in drawn]
    duration_s = job["duration_s"] / 2
    batches = {"arrival": _cut(queue), "grouped": _cut(sorted(queue, key=_size))}
    times: dict[str, list[list[float]]] = {order: [[] for _ in batches[order]] for order in _ORDERS}
    start_s = time.perf_counter()
    turn = 0
    # A few batches of one order, then as many of the other: what else the machine does hits both alike.
    while turn == 0 or time.perf_counter() - start_s < duration_s:
        for order in _ORDERS:
            # A stride over the whole queue, so that a pass that is cut short has seen short and long batches.
            for number in range(turn % _STRIDE, len(batches[order]), _STRIDE):
                began_s = time.perf_counter()
                model.predict(batches[order][number])
                times[order][number].append(time.perf_counter() - began_s)
        turn += 1
    whole = measure_whole(
        model,
        read,
        [bodies[i].body for i in drawn],
        lanes=max(1, len(usable_cores()) // job["threads"]),
        duration_s=duration_s,
    )
    rates = {order: _rate(batches[order], times[order]) for order in _ORDERS}
    return {"answers": answers, "whole": whole.to_json(), **rates}


def _rate(batches: Sequence[Sequence[Decoded]], times: Sequence[Sequence[float]]) -> float:
    """Samples per second, by the median time of each batch: one that something else held up does not count."""
    timed = [(len(batch), statistics.median(seconds)) for batch, seconds in zip(batches, times, strict=True) if seconds]
    return sum(count for count, _ in timed) / max(sum(seconds for _, seconds in timed), 1e-9)


def _size(request: Decoded) -> int:
    return sum(array.size for sample in request.samples for array in sample.values())


def _cut(requests: Sequence[Decoded]) -> list[Sequence[Decoded]]:
    return [requests[i : i + MAX_BATCH] for i in range(0, len(requests), MAX_BATCH)]


if __name__ == "__main__":
    write_atomically(Path(sys.argv[2]), json.dumps(run_job(json.loads(Path(sys.argv[1]).read_bytes()))).encode())
