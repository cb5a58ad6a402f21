"""The served sections of gpu_limits.py: a model behind TorchServe, and behind stock TorchServe with its own handler."""

import asyncio
import contextlib
import importlib.util
import json
import multiprocessing
import os
import tempfile
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from gpu_points import LARGEST, PRECISION, Bench, Limit, measure_limit
from gpu_subjects import Subject
from serving_client import http_message
from serving_load import Load, closed_loop, open_loop

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
)
REQUESTS = 256
_SEED = 62
# Alternating, so that all servers see the same machine.
ROUNDS = 2
_CLOSED_S, _WARM_UP_S, _TINY_S = 3.0, 2.0, 0.5
# Requests in flight: as many as every worker can hold its share of while others are on their way.
IN_FLIGHT, _TINY_IN_FLIGHT = 1024, 16
# Clients: one alone would measure itself above some 15,000 requests a second.
CLIENTS = 4
# Shares of what the model does in process, from the highest.
RATES = (0.95, 0.92, 0.89, 0.87, 0.85, 0.83, 0.8, 0.76, 0.72, 0.66, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02)
_RATE_S, _TINY_RATE_S = 6.0, 1.0
_MOST_CLIENT_CPU = 0.9
_READY_S = 180.0
# Models of stock TorchServe, by precision.
_STOCK = {"stock_fp32": "fp32", "stock_bf16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to serve an archive.

    Attributes:
        label: For tables and the JSON.
        workers: Processes that compute, on the one GPU.
        environment: Beside the common settings.
    """

    label: str
    workers: int
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go.

    Attributes:
        address: Host and port.
        messages: Requests, ready to be sent.
    """

    address: tuple[str, int]
    messages: Sequence[bytes]


def measure_served(bench: Bench, name: str) -> Document | str:
    """Throughput behind TorchServe against in process, the rate within the SLO, and stock TorchServe beside it.

    All servers are up at the same time, since starting one takes long; those that are not asked wait, and compute
    nothing.
    """
    reason = obstacle()
    if reason is not None:
        return reason
    subject = bench.subjects[name]
    limit = bench.limits.get(name) or measure_limit(bench, subject)
    archive = pack_archive(bench, subject, "eager", PRECISION)
    own = ways(subject, cores=os.cpu_count() or 1, tiny=bench.tiny)
    with _all_serving(bench, subject, archive, own) as targets:
        rounds = [_closed_loops(bench, targets) for _ in range(ROUNDS)]
        served = {label: max(found[label].rate_rps for found in rounds) for label in targets}
        best = max((way.label for way in own), key=served.__getitem__)
        tried = slo_search(
            [share * limit.in_process_per_s for share in RATES if share * limit.in_process_per_s < served[best]],
            lambda rate: _open_loop(bench, targets[best], rate=rate, slo_ms=subject.slo_ms),
        )
    return {"in_flight": _in_flight(bench), **summary(subject, limit, rounds=rounds, best=best, tried=tried)}


def _in_flight(bench: Bench) -> int:
    return _TINY_IN_FLIGHT if bench.tiny else IN_FLIGHT


def summary(
    subject: Subject, limit: Limit, *, rounds: Sequence[Mapping[str, Load]], best: str, tried: Sequence[Document]
) -> Document:
    """The figures of a section."""
    served = {label: max(found[label].rate_rps for found in rounds) for label in rounds[0]}
    kept = [float(row["requests_per_s"]) for row in tried if row["kept"]]  # type: ignore[arg-type]
    slo = max(kept, default=None)
    return {
        "in_process_per_s": limit.in_process_per_s,
        "bare_module_per_s": limit.bare_module_per_s,
        "best_way": best,
        "served_per_s": served[best],
        "served_of_in_process": served[best] / limit.in_process_per_s,
        "served_of_bare_module": served[best] / limit.bare_module_per_s,
        **{f"{stock}_per_s": served[stock] for stock in _STOCK},
        **{f"times_{stock}": served[best] / served[stock] for stock in _STOCK if served[stock]},
        "slo_ms": subject.slo_ms,
        "slo_per_s": slo,
        "slo_of_in_process": None if slo is None else slo / limit.in_process_per_s,
        # A client that was too busy has not shown that the server is too slow.
        "slo_limited_by_the_client": any(not row["valid"] for row in tried) or None,
        "closed_loop": [
            {"served_by": label, **{f"round_{i + 1}_per_s": found[label].rate_rps for i, found in enumerate(rounds)}}
            | {"p99_ms": rounds[-1][label].percentile_ms(99), "faults": sum(rounds[-1][label].faults.values())}
            for label in served
        ],
        "open_loop": list(tried),
    }


def ways(subject: Subject, *, cores: int, tiny: bool) -> list[Way]:
    """How the archive is served: by few processes and by many; pictures also with JPEG decoded on the GPU."""
    counts = (1, 2) if tiny else sorted({1, max(2, cores // 4), max(2, cores // 2)})
    found = [Way(label=f"{count} worker{'s' if count > 1 else ''}", workers=count) for count in counts]
    if subject.shortest is None and not tiny and importlib.util.find_spec("torchvision") is not None:
        most = counts[-1]
        found.append(
            Way(label=f"{most} workers, JPEG on the GPU", workers=most, environment={"TORCHPORT_JPEG_ON_GPU": "1"})
        )
    return found


@contextlib.contextmanager
def _all_serving(bench: Bench, subject: Subject, archive: Path, own: Sequence[Way]) -> Iterator[dict[str, Target]]:
    """Every server, ready: torchport's by the labels of their ways, and stock TorchServe's two models."""
    # Imported here: they need what the obstacle is about.
    from gpu_stock import stock_serving

    from deploy.ports import LOOPBACK, Ports
    from deploy.server import TorchServe
    from deploy.state import STATE_VARIABLE
    from export.archive import open_archive

    requests = subject.requests(REQUESTS, seed=_SEED)
    modules = {label: bench.artifact_file(subject, "torchscript", precision) for label, precision in _STOCK.items()}
    opened = open_archive(archive)
    with contextlib.ExitStack() as stack:
        state = stack.enter_context(tempfile.TemporaryDirectory(prefix="torchport-serving-"))
        servers: dict[str, TorchServe] = {}
        for way in own:
            # As large as what is measured in process: an archive has 32, which suits a CPU.
            variables = {STATE_VARIABLE: state, "TORCHPORT_MAX_BATCH": str(LARGEST), **way.environment}
            with _environment(variables):
                server = TorchServe([opened], Ports.free(), workers=way.workers)
                servers[way.label] = stack.enter_context(server)
        stock = stack.enter_context(stock_serving(modules, device=bench.device.type))
        targets = {}
        for label, server in servers.items():
            server.wait_until_ready(_READY_S)
            path, token = f"/predictions/{opened.name}", server.state.inference_token()
            port = int(server.state.inference_url.rpartition(":")[2])
            targets[label] = Target(address=(LOOPBACK, port), messages=_messages(requests, path, token))
        stock.wait_until_ready()
        for label in modules:
            targets[label] = Target(address=stock.address, messages=_messages(requests, f"/predictions/{label}", ""))
        yield targets


def _messages(requests: Sequence[tuple[str, bytes]], path: str, token: str) -> list[bytes]:
    return [
        http_message("POST", path, token=token, headers=[("Content-Type", content_type)], body=body)
        for content_type, body in requests
    ]


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Some variables, for what is started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


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
    served = ServedModel.load(folder, threads=1, cuda_graphs=False)
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


def _closed_loops(bench: Bench, targets: Mapping[str, Target]) -> dict[str, Load]:
    """What each server does in a closed loop, one after the other."""
    seconds, warm_up_s = (_TINY_S, _TINY_S) if bench.tiny else (_CLOSED_S, _WARM_UP_S)
    in_flight = _in_flight(bench) // CLIENTS
    found = {}
    with _clients() as pool:
        for label, target in targets.items():
            jobs = [
                pool.submit(_closed_client, target.address, target.messages[i::CLIENTS], in_flight, seconds, warm_up_s)
                for i in range(CLIENTS)
            ]
            found[label] = merged([job.result() for job in jobs])
    return found


def _open_loop(bench: Bench, target: Target, *, rate: float, slo_ms: float) -> Document:
    """What a server does with requests that come at a rate, whatever it does."""
    seconds = _TINY_RATE_S if bench.tiny else _RATE_S
    with _clients() as pool:
        jobs = [
            pool.submit(_open_client, target.address, target.messages, rate / CLIENTS, seconds, seed)
            for seed in range(CLIENTS)
        ]
        return judged([job.result() for job in jobs], rate=rate, slo_ms=slo_ms)


def _clients() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(CLIENTS, mp_context=multiprocessing.get_context("spawn"))


def slo_search(rates: Sequence[float], measure: Callable[[float], Document]) -> list[Document]:
    """Find the highest rate that keeps the SLO, by halves: a rate is kept if a higher one is.

    Args:
        rates: From the highest.
        measure: Tries one; its row says whether it was ``kept``.

    Returns:
        Every rate that was tried, in the order of trying.
    """
    tried: list[Document] = []
    low, high = 0, len(rates)
    while low < high:
        middle = (low + high) // 2
        tried.append(measure(rates[middle]))
        if tried[-1]["kept"]:
            high = middle
        else:
            low = middle + 1
    return tried


def merged(loads: Sequence[Load]) -> Load:
    """What several clients saw together."""
    together = Load(seconds=array("d"))
    for load in loads:
        together.seconds.extend(load.seconds)
        together.faults.update(load.faults)
        together.pauses += load.pauses
    together.elapsed_s = max(load.elapsed_s for load in loads)
    together.client_cpu_share = max(load.client_cpu_share for load in loads)
    return together


def judged(loads: Sequence[Load], *, rate: float, slo_ms: float) -> Document:
    """What several clients saw together of one rate, and whether 99 of 100 answers came in time."""
    load = merged(loads)
    p99_ms = load.percentile_ms(99)
    valid = load.client_cpu_share <= _MOST_CLIENT_CPU and not load.pauses
    in_time = p99_ms is not None and p99_ms <= slo_ms and not load.faults
    return {
        "planned_per_s": rate,
        "requests_per_s": load.rate_rps,
        "p50_ms": load.percentile_ms(50),
        "p99_ms": p99_ms,
        "faults": sum(load.faults.values()),
        "client_cpu": load.client_cpu_share,
        "valid": valid,
        "kept": valid and in_time,
    }


def _open_client(
    address: tuple[str, int], messages: Sequence[bytes], rate_rps: float, seconds: float, seed: int
) -> Load:
    """One client's share, in a process of its own."""
    return asyncio.run(open_loop(address, messages, rate_rps=rate_rps, seconds=seconds, seed=seed))


def _closed_client(
    address: tuple[str, int], messages: Sequence[bytes], in_flight: int, seconds: float, warm_up_s: float
) -> Load:
    """One client's share, in a process of its own."""
    return asyncio.run(closed_loop(address, messages, in_flight=in_flight, seconds=seconds, warm_up_s=warm_up_s))
