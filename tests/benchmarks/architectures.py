"""Third-party architectures through every way to export them to a CPU.

    python tests/benchmarks/architectures.py [--architecture NAME ...] [--format NAME ...] [--precision NAME ...]

Each architecture of third_party_factories.py, with random weights on which its outputs really depend, is converted,
gated, packed, inspected with its golden samples replayed, and then compared with the library's own module once more,
on other inputs and by other code than the gates': an artifact that passed the gates and fails there passed wrongly.
The speed gate is told to let slow artifacts pass: models of this size say nothing of speed.

Every combination ends in one of these words, which the table and the last line (JSON) show:

    passed        packed, inspected, and right
    not possible  the conversion refuses, with a reason
    refused       the artifact was made, and a gate refuses it
    WRONG         passed the gates, and is not right
    CRASHED       ended in an exception that is none of torchport's
"""

import argparse
import csv
import importlib.util
import json
import logging
import math
import os
import platform
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from awkward_modules import AWKWARD
from third_party_factories import ARCHITECTURES, Architecture, random_state

import export.candidate
from export.archive import open_archive
from export.candidate import Candidate, Prepared, Source, convert_and_check, prepare
from export.combinations import SCRIPT, TRACE, Combination, allowed
from export.convert import convert_in_this_process
from export.errors import ExportError, GateError
from export.inputs import random_batch, random_samples
from export.inspection import inspect_archive
from export.pipeline import ExportOptions, pack
from handlers.model import ServedModel
from handlers.signature import Signature
from handlers.tensors import Array

PASSED, IMPOSSIBLE, REFUSED, WRONG, CRASHED = "passed", "not possible", "refused", "WRONG", "CRASHED"

BATCHES = (1, 2, 5, 13, 32)
# The gates' own bounds for random inputs, held by other code: largest difference, and noise.
FP32_BOUND = (1e-4, 1e-3)
NOISE_BOUNDS = {"fp32": 5e-5, "bf16": 0.1, "int8": 0.2}
# Outputs that vary by less from sample to sample than this share of their size would show no fault.
LEAST_VARIATION = 0.1

COLUMNS = (
    ("torchscript fp32", "torchscript", "fp32", TRACE),
    ("torchscript fp32 (script)", "torchscript", "fp32", SCRIPT),
    ("torchscript bf16", "torchscript", "bf16", TRACE),
    ("torchscript int8", "torchscript", "int8", TRACE),
    ("onnx fp32", "onnx", "fp32", TRACE),
    ("onnx int8", "onnx", "int8", TRACE),
    ("pt2 fp32", "pt2", "fp32", TRACE),
    ("pt2 bf16", "pt2", "bf16", TRACE),
    ("pt2 int8", "pt2", "int8", TRACE),
    ("eager fp32", "eager", "fp32", TRACE),
    ("eager bf16", "eager", "bf16", TRACE),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """What became of one combination."""

    architecture: str
    column: str
    outcome: str
    reason: str = ""
    noise: float | None = None
    """Root mean square of the differences as a share of what outputs vary by, in the independent comparison."""
    difference: float | None = None
    """The largest one."""
    seconds: float = 0.0


@dataclass(kw_only=True, slots=True)
class Differences:
    """Differences of all outputs over all batches."""

    largest: float = 0.0
    excess: float = 0.0
    unequal: float = 0.0
    """Greatest share of different values in an array of whole numbers or booleans."""
    squares: dict[str, list[float]] = field(default_factory=dict)
    values: dict[str, list[Array]] = field(default_factory=dict)

    def add(self, name: str, expected: Array, actual: Array) -> None:
        if expected.shape != actual.shape or expected.dtype != actual.dtype:
            raise ValueError(f"{name} is {actual.dtype} {actual.shape}, not {expected.dtype} {expected.shape}")
        if not np.isfinite(actual).all():
            raise ValueError(f"{name} has NaN or infinity")
        if expected.dtype.kind != "f":
            self.unequal = max(self.unequal, float((expected != actual).mean()))
            return
        difference = np.abs(expected.astype(np.float64) - actual)
        atol, rtol = FP32_BOUND
        scale = max(1.0, float(np.sqrt(np.square(expected, dtype=np.float64).mean())))
        self.largest = max(self.largest, float(difference.max()))
        self.excess = max(self.excess, float((difference / (atol * scale + rtol * np.abs(expected))).max()))
        self.squares.setdefault(name, []).append(float(np.square(difference).mean()))
        self.values.setdefault(name, []).append(expected)

    def noise(self) -> float:
        """The greatest of any output: root mean square of the differences as a share of what it varies by."""
        noises = [0.0]
        for name, squares in self.squares.items():
            spread, size = _spread(self.values[name])
            noises.append(float(np.sqrt(np.mean(squares))) / max(spread, 0.1 * size, 1e-30))
        return max(noises)


def _spread(samples: Sequence[Array]) -> tuple[float, float]:
    """By how much samples differ from their mean, and their size: root mean squares.

    Samples of several sizes are taken position by position.
    """
    if len({sample.shape for sample in samples}) == 1:
        rows = np.stack(samples).reshape(len(samples), -1)
    else:
        channels = samples[0].shape[-1] if len({sample.shape[-1:] for sample in samples}) == 1 else 1
        rows = np.concatenate([sample.reshape(-1, channels) for sample in samples])
    rows = rows.astype(np.float64)
    return float((rows - rows.mean(0)).std()), float(np.sqrt(np.square(rows).mean()))


class Subject:
    """One architecture: its files, and its answers by the library's own module.

    Args:
        name: Its name in ``ARCHITECTURES``.
        folder: Where its files go.
    """

    def __init__(self, name: str, architecture: Architecture, folder: Path) -> None:
        self.name = name
        self.signature = Signature.from_document(architecture.signature)
        torch.manual_seed(0)
        self._module = architecture.build()
        state = random_state(self._module)
        self._module.load_state_dict(state)
        self._module.eval()
        # Weights that layers share are stored once, as the library stores them.
        seen: dict[int, str] = {}
        unique = {
            key: value.contiguous()
            for key, value in self._module.state_dict().items()
            if value.numel() == 0 or seen.setdefault(value.data_ptr(), key) == key
        }
        weights, signature = folder / "model.safetensors", folder / "signature.json"
        safetensors.torch.save_file(unique, weights)
        signature.write_text(json.dumps(architecture.signature))
        if "tokenizer" in architecture.data:
            write_tokenizer(folder / "tokenizer.json")
        self.source = Source(
            path=weights,
            factory=architecture.factory,
            signature_file=signature,
            calibration=self._write_calibration(folder),
        )

    def _write_calibration(self, folder: Path) -> Path:
        """Random samples as the gates draw them, and others than those: texts, pictures or arrays."""
        if self.signature.text is not None:
            return _write_texts(folder / "calibration.csv", self.signature.text.max_length)
        if self.signature.image is None:
            path = folder / "calibration.npz"
            longest = {name: axis.maximum for name, axis in self.signature.axes.items()}
            np.savez(path, **random_batch(self.signature, 64, seed=77, sizes=longest))
            return path
        samples = random_samples(self.signature, 64, seed=77)
        from PIL import Image

        place = folder / "calibration"
        place.mkdir()
        image = self.signature.image
        mean, std = (np.asarray(values).reshape(-1, 1, 1) for values in (image.mean, image.std))
        for i, sample in enumerate(samples):
            (pixels,) = sample.values()
            picture = np.clip(np.round((pixels * std + mean) * 255), 0, 255).astype(np.uint8).transpose(1, 2, 0)
            Image.fromarray(picture).save(place / f"{i:03d}.png")
        return place

    def answer(self, batch: Mapping[str, Array]) -> dict[str, Array]:
        """The library's own answers, called as its users call it."""
        with torch.inference_mode():
            # Copies: a module may write into its inputs.
            result = self._module(**{name: torch.from_numpy(array.copy()) for name, array in batch.items()})
        names = [spec.name for spec in self.signature.outputs]
        if isinstance(result, torch.Tensor | tuple) and not hasattr(result, names[0]):
            values = result if isinstance(result, tuple) else (result,)
            return {name: value.numpy() for name, value in zip(names, values, strict=False)}
        return {
            name: (result[name] if isinstance(result, Mapping) else getattr(result, name)).numpy() for name in names
        }

    def variation(self) -> float:
        """The least variation of an output from sample to sample, as a share of its size."""
        rows: dict[str, list[Array]] = {}
        for batch, sizes in self.batches():
            if not self.signature.axes or len(sizes) >= 5:
                for name, array in self.answer(batch).items():
                    rows.setdefault(name, []).extend(array)
        # Of one length only, so that what varies is not the length.
        same = {name: [row for row in samples if row.shape == samples[-1].shape] for name, samples in rows.items()}
        return min(spread / max(size, 1e-30) for spread, size in map(_spread, same.values()))

    def batches(self) -> Iterator[tuple[dict[str, Array], list[dict[str, int]]]]:
        """Batches of several sizes, with the sizes of every sample's dynamic axes."""
        generator = np.random.default_rng(20_240_229)
        axes = self.signature.axes
        padded = all(spec.padding is not None for spec in self.signature.inputs if spec.dynamic_axes)
        for size in BATCHES:
            lengths = {
                name: (axis.minimum, axis.minimum + 1, axis.maximum - 1, axis.maximum) for name, axis in axes.items()
            }
            for step in range(4 if axes else 1):
                same = [{name: choices[step] for name, choices in lengths.items()}] * size
                yield self._batch(same, generator), same
            if axes and padded and size > 1:
                mixed = [
                    {name: int(generator.integers(axis.minimum, axis.maximum + 1)) for name, axis in axes.items()}
                    for _ in range(size)
                ]
                yield self._batch(mixed, generator), mixed

    def _batch(self, sizes: Sequence[Mapping[str, int]], generator: np.random.Generator) -> dict[str, Array]:
        batch = {}
        for spec in self.signature.inputs:
            longest = [max(one[axis] for one in sizes) if isinstance(axis, str) else axis for axis in spec.shape[1:]]
            array = np.full((len(sizes), *longest), spec.padding or 0, dtype=spec.dtype)
            usual = (0.0, 1.0) if spec.dtype == "bool" else self._pixels()
            low = usual[0] if spec.minimum is None else spec.minimum
            high = usual[1] if spec.maximum is None else spec.maximum
            for i, one in enumerate(sizes):
                place = (i, *(slice(one[axis] if isinstance(axis, str) else axis) for axis in spec.shape[1:]))
                shape = array[place].shape
                is_float = spec.dtype.startswith("float")
                array[place] = (
                    generator.uniform(low, high, shape) if is_float else generator.integers(low, high + 1, shape)
                )
            batch[spec.name] = array
        return batch

    def _pixels(self) -> tuple[float, float]:
        """The lowest and the highest number that a picture's bytes become; -1 and 1 for other tensors."""
        image = self.signature.image
        if image is None:
            return (-1.0, 1.0)
        ends = [(end - mean) / std for mean, std in zip(image.mean, image.std, strict=True) for end in (0.0, 1.0)]
        return (min(ends), max(ends))

    def compare(self, served: ServedModel) -> Differences:
        """Hold a loaded artifact against the library, padding cut off."""
        differences = Differences()
        for batch, sizes in self.batches():
            expected, actual = self.answer(batch), served.backend.run(batch)
            for spec in self.signature.outputs:
                for right, row, one in zip(expected[spec.name], actual[spec.name], sizes, strict=True):
                    cut = tuple(slice(one.get(str(axis))) for axis in spec.shape[1:])
                    differences.add(spec.name, right[cut], row[cut])
        return differences


def write_tokenizer(path: Path) -> None:
    """A tokenizer that takes characters for words."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    characters = [chr(code) for code in range(33, 127)]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.save(str(path))


def _write_texts(path: Path, longest: int) -> Path:
    generator = np.random.default_rng(77)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text"])
        for _ in range(64):
            writer.writerow(["".join(map(chr, generator.integers(33, 127, generator.integers(1, longest + 1))))])
    return path


def _variation(subject: Subject) -> float | None:
    """None where the module cannot be called as its signature says, or gives NaN: that is for torchport to say."""
    try:
        variation = subject.variation()
    except Exception:
        return None
    return variation if math.isfinite(variation) else None


def run(subject: Subject, columns: Sequence[tuple[str, str, str, str]]) -> Iterator[Result]:
    """Every combination of one architecture."""
    prepared = prepare(subject.source)
    baselines: dict[str, ServedModel] = {}
    for column, format, precision, method in columns:
        start = time.monotonic()
        combination = Combination(format=format, precision=precision)
        with tempfile.TemporaryDirectory(prefix="torchport-architectures-") as folder:
            outcome = _outcome(
                lambda: _one(subject, prepared, combination, method, Path(folder), baselines)  # noqa: B023
            )
        yield Result(architecture=subject.name, column=column, seconds=round(time.monotonic() - start, 1), **outcome)


def _outcome(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return work()
    except GateError as error:
        return {"outcome": REFUSED, "reason": str(error)}
    except ExportError as error:
        return {"outcome": IMPOSSIBLE, "reason": str(error)}
    except Exception as error:  # what this script is here to find
        traceback.print_exc()
        return {"outcome": CRASHED, "reason": f"{type(error).__name__}: {error}".splitlines()[0]}


def _one(
    subject: Subject,
    prepared: Prepared,
    combination: Combination,
    method: str,
    folder: Path,
    baselines: dict[str, ServedModel],
) -> dict[str, Any]:
    (folder / "artifact").mkdir()
    candidate = convert_and_check(
        prepared,
        combination,
        folder / "artifact",
        method=method,
        allow_slower=True,
        baseline=baselines.get(combination.format),
    )
    if not candidate.passed:
        failed = [f"{gate.gate}: {gate.detail}" for gate in candidate.gates if not gate.passed]
        return {"outcome": REFUSED, "reason": "; ".join(failed)}
    if combination.precision == "fp32" and candidate.served is not None:
        baselines.setdefault(combination.format, candidate.served)
    return _packed(subject, prepared, candidate, method, folder)


def _packed(subject: Subject, prepared: Prepared, candidate: Candidate, method: str, folder: Path) -> dict[str, Any]:
    """Pack, inspect, load from the archive, and compare again."""
    options = ExportOptions(
        source=subject.source.path,
        name=subject.name,
        out=folder / "store",
        format=candidate.combination.format,
        precision=candidate.combination.precision,
        method=method,
        allow_slower=True,
    )
    report = pack(options, prepared, candidate)
    assert report.archive is not None
    inspect_archive(report.archive, verify=True)
    with tempfile.TemporaryDirectory(dir=folder) as extracted:
        open_archive(report.archive).extract(Path(extracted))
        served = ServedModel.load(Path(extracted), threads=1)
        try:
            differences = subject.compare(served)
        except ValueError as error:
            return {"outcome": WRONG, "reason": str(error)}
    noise, precision = differences.noise(), candidate.combination.precision
    measured = {"noise": noise, "difference": differences.largest}
    if noise > NOISE_BOUNDS[precision] or (precision == "fp32" and (differences.excess > 1 or differences.unequal > 0)):
        reason = f"noise {noise:.2g}, {differences.excess:.2g} of fp32's bound, {differences.unequal:.2g} differ at all"
        return {"outcome": WRONG, "reason": reason, **measured}
    slow = [gate.detail for gate in candidate.gates if gate.gate == "speed"]
    return {"outcome": PASSED, "reason": "; ".join(slow), **measured}


def table(results: Sequence[Result], variations: Mapping[str, float | None]) -> str:
    """The results as Markdown: one row an architecture, and below it all reasons."""
    columns = [column for column, *_ in COLUMNS if any(result.column == column for result in results)]
    cells = {(result.architecture, result.column): result for result in results}
    lines = [
        f"| architecture | outputs vary by | {' | '.join(columns)} |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for name, variation in variations.items():
        row = [_cell(cells.get((name, column))) for column in columns]
        varies = "-" if variation is None else f"{variation:.0%}"
        lines.append(f"| {name} | {varies} | {' | '.join(row)} |")
    lines.append("")
    for outcome in (REFUSED, IMPOSSIBLE, WRONG, CRASHED):
        reasons: dict[str, list[str]] = {}
        for result in results:
            if result.outcome == outcome:
                # The same reason for all, whatever their functions are called.
                reason = re.sub(r"<function [\w.]+>", "a function", result.reason)
                reasons.setdefault(reason, []).append(f"{result.architecture} {result.column}")
        lines += [f"- {outcome}: {_who(who, results)}: {reason}" for reason, who in reasons.items()]
    return "\n".join(lines) + "\n"


def _who(who: Sequence[str], results: Sequence[Result]) -> str:
    """Their names; of a column that is the same for all, only that."""
    for column in {result.column for result in results}:
        everybody = {f"{result.architecture} {column}" for result in results if result.column == column}
        if len(who) > 1 and everybody == set(who):
            return f"every {column}"
    return ", ".join(who)


def _cell(result: Result | None) -> str:
    if result is None:
        return "-"
    return f"{result.outcome} ({result.noise:.1g})" if result.outcome == PASSED else result.outcome


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", action="append", metavar="NAME", help="one of them only")
    parser.add_argument("--format", action="append", choices=sorted({format for _, format, *_ in COLUMNS}))
    parser.add_argument("--precision", action="append", choices=sorted({precision for _, _, precision, _ in COLUMNS}))
    parser.add_argument("--awkward", action="store_true", help="take the modules of awkward_modules.py instead")
    parser.add_argument("--in-process", action="store_true", help="convert in this process, which saves its imports")
    parser.add_argument("--skip-pt2", action="store_true", help="it compiles for up to a minute each time")
    parser.add_argument("--add", type=Path, action="append", default=[], help="output of an earlier run, for one table")
    parser.add_argument("--markdown", type=Path, help="where to write the table")
    return parser.parse_args()


def main() -> None:
    """Run, print the table, and end with JSON."""
    options = _parsed()
    for variable in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        os.environ.setdefault(variable, "1")
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if options.in_process:
        export.candidate.convert_in_fresh_process = convert_in_this_process
    columns = [
        column
        for column in COLUMNS
        if (not options.format or column[1] in options.format)
        and (not options.precision or column[2] in options.precision)
        and not (options.skip_pt2 and column[1] == "pt2")
    ]
    offered = {(one.format, one.precision) for one in allowed("cpu")}
    assert offered == {(format, precision) for _, format, precision, _ in COLUMNS}, "COLUMNS is not what is offered"
    found: dict[tuple[str, str], Result] = {}
    variations: dict[str, float | None] = {}
    for path in options.add:
        earlier = json.loads(path.read_text().splitlines()[-1])
        for result in (Result(**result) for result in earlier["results"]):
            found[result.architecture, result.column] = result
        variations |= earlier["variations"]
    known = AWKWARD if options.awkward else ARCHITECTURES
    for name in options.architecture or ([] if options.add else list(known)):
        if name.startswith("timm") and not all(map(importlib.util.find_spec, ("timm", "torchvision"))):
            print(f"{name}: left out, since timm and torchvision are not installed", flush=True)
            continue
        with tempfile.TemporaryDirectory(prefix="torchport-architectures-") as folder:
            subject = Subject(name, known[name], Path(folder))
            variations[name] = _variation(subject)
            if (variations[name] or 0) < LEAST_VARIATION:
                print(f"{name}: its outputs do not vary enough, so passing would say little", flush=True)
            for result in run(subject, columns):
                found[name, result.column] = result
                print(f"{name}, {result.column}: {_cell(result)} {result.reason} [{result.seconds:.0f} s]", flush=True)
    results = list(found.values())
    text = table(results, variations)
    print(text)
    if options.markdown:
        options.markdown.write_text(text, encoding="utf-8")
    summary = {
        "counts": Counter(result.outcome for result in results),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "onnxruntime-gpu", "onnx")},
        "machine": platform.processor() or platform.machine(),
        "variations": variations,
        "results": [asdict(result) for result in results],
    }
    print(json.dumps(summary))
    sys.exit(any(result.outcome in (WRONG, CRASHED) for result in results))


if __name__ == "__main__":
    main()
