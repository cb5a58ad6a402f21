"""Mutated signatures, recipes, thresholds and configurations: one clear sentence each, never a traceback.

    python tests/benchmarks/mutated_files.py [--count 10000] [--commands 500] [--seed 0]

Each file is read by the functions that the commands call; some of those that are refused also go through the command
itself. What breaks the rule is printed with its seed, and so is one message of each kind with --messages. The last
line is JSON.
"""

import argparse
import collections
import contextlib
import json
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from file_mutations import MUTATIONS, write
from typer.testing import CliRunner

import torchport
from export.checkpoint import load_checkpoint
from export.thresholds import Thresholds, load_thresholds
from export.yaml_file import read_arguments
from handlers.artifact import PRECISIONS
from models.recipe import load_recipe
from models.recipe_yaml import built_in_recipes

ROOT = Path(__file__).parents[2]
LONGEST_MESSAGE = 400
SECONDS_A_FILE = 10  # the slowest takes 1.5 s on a core of its own: 1,000 brackets, each perhaps a key
FACTORY = "torch.nn:Identity"  # takes any arguments, and has no weights that could fail to fit

IMAGE = {
    "format_version": 1,
    "task": "image-classification",
    "inputs": [{"name": "pixels", "dtype": "float32", "shape": ["batch", 3, 32, 32], "minimum": -3, "maximum": 3}],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 3]}],
    "labels": ["red", "green", "blue"],
    "preprocessing": {
        "image": {
            "mode": "RGB",
            "height": 32,
            "width": 32,
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "max_pixels": 16777216,
        }
    },
}
TEXT = {
    "format_version": 1,
    "task": "text-classification",
    "inputs": [
        {"name": "input_ids", "dtype": "int64", "shape": ["batch", "length"], "maximum": 999},
        {"name": "attention_mask", "dtype": "int64", "shape": ["batch", "length"]},
    ],
    "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 2]}],
    "labels": ["good", "bad"],
    "preprocessing": {"text": {"tokenizer": "tokenizer.json", "max_length": 64, "pad_id": 0}},
}
TENSOR = {
    "format_version": 1,
    "task": "tensor",
    "inputs": [
        {"name": "audio", "dtype": "float32", "shape": ["batch", 80, "frames"], "padding": 0.0, "minimum": -1.0},
        {"name": "speaker", "dtype": "int64", "shape": ["batch"], "minimum": 0, "maximum": 9},
    ],
    "outputs": [
        {"name": "hidden", "dtype": "float32", "shape": ["batch", "frames", 384]},
        {"name": "pooled", "dtype": "float64", "shape": ["batch", 384]},
    ],
    "axes": {"frames": {"minimum": 100, "maximum": 3000}},
    "artifact": {
        "format": "eager",
        "precision": "bf16",
        "file": "weights.pt",
        "device": "cuda",
        "requires": {"torch": "2.13.0", "isa": "avx512"},
        "module": {"factory": "mypackage.model:build", "config": {"layers": 4, "names": ["a"]}},
    },
}
THRESHOLDS = {**Thresholds.of("int8").to_document(), "fp32": {"atol": 1e-3}, "int8": {"noise": 0.2, "atol": None}}
CONFIG = {"hidden_dim": 64, "widths": [32, 64], "dropout": 0.1, "name": "small", "nested": {"bias": True, "eps": None}}


class TooSlowError(BaseException):
    """A file took longer to read than it may. No Exception, so that no reader takes it for one of its own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One kind of file.

    Attributes:
        read: What the commands read it with.
        arguments: The command line that reads it, for the file's path.
        originals: Good files by their endings.
        names: Pattern of what an error names when it does not name the file.
    """

    read: Callable[[Path], object]
    arguments: Callable[[Path], list[str]]
    originals: tuple[tuple[str, bytes], ...]
    names: str = r"(?!)"


@dataclass(kw_only=True, slots=True)
class Found:
    """What came of all files.

    Attributes:
        outcomes: Files by kind and by what came of them.
        faults: What broke the rule.
        messages: One message of each kind of error.
        slowest_s: Of a file.
        commands: Files that went through the command line.
    """

    outcomes: collections.Counter[tuple[str, str]] = field(default_factory=collections.Counter)
    faults: list[str] = field(default_factory=list)
    messages: dict[str, str] = field(default_factory=dict)
    slowest_s: float = 0.0
    commands: int = 0


def kinds(folder: Path) -> dict[str, Kind]:
    """Every kind of file. The folder gets what they need beside them."""
    weights, signature = folder / "weights.pt", folder / "good.json"
    torch.save({}, weights)
    signature.write_bytes(write(TENSOR, as_json=True))
    (folder / "tokenizer.json").write_text("{}")
    export = ["export", str(weights), "--model", FACTORY, "--out", str(folder / "store")]

    def both(document: Any) -> list[tuple[str, bytes]]:
        return [(".yaml", write(document, as_json=False)), (".json", write(document, as_json=True))]

    return {
        "signature": Kind(
            read=lambda path: load_checkpoint(weights, factory=FACTORY, signature_file=path),
            arguments=lambda path: [*export, "--signature", str(path)],
            originals=tuple(one for document in (IMAGE, TEXT, TENSOR) for one in both(document)),
        ),
        "recipe": Kind(
            read=lambda path: load_recipe(str(path)),
            arguments=lambda path: ["train", str(path), "--out", str(folder / "run")],
            originals=tuple(
                (".yaml", (ROOT / "models" / "recipes" / f"{name}.yaml").read_bytes()) for name in built_in_recipes()
            ),
            names=r"\b(data|model|trainer|optimizer|tracking)\.\w+",
        ),
        "thresholds": Kind(
            read=lambda path: [load_thresholds(path, precision) for precision in PRECISIONS],
            arguments=lambda path: [*export, "--signature", str(signature), "--thresholds", str(path)],
            originals=tuple(both(THRESHOLDS)),
        ),
        "configuration": Kind(
            read=lambda path: load_checkpoint(
                weights, factory=FACTORY, signature_file=signature, config=read_arguments(path)
            ),
            arguments=lambda path: [*export, "--signature", str(signature), "--config", str(path)],
            originals=tuple(both(CONFIG)),
        ),
    }


def run(folder: Path, *, count: int, commands: int, seed: int) -> Found:
    """Read ``count`` mutated files, and give some of the refused ones to the command line."""
    found, known = Found(), kinds(folder)
    shares = {"signature": 0.45, "recipe": 0.35, "thresholds": 0.1, "configuration": 0.1}
    runner, app = CliRunner(), torchport.build_app()
    for number in range(count):
        chance = random.Random(f"{seed} {number}")  # so that one file can be made again without the others
        name = chance.choices(list(shares), weights=list(shares.values()))[0]
        kind = known[name]
        ending, content = chance.choice(kind.originals)
        way = chance.choice(list(MUTATIONS))
        path = folder / f"mutated{ending}"
        path.write_bytes(MUTATIONS[way](chance, content))
        refused = _read_one(found, kind, path, name, f"{name} {ending} {way} {number}")
        if refused and found.commands < commands and chance.random() < max(0.1, 2 * commands / count):
            found.commands += 1
            _run_command(found, kind, path, runner, app, f"{name} {ending} {way} {number}")
    return found


def _read_one(found: Found, kind: Kind, path: Path, name: str, where: str) -> bool:
    """Whether a file is refused; anything but a good reading or a good refusal is noted."""
    started = time.monotonic()
    outcome = "read"
    try:
        with _at_most(SECONDS_A_FILE):
            kind.read(path)
    except TooSlowError:
        outcome = "fault"
        found.faults.append(f"{where}: took more than {SECONDS_A_FILE} s")
    except Exception as error:
        complaint = _complaint(error, path, kind.names)
        outcome = "refused" if complaint is None else "fault"
        if complaint is not None:
            found.faults.append(f"{where}: {complaint}: {type(error).__name__}: {str(error)[:600]!r}")
        found.messages.setdefault(re.sub(r"'.*'|\d+|\".*\"", "_", str(error)), str(error).replace(str(path), path.name))
    found.slowest_s = max(found.slowest_s, time.monotonic() - started)
    found.outcomes[name, outcome] += 1
    return outcome == "refused"


def _complaint(error: Exception, path: Path, names: str) -> str | None:
    """What is wrong with an error's message; None if nothing is."""
    if not getattr(error, "user_facing", False):
        return "not an error for users"
    message = str(error)
    short = message.replace(str(path), path.name)
    if not message.strip() or "Traceback" in message:
        return "an empty message, or a traceback in it"
    if len(short.splitlines()) != 1 or not short.isprintable():
        return "not one line of printable text"
    if len(short) > LONGEST_MESSAGE:
        return f"{len(short)} characters long"
    if path.name not in message and not re.search(names, message):
        return "names neither the file nor the field"
    return None


def _run_command(found: Found, kind: Kind, path: Path, runner: CliRunner, app: Any, where: str) -> None:
    """What was refused is refused by the command as well, with one line and exit code 1, and nothing is written."""
    before = sorted(path.parent.iterdir())
    result = runner.invoke(app, kind.arguments(path))
    lines = result.stderr.strip().splitlines()
    if result.exit_code != 1 or len(lines) != 1 or not lines[0].startswith("Error: ") or "defect" in lines[0]:
        found.faults.append(f"{where}: the command ends with {result.exit_code} and says {result.stderr[-600:]!r}")
    if sorted(path.parent.iterdir()) != before:
        found.faults.append(f"{where}: the command leaves something behind")


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TooSlowError

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def peak_memory_mb() -> float:
    """The most memory that this process has ever had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1 << 20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--commands", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--messages", action="store_true", help="print one message of each kind")
    arguments = parser.parse_args()
    started, before_mb = time.monotonic(), peak_memory_mb()
    with tempfile.TemporaryDirectory() as folder:
        found = run(Path(folder), count=arguments.count, commands=arguments.commands, seed=arguments.seed)
    if arguments.messages:
        print(*sorted(found.messages.values()), sep="\n")
    print(*found.faults, sep="\n" if found.faults else "")
    print(f"{'':<16}{'read':>8}{'refused':>10}{'fault':>8}")
    for name in sorted({name for name, _ in found.outcomes}):
        print(
            f"{name:<16}"
            + "".join(
                f"{found.outcomes[name, what]:>{width}}" for what, width in (("read", 8), ("refused", 10), ("fault", 8))
            )
        )
    result = {
        "files": sum(found.outcomes.values()),
        **{what: sum(n for (_, one), n in found.outcomes.items() if one == what) for what in ("read", "refused")},
        "commands": found.commands,
        "faults": len(found.faults),
        "kinds_of_messages": len(found.messages),
        "slowest_s": round(found.slowest_s, 3),
        "memory_grown_mb": round(peak_memory_mb() - before_mb),
        "seconds": round(time.monotonic() - started, 1),
        "seed": arguments.seed,
    }
    print(json.dumps(result))
    sys.exit(1 if found.faults else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
