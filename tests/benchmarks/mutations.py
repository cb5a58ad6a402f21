"""Mutation test of the export gates: seeded faults must be refused, clean exports must pass.

    python tests/benchmarks/mutations.py [--runs FOLDER]

It trains digits and tickets for a few epochs (or takes the runs that FOLDER has), puts each fault of
mutation_faults.py into an artifact, and prints which gate caught it; then it exports models of other seeds, sizes and
precisions, and prints how close they came to a bound. The last line is JSON.
"""

import argparse
import copy
import json
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutation_models
import numpy as np
import onnx
import torch
from mutation_faults import DIGITS, EARLIER, FAULTS, MIXER, TICKETS, Fault

from export.candidate import Prepared, Source, prepare
from export.checks import check_artifact
from export.combinations import Combination
from export.convert import convert
from export.errors import ExportError
from export.evaluation import CALIBRATION_SAMPLES, load_calibration
from export.gates import GateResult
from export.inputs import random_samples
from export.thresholds import Thresholds
from handlers.decoder import build_decoder
from handlers.errors import LoadError
from handlers.model import SIGNATURE_FILE, ServedModel

RUNS = {
    DIGITS: (DIGITS, "trainer.epochs=8"),
    TICKETS: (TICKETS, "trainer.epochs=3"),
    EARLIER: (TICKETS, "trainer.epochs=2"),
}
"""Recipe and setting of each training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Clean:
    """An export without a fault."""

    name: str
    subject: str
    format: str
    precision: str
    seed: int | None = None
    """Of fresh weights; None for the trained ones."""
    config: tuple[tuple[str, Any], ...] = ()
    """Changes to the factory's arguments."""


def clean_exports() -> tuple[Clean, ...]:
    """Trained and fresh models of several sizes, in every combination of a CPU that needs no compiler, and int8 pt2."""
    kinds = [
        ("torchscript", "fp32"),
        ("torchscript", "bf16"),
        ("torchscript", "int8"),
        ("onnx", "fp32"),
        ("onnx", "int8"),
    ]
    exports = [
        Clean(name="trained", subject=subject, format=format, precision=precision)
        for subject in (DIGITS, TICKETS)
        for format, precision in kinds
    ]
    exports += [Clean(name="trained", subject=subject, format="pt2", precision="int8") for subject in (DIGITS, TICKETS)]
    sizes: dict[str, list[dict[str, Any]]] = {
        DIGITS: [{"widths": [8]}, {"widths": [16, 32, 64], "blocks_per_stage": 3}],
        TICKETS: [{"hidden_dim": 32, "num_layers": 1}, {"hidden_dim": 128, "num_layers": 6, "intermediate_dim": 512}],
        MIXER: [{"width": 16}, {"width": 64}],
    }
    for subject, configs in sizes.items():
        for seed, config in enumerate(configs, start=1):
            exports += [
                Clean(
                    name=f"fresh {config}",
                    subject=subject,
                    format=format,
                    precision=precision,
                    seed=seed,
                    config=tuple(config.items()),
                )
                for format, precision in kinds
            ]
    return tuple(exports)


class Subjects:
    """The checkpoints that faults are put into.

    Args:
        runs: Folder with the runs ``digits`` and ``tickets``.
        scratch: A folder to write to.
    """

    def __init__(self, runs: Path, scratch: Path) -> None:
        self._runs = runs
        self._scratch = scratch
        self._prepared: dict[str, Prepared] = {}

    def prepared(self, subject: str) -> Prepared:
        """A trained model with its evaluation data, read once."""
        if subject not in self._prepared:
            self._prepared[subject] = prepare(self.source(subject))
        return self._prepared[subject]

    def source(self, subject: str) -> Source:
        """Where a subject lies."""
        return _mixer_source(self._scratch) if subject == MIXER else Source(path=self._runs / subject)

    def changed(self, fault: Fault) -> Prepared:
        """The subject with another signature or tokenizer."""
        path = self.source(fault.subject).path / "checkpoint.pt"
        content = torch.load(path, weights_only=True)
        assert fault.checkpoint is not None
        fault.checkpoint(content)
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            torch.save(content, Path(folder) / "checkpoint.pt")
            return prepare(Source(path=Path(folder), evaluation=self._named_data() if fault.named else None))

    def _named_data(self) -> Path:
        """The digits as an image folder, whose sub-folders name the labels."""
        folder = self._scratch / "images"
        prepared = self.prepared(DIGITS)
        for i, request in enumerate(prepared.requests):
            assert request.label is not None
            place = folder / prepared.checkpoint.signature.labels[request.label]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{i}.png").write_bytes(request.body)
        return folder

    def fresh(self, clean: Clean) -> Prepared:
        """The subject with fresh weights, perhaps of another size; only random inputs say anything of it."""
        trained = self.prepared(clean.subject)
        torch.manual_seed(clean.seed or 0)
        state = _build(clean.subject, {**trained.checkpoint.config, **dict(clean.config)}).state_dict()
        with tempfile.TemporaryDirectory(dir=self._scratch) as folder:
            path = Path(folder) / "weights.pt"
            torch.save(state, path)
            signature = Path(folder) / "signature.json"
            signature.write_text(json.dumps(trained.checkpoint.signature.to_document()))
            for name, content in trained.checkpoint.files.items():
                (Path(folder) / name).write_bytes(content)
            return prepare(
                Source(
                    path=path,
                    factory=_factory(clean.subject, trained),
                    signature_file=signature,
                    config={**trained.checkpoint.config, **dict(clean.config)},
                )
            )


def _factory(subject: str, prepared: Prepared) -> str:
    return "mutation_models:build_mixer" if subject == MIXER else prepared.checkpoint.factory


def _build(subject: str, config: dict[str, Any]) -> torch.nn.Module:
    if subject == MIXER:
        return mutation_models.build_mixer(**config)
    if subject == DIGITS:
        from models.convnet import build_conv_classifier

        return build_conv_classifier(**config)
    from models.text_encoder import build_text_classifier

    return build_text_classifier(**config)


def _mixer_source(folder: Path) -> Source:
    """Weights, signature and evaluation data of the mixer."""
    place = folder / "mixer"
    if not place.is_dir():
        place.mkdir()
        torch.manual_seed(0)
        torch.save(mutation_models.build_mixer().state_dict(), place / "weights.pt")
        (place / "signature.json").write_text(json.dumps(mutation_models.SIGNATURE))
        generator = np.random.default_rng(0)
        walks = np.clip(generator.normal(0, 0.3, (200, 12, 8)).cumsum(1), -2, 2)
        np.savez(
            place / "data.npz",
            steps=walks.astype(np.float32),
            mask=np.ones((200, 12), np.int64),
            context=generator.uniform(-1, 1, (200, 6)).astype(np.float32),
        )
    return Source(
        path=place / "weights.pt",
        factory="mutation_models:build_mixer",
        signature_file=place / "signature.json",
        evaluation=place / "data.npz",
    )


def check(
    prepared: Prepared,
    format: str,
    precision: str,
    scratch: Path,
    fault: Fault | None = None,
    other: torch.nn.Module | None = None,
) -> list[GateResult]:
    """Convert in this process, with or without a fault, and run the gates; what ends before them counts as one."""
    combination = Combination(format=format, precision=precision)
    checkpoint = prepared.checkpoint
    module = copy.deepcopy(checkpoint.module if other is None else other)
    if fault is not None and fault.module is not None:
        module = fault.module(module)
    with tempfile.TemporaryDirectory(dir=scratch) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(temporary)
        try:
            calibrated = precision == "int8" and format in ("onnx", "pt2")
            samples = _calibration(prepared, folder) if calibrated else []
            artifact = convert(module, checkpoint.signature, folder, combination=combination, calibration=samples)
            if fault is not None and fault.graph is not None:
                graph = onnx.load(folder / artifact.file)
                fault.graph(graph)
                onnx.save(graph, folder / artifact.file)
            document = checkpoint.signature.with_artifact(artifact).to_document()
            (folder / SIGNATURE_FILE).write_text(json.dumps(document))
            for name, content in checkpoint.files.items():
                (folder / name).write_bytes(content)
            served = ServedModel.load(folder, threads=1)
            served.warm_up()
            return check_artifact(served, prepared.evidence, Thresholds.of(precision))
        except LoadError as error:
            return [GateResult(gate="loads", passed=False, detail=str(error))]
        except ExportError as error:
            return [GateResult(gate=type(error).__name__, passed=False, detail=str(error))]


def _calibration(prepared: Prepared, folder: Path) -> list[Any]:
    checkpoint = prepared.checkpoint
    if not checkpoint.evaluation:
        return list(random_samples(checkpoint.signature, 32))
    for name, content in checkpoint.files.items():
        (folder / name).write_bytes(content)
    decoder = build_decoder(checkpoint.signature, max_samples=1, folder=folder)
    requests = load_calibration(checkpoint.signature, data=None, source=checkpoint.evaluation)
    return [decoder.decode(request.parts()).samples[0] for request in requests[:CALIBRATION_SAMPLES]]


def run_faults(subjects: Subjects, faults: Sequence[Fault], scratch: Path) -> Iterator[tuple[Fault, list[GateResult]]]:
    """Each fault with the gates that failed on it."""
    for fault in faults:
        prepared = subjects.changed(fault) if fault.checkpoint is not None else subjects.prepared(fault.subject)
        other = subjects.prepared(fault.run).checkpoint.module if fault.run else None
        results = check(prepared, fault.format, fault.precision, scratch, fault, other)
        yield fault, [result for result in results if not result.passed]


def run_clean(subjects: Subjects, exports: Sequence[Clean], scratch: Path) -> Iterator[tuple[Clean, list[GateResult]]]:
    """Each clean export with all its gates."""
    for clean in exports:
        prepared = subjects.prepared(clean.subject) if clean.seed is None else subjects.fresh(clean)
        yield clean, check(prepared, clean.format, clean.precision, scratch)


def train(folder: Path, names: Sequence[str] = tuple(RUNS)) -> None:
    """Train what is not there yet."""
    for name in names:
        if not (folder / name).is_dir():
            recipe, setting = RUNS[name]
            subprocess.run(
                [sys.executable, "-m", "torchport", "train", recipe, "-s", setting, "--out", str(folder / name)],
                check=True,
                capture_output=True,
            )


def _print_fault(fault: Fault, failed: Sequence[GateResult]) -> None:
    what = f"{fault.name} ({fault.subject}, {fault.format} {fault.precision})"
    by = "; ".join(_measured(result) for result in failed) or "NOTHING: it would be packed"
    print(f"{'refused' if failed else 'MISSED '}  {what}: {by}", flush=True)


def _print_clean(clean: Clean, results: Sequence[GateResult]) -> None:
    passed = all(result.passed for result in results)
    noise = [_measured(result) for result in results if result.gate.startswith("noise") or not result.passed]
    print(
        f"{'passed ' if passed else 'REFUSED'}  {clean.name} ({clean.subject}, {clean.format} {clean.precision}): "
        f"{'; '.join(noise)}" + ("" if passed else f" {[r.detail for r in results if not r.passed]}"),
        flush=True,
    )


def _measured(result: GateResult) -> str:
    if result.measured is None or result.bound is None:
        return f"{result.gate}: {result.detail[:80]}"
    return f"{result.gate} {result.measured:.2g} (bound {result.bound:.2g})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, help="Folder of trained runs, to keep them.")
    parser.add_argument("--only", default="", help="Words that a fault's or an export's line must have.")
    options = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="torchport-mutations-") as temporary:
        scratch = Path(temporary)
        runs = options.runs or scratch
        train(runs)
        subjects = Subjects(runs, scratch)
        missed, caught_by, faults = [], {}, [one for one in FAULTS if options.only in repr(one)]
        for fault, failed in run_faults(subjects, faults, scratch):
            _print_fault(fault, failed)
            if not failed:
                missed.append(f"{fault.name} ({fault.subject}, {fault.format} {fault.precision})")
            for result in failed[:1]:
                caught_by[result.gate] = caught_by.get(result.gate, 0) + 1
        refused, exports = [], [one for one in clean_exports() if options.only in repr(one)]
        for clean, results in run_clean(subjects, exports, scratch):
            _print_clean(clean, results)
            if not all(result.passed for result in results):
                refused.append(f"{clean.name} ({clean.subject}, {clean.format} {clean.precision})")
    print(
        json.dumps(
            {
                "faults": len(faults),
                "refused": len(faults) - len(missed),
                "missed": missed,
                "first_gate_that_failed": caught_by,
                "clean": len(exports),
                "passed": len(exports) - len(refused),
                "wrongly_refused": refused,
                "seconds": round(time.monotonic() - start, 1),
                "torch": str(torch.__version__),
                "machine": platform.machine(),
            }
        )
    )


if __name__ == "__main__":
    main()
