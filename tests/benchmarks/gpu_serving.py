"""The served sections of gpu_limits.py: a model behind TorchServe, and behind stock TorchServe with a plain handler."""

import asyncio
import json
import multiprocessing
import os
import subprocess
import sys
from array import array
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

import torch
from gpu_points import IN_FLIGHT, LARGEST, PRECISION, Bench, planned_seconds
from gpu_subjects import Subject
from serving_client import http_message
from serving_load import Load, open_loop

from deploy.errors import JavaError
from deploy.java import find_java
from export.candidate import Candidate, Source, prepare
from export.combinations import TRACE, Combination
from export.thresholds import Thresholds
from handlers.model import ServedModel

Document = dict[str, object]

# What packing and serving need beside torchport's own imports. Provenance asks for the versions of some.
_PACKAGES = (
    "torchport",
    "torchserve",
    "torch-model-archiver",
    "tokenizers",
    "onnx",
    "onnxscript",
    "boltons",
    "platformdirs",
    "psutil",
    "httpx",
    "hdrhistogram",
    "jinja2",
    "matplotlib",
)
REQUESTS = 256
_SEED = 62
_COMPARE_S, _COMPARE_WARM_UP_S = 8.0, 4.0
_TINY_COMPARE_S = 2.0
# Clients of the open loop: one alone would measure itself above some 15,000 requests a second.
CLIENTS = 4
# Shares of the throughput in a closed loop, from the highest; the first at which answers come in time is the answer.
RATES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.3)
_RATE_S, _TINY_RATE_S = 5.0, 2.0
_MOST_CLIENT_CPU = 0.9


def measure_served(bench: Bench, name: str) -> Document | str:
    """Throughput behind TorchServe against in process, the rate within the SLO, and stock TorchServe beside it."""
    reason = obstacle()
    if reason is not None:
        return reason
    # Imported here: serving_server needs what the obstacle is about.
    from serving_server import serving

    subject = bench.subjects[name]
    archive = pack_archive(bench, subject, "eager", PRECISION)
    plain = pack_archive(bench, subject, "torchscript", "fp32")
    compared = _compare(bench, subject, archive, plain)
    users = str(_users(bench))
    ours, stock = (compared["systems"][system]["users"].get(users) for system in ("torchport", "torchserve"))
    in_process = _in_process(bench, subject)
    result: Document = {
        "requests_in_flight": int(users),
        "in_process_per_s": in_process,
        "served_per_s": None if ours is None else ours["rps"],
        "served_of_in_process": None if ours is None else ours["rps"] / in_process,
        "stock_per_s": None if stock is None else stock["rps"],
        "ratio_to_stock": None if ours is None or stock is None else ours["rps"] / stock["rps"],
        "invalid": "; ".join(compared["invalid_reasons"]) or None,
        "slo_ms": subject.slo_ms,
        "slo_per_s": None,
    }
    if ours is not None:
        with serving([archive]) as server:
            messages = [
                http_message(
                    "POST",
                    f"/predictions/{name}-eager-{PRECISION}",
                    token=server.token(),
                    headers=[("Content-Type", content_type)],
                    body=body,
                )
                for content_type, body in subject.requests(REQUESTS, seed=_SEED)
            ]
            tried = search(server.address, messages, throughput=ours["rps"], slo_ms=subject.slo_ms, tiny=bench.tiny)
        kept = [row for row in tried if row["kept"]]
        result |= {
            "slo_per_s": kept[-1]["requests_per_s"] if kept else None,
            "slo_of_in_process": kept[-1]["requests_per_s"] / in_process if kept else None,  # type: ignore[operator]
            "open_loop": tried,
        }
    return result


def obstacle() -> str | None:
    """Why nothing can be served here; None where it can."""
    absent = []
    for package in _PACKAGES:
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            absent.append(package)
    if absent:
        return f"these packages are not installed: {', '.join(absent)}"
    try:
        find_java()
    except JavaError as error:
        return str(error)
    return None


def pack_archive(bench: Bench, subject: Subject, format: str, precision: str) -> Path:
    """An archive of an artifact, without gates: tests/gpu has those."""
    # Imported here: it needs packages that the other sections do without.
    from export.pipeline import ExportOptions, pack

    folder = bench.artifact(subject, format, precision)
    weights, signature = bench.folder / f"{subject.name}.pt", bench.folder / f"{subject.name}.json"
    if not weights.exists():
        torch.save(subject.build().state_dict(), weights)
        signature.write_text(json.dumps(subject.document), encoding="utf-8")
    prepared = prepare(
        Source(path=weights, factory=subject.factory, signature_file=signature, config=dict(subject.config))
    )
    combination = Combination(format=format, precision=precision, device=bench.device.type)
    served = ServedModel.load(folder, threads=1)
    assert served.signature.artifact is not None
    candidate = Candidate(
        combination=combination,
        method=TRACE,
        folder=folder,
        artifact=served.signature.artifact,
        signature=served.signature,
        served=served,
        thresholds=Thresholds.of(precision),
        gates=(),
    )
    options = ExportOptions(
        source=weights,
        name=f"{subject.name}-{format}-{precision}",
        format=format,
        precision=precision,
        device=bench.device.type,
        out=bench.folder / "store",
        factory=subject.factory,
        signature_file=signature,
        factory_config=dict(subject.config),
    )
    archive = pack(options, prepared, candidate).archive
    assert archive is not None
    return archive


def _users(bench: Bench) -> int:
    return 16 if bench.tiny else IN_FLIGHT


def _compare(bench: Bench, subject: Subject, archive: Path, plain: Path) -> dict[str, dict]:  # type: ignore[type-arg]
    """`torchport compare` of both archives, as its JSON."""
    seconds = (_TINY_COMPARE_S, _TINY_COMPARE_S) if bench.tiny else (_COMPARE_S, _COMPARE_WARM_UP_S)
    words = ["compare", str(archive), "--reference", str(plain), "--peers", "torchserve", "--rounds", "1"]
    words += ["--users", str(_users(bench)), "--duration", str(seconds[0]), "--warm-up", str(seconds[1])]
    words += ["--out", str(bench.folder / f"compare-{subject.name}"), "--json"]
    if subject.shortest is None:
        size = subject.document["preprocessing"]["image"]["height"]
        words += ["--pictures", f"{size}x{size}"]
    else:
        place = bench.folder / f"requests-{subject.name}"
        place.mkdir(exist_ok=True)
        for number, (_, body) in enumerate(subject.requests(REQUESTS, seed=_SEED)):
            file = place / f"{number:03}.json"
            file.write_bytes(body)
            words += ["--input", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "torchport", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.strip().splitlines()
    document = json.loads(lines[-1]) if lines else {}
    if "systems" not in document:
        raise RuntimeError(f"torchport compare ended with {done.returncode}: {document or done.stderr[-400:]}")
    return document  # type: ignore[no-any-return]


def _in_process(bench: Bench, subject: Subject) -> float:
    """Samples per second through the planner, as many at once as requests are in flight; the better of its ways."""
    served = ServedModel.load(bench.artifact(subject, "eager", PRECISION), threads=1, max_batch=LARGEST)
    served.warm_up()
    served.measure_cost()
    samples = subject.samples(REQUESTS, seed=_SEED)
    return len(samples) / min(planned_seconds(bench, served, [samples]).values())


def search(
    address: tuple[str, int], messages: Sequence[bytes], *, throughput: float, slo_ms: float, tiny: bool
) -> list[Document]:
    """Try rates in an open loop, the highest first, until one keeps the SLO.

    Returns:
        Every rate that was tried; the last one is the answer if it was ``kept``.
    """
    tried: list[Document] = []
    with ProcessPoolExecutor(CLIENTS, mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, portion in enumerate(RATES):
            rate = portion * throughput
            loads = [
                pool.submit(_client, address, messages, rate / CLIENTS, _TINY_RATE_S if tiny else _RATE_S, seed)
                for seed in range(number * CLIENTS, (number + 1) * CLIENTS)
            ]
            row = judged([one.result() for one in loads], rate=rate, slo_ms=slo_ms)
            tried.append(row)
            if row["kept"]:
                break
    return tried


def judged(loads: Sequence[Load], *, rate: float, slo_ms: float) -> Document:
    """What several clients saw together of one rate, and whether 99 of 100 answers came in time."""
    merged = Load(seconds=array("d"))
    for load in loads:
        merged.seconds.extend(load.seconds)
        merged.faults.update(load.faults)
        merged.pauses += load.pauses
    merged.elapsed_s = max(load.elapsed_s for load in loads)
    cpu = max(load.client_cpu_share for load in loads)
    p99_ms = merged.percentile_ms(99)
    valid = cpu <= _MOST_CLIENT_CPU and not merged.pauses
    in_time = p99_ms is not None and p99_ms <= slo_ms and not merged.faults
    return {
        "planned_per_s": rate,
        "requests_per_s": merged.rate_rps,
        "p50_ms": merged.percentile_ms(50),
        "p99_ms": p99_ms,
        "faults": sum(merged.faults.values()),
        "client_cpu": cpu,
        "valid": valid,
        "kept": valid and in_time,
    }


def _client(address: tuple[str, int], messages: Sequence[bytes], rate_rps: float, seconds: float, seed: int) -> Load:
    """One client's share, in a process of its own."""
    return asyncio.run(open_loop(address, messages, rate_rps=rate_rps, seconds=seconds, seed=seed))
