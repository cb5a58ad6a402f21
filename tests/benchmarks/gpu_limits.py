"""What one GPU can do with a model, and what torchport makes of it: the figures of docs/gpu.md, in one command.

    python tests/benchmarks/gpu_limits.py [--budget 500] [--section NAME ...] [--out FILE]
    python tests/benchmarks/gpu_limits.py --device cpu --tiny     a rehearsal without a GPU, in some minutes

An encoder of BERT-base's size on texts of 16 to 256 tokens, and a ResNet-50 on images of 224 x 224, both in bf16 with
random weights. The best information comes first, and what the budget does not allow is left out and said so:

    ceilings          a large matrix product and a large copy: what the card does at most
    encoder, images   samples per second by batch size, in process, NumPy to NumPy, and the shares of both ceilings;
                      CUDA graphs against plain launches; agreement with fp32 on the CPU
    serve-encoder,    behind TorchServe, by one process and by several: throughput, and the highest rate at which 99 of
    serve-images      100 answers come in time; and stock TorchServe with its own handler. Needs TorchServe and Java
    formats-encoder,  TorchScript, AOTInductor and ONNX Runtime beside eager, with CUDA graphs and without ("plain");
    formats-images    with --torch-compile the bare module that torch.compile makes, too

Tables come as they are measured, and at the end one of what was wanted and what was found. The last line is JSON.
"""

import argparse
import datetime
import json
import math
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from types import FrameType

import torch
from gpu_clock import Clock
from gpu_points import Bench, measure_formats, measure_in_process
from gpu_serving import measure_served
from gpu_subjects import ENCODER, IMAGES, build_subjects
from gpu_verdicts import verdicts
from rich.console import Console
from rich.table import Table

Document = dict[str, object]

BUDGET_S = 500.0
# By section: about how many seconds it takes on an H200, as long as nobody has measured it. With less left it does not
# begin, and it is stopped after twice as many, so that the others have their turn.
SECTIONS = {
    "ceilings": 5.0,
    ENCODER: 60.0,
    IMAGES: 45.0,
    f"serve-{ENCODER}": 140.0,
    f"serve-{IMAGES}": 140.0,
    f"formats-{ENCODER}": 90.0,
    f"formats-{IMAGES}": 90.0,
}
_MOST_TIMES = 2.0
_ROUND_S, _TINY_ROUND_S = 0.25, 0.01
_NO_GPU = "torch finds no CUDA GPU here; run this where one is, or rehearse with --device cpu --tiny"


class OutOfTimeError(BaseException):
    """A section took longer than what was left. No Exception: what is measured handles those of models by itself."""


def main() -> None:
    """Measure section by section, and end with JSON."""
    arguments = _parsed()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        sys.exit(_NO_GPU)
    if arguments.device == "cpu" and not arguments.tiny:
        sys.exit("the full models take a CPU hours; add --tiny")
    console = Console(width=120)
    deadline = time.monotonic() + arguments.budget
    document: Document = {"machine": _machine(arguments.device), "tiny": arguments.tiny, "not_measured": {}}
    with tempfile.TemporaryDirectory(prefix="torchport-gpu-") as folder:
        bench = Bench(
            device=torch.device(arguments.device),
            folder=Path(folder),
            subjects=build_subjects(tiny=arguments.tiny),
            clock=Clock(device=torch.device(arguments.device), round_s=_TINY_ROUND_S if arguments.tiny else _ROUND_S),
            formats=tuple(arguments.format or ()),
            tiny=arguments.tiny,
            torch_compile=arguments.torch_compile,
        )
        for name in arguments.section or SECTIONS:
            limit_s = deadline - time.monotonic() if arguments.tiny else _MOST_TIMES * SECTIONS[name]
            needed_s = 0 if arguments.tiny else SECTIONS[name]
            _run(name, bench, document, console, deadline=deadline, needed_s=needed_s, limit_s=limit_s)
    wanted = verdicts(document)
    document["verdicts"] = wanted
    for table in tables("wanted and found", {"verdicts": wanted}):
        console.print(table)
    line = json.dumps(finite(document), allow_nan=False)
    if arguments.out:
        arguments.out.write_text(line + "\n", encoding="utf-8")
    print(line, flush=True)


def finite(value: object) -> object:
    """The same with None for what JSON has no numbers for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, list) else value


def _run(
    name: str,
    bench: Bench,
    document: Document,
    console: Console,
    *,
    deadline: float,
    needed_s: float,
    limit_s: float,
) -> None:
    """One section; why it was not measured goes into the document instead of its figures."""
    skipped: dict[str, str] = document["not_measured"]  # type: ignore[assignment]
    left_s = deadline - time.monotonic()
    started = time.monotonic()
    if left_s < needed_s:
        skipped[name] = f"{left_s:.0f} s were left of the budget, and it takes about {needed_s:.0f}"
    else:
        try:
            limit_s = min(left_s, limit_s)
            with _limited(limit_s):
                result = _measure(name, bench)
            if isinstance(result, str):
                skipped[name] = result
            else:
                document[name] = {**result, "seconds": round(time.monotonic() - started, 1)}
                for table in tables(name, result):
                    console.print(table)
        except OutOfTimeError:
            skipped[name] = f"it did not end within {limit_s:.0f} s"
        except Exception as error:  # one section's failure must not cost the others
            console.print_exception()
            skipped[name] = f"it failed: {type(error).__name__}: {' '.join(str(error).split())[:400]}"
    if name in skipped:
        console.print(f"{name}: not measured: {skipped[name]}", markup=False, highlight=False)


def _measure(name: str, bench: Bench) -> Document | str:
    """A section's figures, or why there are none."""
    if name == "ceilings":
        return asdict(bench.ceilings)
    what, _, subject = name.rpartition("-")
    steps: dict[str, Callable[[], Document | str]] = {
        "": lambda: measure_in_process(bench, subject),
        "serve": lambda: measure_served(bench, subject),
        "formats": lambda: measure_formats(bench, subject),
    }
    return steps[what]()


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raise in the main thread when the time is over. What is in a C++ call ends that first."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def tables(name: str, result: Document) -> Iterator[Table]:
    """A section's figures for people: one table for each list of rows, and one for the rest."""
    plain = {key: value for key, value in result.items() if not isinstance(value, list)}
    for key, rows in result.items():
        if isinstance(rows, list) and rows:
            columns = list(dict.fromkeys(column for row in rows for column in row))
            table = Table(title=f"{name}: {_words(key)}", title_justify="left")
            for column in columns:
                table.add_column(_words(column), justify="right")
            for row in rows:
                table.add_row(*(_shown(row.get(column)) for column in columns))
            yield table
    if plain:
        table = Table(title=name, title_justify="left", show_header=False)
        for key, value in plain.items():
            table.add_row(_words(key), _shown(value))
        yield table


def _words(name: str) -> str:
    return name.replace("_per_s", "/s").replace("_", " ")


def _shown(value: object) -> str:
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.3e}"


def _machine(device: str) -> Document:
    """Hardware, versions and the command: figures mean nothing without them."""
    found: Document = {
        "device": device,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": " ".join(sys.argv),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "cuda": torch.version.cuda,
        **{name: _version(name) for name in ("torch", "triton", "onnxruntime-gpu", "torchserve", "torchvision")},
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "gpu_memory_bytes": properties.total_memory, "driver": _driver()}
    return found


def _processor() -> str:
    """Its name."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def _driver() -> str | None:
    """The version of NVIDIA's driver; None where nobody says it."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.splitlines()[0].strip() if done.stdout.strip() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models: only whether everything runs")
    parser.add_argument("--budget", type=float, default=BUDGET_S, metavar="SECONDS", help="for all sections together")
    parser.add_argument("--section", action="append", choices=SECTIONS, metavar="NAME", help="only this one; repeats")
    parser.add_argument("--format", action="append", metavar="NAME", help="of the formats sections; repeats")
    parser.add_argument("--torch-compile", action="store_true", help="the formats sections take minutes longer")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the JSON goes too")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
