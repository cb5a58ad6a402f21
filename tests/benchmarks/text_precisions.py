"""Every precision of a text classifier against fp32 on this CPU: size, agreement, accuracy, and speed by text length.

    torchport train sst2 -s data.folder=FOLDER --out runs/sst2
    python tests/benchmarks/text_precisions.py runs/sst2 --markdown table.md

The texts are those of the checkpoint's held-out split. They are grouped by their number of tokens, and each group runs
in batches of its own texts, padded as a worker pads them. One thread; all artifacts take turns within every round, so
that a machine which slows down slows all of them; ratios are medians over the rounds. The last line is JSON.
"""

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from export.candidate import Candidate, Prepared, Source, convert_and_check, prepare
from export.combinations import Combination, allowed
from export.errors import ExportError
from handlers.batching import stack
from handlers.isa import cpu_isa
from handlers.model import ServedModel
from handlers.tensors import TensorBatch

BASELINE = "torchscript fp32"
GROUPS = ((1, 8), (9, 16), (17, 32), (33, 64))
BATCH_SIZES = (1, 8, 32)
ROUNDS = 7
# Batches of a group in one round: enough texts to stand for it, few enough for a round of a second or so.
MAX_BATCHES = {1: 32, 8: 8, 32: 4}


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One artifact: what it gets right, and its speed by group and batch size."""

    name: str
    bytes: int
    agreement: float
    accuracy: float
    samples_per_s: dict[str, float]
    ratios: dict[str, float]
    failed_gates: tuple[str, ...]

    @property
    def mean_ratio(self) -> float:
        """Geometric mean over groups and batch sizes."""
        return math.exp(statistics.fmean(map(math.log, self.ratios.values())))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a text classifier")
    parser.add_argument("--skip-pt2", action="store_true", help="leave out AOTInductor, which compiles for minutes")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--markdown", type=Path, help="file to write the table to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    prepared = prepare(Source(path=arguments.run))
    with tempfile.TemporaryDirectory() as folder:
        combinations = [c for c in allowed("cpu") if not (arguments.skip_pt2 and c.format == "pt2")]
        candidates = convert_all(prepared, combinations, Path(folder))
        results = measure(prepared, candidates, rounds=arguments.rounds)
    table = markdown(results)
    print(table)
    if arguments.markdown:
        arguments.markdown.write_text(table)
    print(json.dumps(document(prepared, results)))


def convert_all(prepared: Prepared, combinations: Sequence[Combination], folder: Path) -> dict[str, Candidate]:
    """Converts and checks; what cannot be converted is said and left out."""
    candidates = {}
    for combination in combinations:
        name = f"{combination.format} {combination.precision}"
        place = folder / name.replace(" ", "-")
        place.mkdir()
        started = time.perf_counter()
        try:
            candidate = convert_and_check(prepared, combination, place, allow_slower=True)
        except ExportError as error:
            print(f"{name}: {error}", flush=True)
            continue
        failed = [gate.gate for gate in candidate.gates if not gate.passed]
        print(f"{name}: {time.perf_counter() - started:.0f} s, {f'fails {failed}' if failed else 'passes'}", flush=True)
        if candidate.served is not None:
            candidates[name] = candidate
    return candidates


def measure(prepared: Prepared, candidates: dict[str, Candidate], *, rounds: int) -> list[Measured]:
    served = {name: candidate.served for name, candidate in candidates.items() if candidate.served is not None}
    base = served[BASELINE]
    samples = [base.decode(request.parts())[0] for request in prepared.requests]
    labels = np.array([request.label for request in prepared.requests])
    predicted = {name: predict(model, samples) for name, model in served.items()}
    speeds: dict[str, dict[str, float]] = {name: {} for name in served}
    ratios: dict[str, dict[str, float]] = {name: {} for name in served}
    for shortest, longest in GROUPS:
        group = [sample for sample in samples if shortest <= len(sample["input_ids"]) <= longest]
        for size in BATCH_SIZES:
            batches = in_batches(base, group, size)
            if not batches:
                continue
            key = f"{shortest}-{longest} tokens, batch {size}"
            times = take_turns(served, batches, rounds=rounds)
            count = sum(len(batch["input_ids"]) for batch in batches)
            for name, seconds in times.items():
                speeds[name][key] = count / statistics.median(seconds)
                pairs = zip(times[BASELINE], seconds, strict=True)
                ratios[name][key] = statistics.median(fp32 / own for fp32, own in pairs)
            print(key, {name: round(ratios[name][key], 2) for name in served}, flush=True)
    return [
        Measured(
            name=name,
            bytes=(candidates[name].folder / candidates[name].artifact.file).stat().st_size,
            agreement=float((predicted[name] == predicted[BASELINE]).mean()),
            accuracy=float((predicted[name] == labels).mean()),
            samples_per_s=speeds[name],
            ratios=ratios[name],
            failed_gates=tuple(gate.gate for gate in candidates[name].gates if not gate.passed),
        )
        for name in served
    ]


def predict(model: ServedModel, samples: Sequence[TensorBatch]) -> np.ndarray:
    """The likeliest class of each sample."""
    rows = []
    for row in model.compute(list(samples)):
        if isinstance(row, Exception):
            raise row
        rows.append(int(row["logits"].argmax()))
    return np.array(rows)


def in_batches(model: ServedModel, group: Sequence[TensorBatch], size: int) -> list[TensorBatch]:
    """Whole batches of a group's texts, evenly spread over it."""
    count = min(MAX_BATCHES[size], len(group) // size)
    step = len(group) // size // count if count else 1
    starts = [number * step * size for number in range(count)]
    return [stack(group[start : start + size], model.signature) for start in starts]


def take_turns(
    served: dict[str, ServedModel], batches: Sequence[TensorBatch], *, rounds: int
) -> dict[str, list[float]]:
    """Seconds for all batches, one number a round and artifact; the order turns round every time."""
    times: dict[str, list[float]] = {name: [] for name in served}
    for number in range(-1, rounds):  # one round to warm up
        for name in list(served) if number % 2 else list(served)[::-1]:
            backend = served[name].backend
            started = time.perf_counter()
            for batch in batches:
                backend.run(batch)
            if number >= 0:
                times[name].append(time.perf_counter() - started)
    return times


def markdown(results: Sequence[Measured]) -> str:
    keys = list(results[0].ratios)
    lines = [
        "| artifact | MB | agreement | accuracy | mean ratio | " + " | ".join(keys) + " |",
        "|---" * (5 + len(keys)) + "|",
    ]
    for result in results:
        name = result.name + (f" (fails {', '.join(result.failed_gates)})" if result.failed_gates else "")
        cells = [
            name,
            f"{result.bytes / 1e6:.2f}",
            f"{result.agreement:.4f}",
            f"{result.accuracy:.4f}",
            f"{result.mean_ratio:.2f}",
        ]
        lines.append("| " + " | ".join([*cells, *(f"{result.ratios[key]:.2f}" for key in keys)]) + " |")
    return "\n".join(lines) + "\n"


def document(prepared: Prepared, results: Sequence[Measured]) -> dict[str, object]:
    return {
        "model": prepared.checkpoint.config,
        "texts": len(prepared.requests),
        "baseline": BASELINE,
        "threads": 1,
        "isa": cpu_isa(),
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "results": [
            {
                "artifact": result.name,
                "bytes": result.bytes,
                "agreement": result.agreement,
                "accuracy": result.accuracy,
                "mean_ratio": round(result.mean_ratio, 3),
                "ratios": {key: round(value, 3) for key, value in result.ratios.items()},
                "samples_per_s": {key: round(value, 1) for key, value in result.samples_per_s.items()},
                "failed_gates": result.failed_gates,
            }
            for result in results
        ],
    }


if __name__ == "__main__":
    main()
