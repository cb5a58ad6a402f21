"""Broken requests among good ones: no answer of 5xx, no restarted worker, and every good answer right?

    python tests/benchmarks/serving_fuzz.py model_store/digits.mar model_store/tickets.mar
    python tests/benchmarks/serving_fuzz.py --count 20000 --seed 7 model_store/digits.mar
    python tests/benchmarks/serving_fuzz.py --seed 7 --only 1234 model_store/digits.mar    # one case again, shown

For each of `--count` broken requests (serving_mutations.py: whole HTTP, wrong inside; serving_raw.py: hardly HTTP) one
golden sample is sent, `--in-flight` at a time, so that they share batches. What is whole HTTP must be answered, and not
with 5xx; what is not may be refused in any way, or closed, but not with 5xx either. That TorchServe's own Java answers
pipelined requests in the order in which they are ready is known and counted by itself (`known`). Exit code 1 on
anything else; the last line is JSON, with the index and the answer of the first twenty findings.
"""

import argparse
import asyncio
import itertools
import json
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from serving_client import Pool, Reply
from serving_load import say_json
from serving_mutations import Case, make_case
from serving_raw import RawCase, make_raw_case, run_raw
from serving_server import Known, Server, golden_answers, golden_message, serving

RAW_SHARE = 0.1
FINDINGS_KEPT = 20
# Of the server's log, when a worker ended: why.
LAST_WORDS = re.compile(r"CRITICAL|WorkerThread|OutOfMemory")
PROGRESS_S = 10.0
# Broken connections hold their place for up to half a second, without work for anybody: they get places of their own.
RAW_PLACES = 64


@dataclass(kw_only=True)
class Tally:
    """What came back."""

    good: int = 0
    wrong: int = 0
    broken: int = 0
    by_status: Counter[str] = field(default_factory=Counter)
    by_kind: Counter[str] = field(default_factory=Counter)
    known: Counter[str] = field(default_factory=Counter)
    paused: int = 0
    without_json: int = 0
    finding_kinds: Counter[str] = field(default_factory=Counter)
    findings: list[dict[str, object]] = field(default_factory=list)

    def find(self, index: int, kind: str, what: str, reply: Reply) -> None:
        """Something that must not be."""
        self.finding_kinds[f"{what}: {kind}"] += 1
        if len(self.findings) < FINDINGS_KEPT:
            shown = reply.body[:300].decode("utf-8", "replace")
            self.findings.append({"index": index, "kind": kind, "what": what, "answer": shown or reply.fault})


@dataclass(frozen=True, kw_only=True)
class Fuzzed:
    """The end of a run."""

    tally: Tally
    restarted: bool
    tracebacks: int
    seconds: float

    @property
    def ok(self) -> bool:
        return not self.tally.finding_kinds and not self.tally.wrong and not self.restarted

    def to_document(self) -> dict[str, object]:
        tally = self.tally
        return {
            "ok": self.ok,
            "good": tally.good,
            "wrong": tally.wrong,
            "broken": tally.broken,
            "by_status": dict(sorted(tally.by_status.items())),
            "by_kind": dict(tally.by_kind.most_common()),
            "known": dict(tally.known),
            "paused": tally.paused,
            "errors_without_json": tally.without_json,
            "restarted": self.restarted,
            "tracebacks_in_log": self.tracebacks,
            "seconds": round(self.seconds, 1),
            "requests_per_s": round((tally.good + tally.broken) / self.seconds, 1),
            "finding_kinds": dict(tally.finding_kinds.most_common()),
            "findings": tally.findings,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archives", nargs="+", type=Path)
    parser.add_argument("--count", type=int, default=100_000, help="broken requests; as many good ones go with them")
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit-minutes", type=float, default=30.0, help="sends nothing more after this")
    parser.add_argument("--only", type=int, metavar="INDEX", help="send one case and show it")
    options = parser.parse_args()
    with serving(options.archives, workers=options.workers) as server:
        known = [one for archive in server.archives for one in golden_answers(archive)]
        if options.only is not None:
            asyncio.run(show(server, known, options.seed, options.only))
            return
        fuzzed = fuzz(
            server,
            known,
            count=options.count,
            in_flight=options.in_flight,
            seed=options.seed,
            limit_s=options.limit_minutes * 60,
            progress=True,
        )
    say_json({"archives": [path.stem for path in options.archives], "seed": options.seed, **fuzzed.to_document()})
    sys.exit(not fuzzed.ok)


def make(index: int, known: Sequence[Known], seed: int, token: str) -> Case | RawCase:
    """The broken request of an index: always the same for the same archives and seed, but for its token."""
    chance = random.Random(f"{seed}/{index}")
    return (make_raw_case if chance.random() < RAW_SHARE else make_case)(chance, known, token)


def fuzz(
    server: Server,
    known: Sequence[Known],
    *,
    count: int,
    in_flight: int,
    seed: int,
    limit_s: float = 1800.0,
    progress: bool = False,
) -> Fuzzed:
    before = server.worker_pids()
    started = time.monotonic()
    tally = asyncio.run(
        send_all(
            server, known, count=count, in_flight=in_flight, seed=seed, deadline=started + limit_s, progress=progress
        )
    )
    seconds = time.monotonic() - started
    log = server.torchserve.log_file.read_text(errors="replace")
    restarted = server.worker_pids() != before
    if restarted:
        print("\n".join(line for line in log.splitlines() if LAST_WORDS.search(line)), file=sys.stderr)
    return Fuzzed(
        tally=tally,
        restarted=restarted,
        tracebacks=log.count("Traceback (most recent call last)"),
        seconds=seconds,
    )


async def send_all(
    server: Server,
    known: Sequence[Known],
    *,
    count: int,
    in_flight: int,
    seed: int,
    deadline: float,
    progress: bool,
) -> Tally:
    tally, token = Tally(), server.token()
    good = [(one, golden_message(one, token)) for one in known]
    indices = itertools.takewhile(lambda _: time.monotonic() < deadline, range(count))
    raw_places = asyncio.Semaphore(RAW_PLACES)
    raw_tasks: set[asyncio.Task[None]] = set()
    async with Pool(server.address) as pool:

        async def one_place(mine: Iterator[int]) -> None:
            for index in mine:
                await send_good(pool, *good[index % len(good)], index, tally)
                case = make(index, known, seed, token)
                tally.broken += 1
                if isinstance(case, Case):
                    await send_case(pool, case, index, tally)
                else:
                    await raw_places.acquire()
                    task = asyncio.create_task(send_raw(pool, server.address, case, index, tally))
                    raw_tasks.add(task)
                    task.add_done_callback(lambda done: (raw_places.release(), raw_tasks.discard(done)))

        places = [asyncio.create_task(one_place(indices)) for _ in range(in_flight)]
        said = time.monotonic()
        while not all(place.done() for place in places):
            await asyncio.wait(places, timeout=1.0)
            if progress and time.monotonic() - said > PROGRESS_S:
                said = time.monotonic()
                print(f"{tally.broken} of {count}, findings: {dict(tally.finding_kinds)}", file=sys.stderr, flush=True)
        await asyncio.gather(*places, *raw_tasks)
        tally.paused = pool.watch.count
    return tally


async def send_good(pool: Pool, one: Known, message: bytes, index: int, tally: Tally) -> None:
    reply = await pool.send_again(message)
    tally.good += 1
    if not is_right(one, reply):
        tally.wrong += 1
        tally.find(index, one.model, f"a good request got {reply.status}", reply)


def is_right(one: Known, reply: Reply) -> bool:
    try:
        return reply.status == 200 and one.is_right(json.loads(reply.body))
    except ValueError:
        return False


async def send_case(pool: Pool, case: Case, index: int, tally: Tally) -> None:
    reply = await pool.send_again(case.message, keep=case.reusable)
    tally.by_status[str(reply.status or reply.fault)] += 1
    tally.by_kind[case.kind.partition("+")[0]] += 1
    if not reply.status:
        tally.find(index, case.kind, f"no answer ({reply.fault})", reply)
    elif reply.status >= 500:
        tally.find(index, case.kind, str(reply.status), reply)
    elif reply.status >= 400 and not is_error(reply):
        tally.without_json += 1


def is_error(reply: Reply) -> bool:
    """Whether an error says in JSON what is wrong: in our form, or in TorchServe's."""
    try:
        document = json.loads(reply.body)
    except ValueError:
        return False
    # Not its message: an exception that Java has thrown often comes without one, once its code is compiled.
    return isinstance(document, dict) and ("error" in document or document.keys() >= {"code", "type"})


async def send_raw(pool: Pool, address: tuple[str, int], case: RawCase, index: int, tally: Tally) -> None:
    while True:
        began = time.perf_counter()
        replies = await run_raw(case, address)
        missing = len(replies) < len(case.right) or any(not reply.status for reply in replies)
        if not missing or not await pool.watch.stopped_since(began):
            break
    tally.by_kind[f"raw {case.kind}"] += 1
    for reply in replies:
        tally.by_status[f"raw {reply.status or reply.fault}"] += 1
        if reply.status >= 500:
            tally.find(index, f"raw {case.kind}", str(reply.status), reply)
    if not replies:
        tally.by_status["raw closed or silent"] += 1
    right = [is_right(one, reply) for one, reply in zip(case.right, replies, strict=False)]
    if sum(right) == len(case.right):
        return
    if is_right_in_some_order(case.right, replies):
        tally.known["pipelined, answered out of order"] += 1
    else:
        last = replies[-1] if replies else Reply(status=0, body=b"", fault="no answer")
        tally.find(index, f"raw {case.kind}", f"{sum(right)} right answers of {len(case.right)}", last)


def is_right_in_some_order(expected: Sequence[Known], replies: Sequence[Reply]) -> bool:
    left = list(expected)
    for reply in replies:
        found = next((one for one in left if is_right(one, reply)), None)
        if found is None:
            return False
        left.remove(found)
    return not left


async def show(server: Server, known: Sequence[Known], seed: int, index: int) -> None:
    """Send one case alone."""
    case = make(index, known, seed, server.token())
    print(case.kind)
    if isinstance(case, Case):
        print(case.message[:3000])
        async with Pool(server.address) as pool:
            replies = [await pool.send(case.message)]
    else:
        print([(piece[:1000], pause_s) for piece, pause_s in case.pieces])
        replies = await run_raw(case, server.address)
    for reply in replies:
        print(reply.status, reply.fault, reply.body[:1000])
    time.sleep(1)  # for the log
    print(server.torchserve.log_file.read_text(errors="replace")[-4000:])


if __name__ == "__main__":
    main()
