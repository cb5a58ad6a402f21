"""int8 pt2 against TorchScript of the same weights, and against the roads that the export does not take.

    pip install 'torchport[pt2e]'  # measured with torchao 0.18
    python tests/benchmarks/pt2e_precisions.py runs/sst2 --markdown table.md

Texts, batches, rounds and gates are those of text_precisions.py, and so are table and JSON. ``inductor`` is an exported
program that ``torch.compile`` compiles when it is loaded, ``aoti`` a package that was compiled ahead of time; both
with freezing, without which Inductor computes int8 in fp32. ``dynamic`` ranges are those of each batch, ``static``
ones those of 256 training texts. ``pt2 int8`` is what the export makes: ahead of time, with static ranges.
"""

import argparse
import copy
import importlib
import json
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from text_precisions import ROUNDS, convert_all, document, markdown, measure
from torch._dynamo import config as dynamo
from torch._inductor import config as inductor
from torch._inductor.utils import fresh_cache

from export.candidate import Candidate, Prepared, Source, prepare
from export.checks import check_artifact
from export.combinations import TRACE, Combination
from export.compiler import compiling
from export.evaluation import load_calibration
from export.inputs import example_batch
from export.program import export_program
from export.pt2 import write_pt2
from export.pt2e import quantized_module
from export.thresholds import Thresholds
from handlers.artifact import Artifact
from handlers.backend import Backend
from handlers.calling import NamedModule
from handlers.decoder import build_decoder
from handlers.model import ServedModel
from handlers.pt2 import Pt2Backend
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch
from handlers.torch_device import to_numpy, to_torch

CPU = torch.device("cpu")
REFERENCES = [
    Combination(format="torchscript", precision="fp32", device="cpu"),
    Combination(format="torchscript", precision="int8", device="cpu"),
    Combination(format="pt2", precision="fp32", device="cpu"),
    Combination(format="pt2", precision="int8", device="cpu"),
]


@dataclass(frozen=True, kw_only=True)
class Road:
    """One way to compile: fp32 as well, to tell what int8 brings from what the compiler brings."""

    compiler: str
    ranges: str | None

    @property
    def name(self) -> str:
        return f"{self.compiler} int8 {self.ranges}" if self.ranges else f"{self.compiler} fp32 frozen"


ROADS = [
    *(Road(compiler="inductor", ranges=ranges) for ranges in (None, "dynamic", "static")),
    *(Road(compiler="aoti", ranges=ranges) for ranges in (None, "dynamic")),
]


class InductorBackend:
    """Runs an exported program, compiled for the first batch of every kind."""

    def __init__(self, path: Path, signature: Signature) -> None:
        self._signature = signature
        self._module = torch.compile(torch.export.load(path).module(check_guards=False), dynamic=True)

    @property
    def device(self) -> str:
        return CPU.type

    def run(self, batch: TensorBatch) -> dict[str, Array]:
        with torch.inference_mode():
            return to_numpy(self._module(*to_torch(batch, self._signature.inputs, CPU)), self._signature.outputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder of a text classifier")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--markdown", type=Path, help="file to write the table to")
    arguments = parser.parse_args()
    torchao = import_torchao("torchao")
    torch.set_num_threads(1)
    prepared = prepare(Source(path=arguments.run))
    with (
        tempfile.TemporaryDirectory() as folder,
        fresh_cache(),
        # For all of the run: torch.compile compiles again for other batches, and would then compute in fp32.
        inductor.patch(freezing=True),
        # Beyond its limit of compilations, torch.compile would run eagerly without a word.
        dynamo.patch(fail_on_recompile_limit_hit=True),
    ):
        candidates = convert_all(prepared, REFERENCES, Path(folder))
        candidates |= compile_all(prepared, Path(folder))
        results = measure(prepared, candidates, rounds=arguments.rounds)
    table = markdown(results)
    print(table)
    if arguments.markdown:
        arguments.markdown.write_text(table)
    print(json.dumps({**document(prepared, results), "torchao": torchao.__version__}))


def compile_all(prepared: Prepared, folder: Path) -> dict[str, Candidate]:
    """Goes every road; what leads nowhere is said and left out."""
    candidates = {}
    for road in ROADS:
        place = folder / road.name.replace(" ", "-")
        place.mkdir()
        started = time.perf_counter()
        try:
            candidate = compile_and_check(prepared, road, place)
        except Exception as error:  # compilers raise whatever they like
            print(f"{road.name}: {type(error).__name__}: {error}", flush=True)
            continue
        failed = [f"{gate.gate} ({gate.measured})" for gate in candidate.gates if not gate.passed]
        said = f"fails {', '.join(failed)}" if failed else "passes"
        print(f"{road.name}: {time.perf_counter() - started:.0f} s, {said}", flush=True)
        candidates[road.name] = candidate
    return candidates


def compile_and_check(prepared: Prepared, road: Road, folder: Path) -> Candidate:
    checkpoint, signature = prepared.checkpoint, prepared.checkpoint.signature
    for name, content in checkpoint.files.items():
        (folder / name).write_bytes(content)
    names = [spec.name for spec in signature.inputs], [spec.name for spec in signature.outputs]
    example = to_torch(example_batch(signature), signature.inputs, CPU)
    module = NamedModule(copy.deepcopy(checkpoint.module), *names)
    path = folder / "model.pt2"
    backend: Backend
    with compiling():
        if road.ranges:
            if road.ranges == "static":
                module = quantized_module(module, signature, example, calibration(prepared, folder))
            else:
                module = NamedModule(dynamically_quantized(module, signature, example), *names)
        if road.compiler == "aoti":
            write_pt2(module, signature, example, path, device="cpu")
            backend = Pt2Backend(path, signature, device="cpu", threads=1)
        else:
            torch.export.save(export_program(module, signature, example).exported, path)
            backend = InductorBackend(path, signature)
        served = ServedModel(signature, backend, folder=folder)
        served.warm_up()
    combination = Combination(format="pt2", precision="int8" if road.ranges else "fp32", device="cpu")
    thresholds = Thresholds.of(combination.precision)
    return Candidate(
        combination=combination,
        method=TRACE,
        folder=folder,
        artifact=Artifact(format=combination.format, precision=combination.precision, file=path.name),
        signature=signature,
        served=served,
        thresholds=thresholds,
        gates=tuple(check_artifact(served, prepared.evidence, thresholds)),
    )


def calibration(prepared: Prepared, folder: Path) -> list[TensorBatch]:
    """Training texts, as a worker decodes them."""
    checkpoint = prepared.checkpoint
    decoder = build_decoder(checkpoint.signature, max_samples=1, folder=folder)
    requests = load_calibration(checkpoint.signature, data=None, source=checkpoint.evaluation)
    return [decoder.decode(request.parts()).samples[0] for request in requests]


def dynamically_quantized(
    module: NamedModule, signature: Signature, example: Sequence[torch.Tensor]
) -> torch.nn.Module:
    """As :func:`export.pt2e.quantized_module`, with ranges that are measured batch by batch."""
    pt2e = import_torchao("torchao.quantization.pt2e.quantize_pt2e")
    x86 = import_torchao("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config(is_dynamic=True))
    graph = export_program(module, signature, example).exported.module(check_guards=False)
    converted: torch.nn.Module = pt2e.convert_pt2e(pt2e.prepare_pt2e(graph, quantizer))
    return converted


def import_torchao(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(f"PT2E needs torchao ({error}); run: pip install torchao --no-deps") from error


if __name__ == "__main__":
    main()
