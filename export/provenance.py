"""Provenance: where an archive comes from. No clocks and no paths: the same inputs must give the same bytes."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
import torch

from export.candidate import Candidate
from export.checkpoint import Checkpoint
from export.gates import GateResult
from handlers.artifact import Artifact
from handlers.digests import file_sha256
from handlers.isa import cpu_isa

_PACKAGES = (
    "torchport",
    "torch",
    "numpy",
    "pillow",
    "tokenizers",
    "onnx",
    "onnxscript",
    "torch-model-archiver",
    "torchserve",
)
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")
_QUANTISER = "torchao"
_SPEED = "speed"


def package_versions(*also: str) -> dict[str, str]:
    """Versions of Python and of every package that shapes an archive.

    Args:
        also: Packages that shape some archives only; see :func:`quantisers`.
    """
    versions = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_RUNTIMES, *also):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name not in _RUNTIMES:  # one of the two runtimes is always absent
                raise
    return versions


def quantisers(artifact: Artifact) -> tuple[str, ...]:
    """Packages that quantised an artifact, and shape no other."""
    return (_QUANTISER,) if (artifact.format, artifact.precision) == ("pt2", "int8") else ()


def build_provenance(checkpoint: Checkpoint, candidate: Candidate, *, evaluated: int) -> dict[str, Any]:
    """Collect the provenance of an archive as a JSON document.

    Args:
        checkpoint: What was exported.
        candidate: What came of it, with all gates passed.
        evaluated: Samples of evaluation data that the gates used.
    """
    artifact = candidate.artifact
    file = candidate.folder / artifact.file
    signature = candidate.signature
    converted: dict[str, Any] = {
        **artifact.to_document(),
        "method": _method(candidate),
        "sha256": file_sha256(file),
        "shapes": {spec.name: list(spec.shape) for spec in (*signature.inputs, *signature.outputs)},
        "axes": {name: axis.to_document() for name, axis in signature.axes.items()},
    }
    if artifact.format == "onnx":
        converted["opsets"] = _opsets(file)
    if artifact.precision == "int8":
        converted["quantization"] = _quantization(candidate)
    if candidate.calibration is not None:
        converted["calibration"] = {
            "sha256": candidate.calibration.sha256,
            "samples": candidate.calibration.samples,
        }
    return {
        "checkpoint": {"sha256": checkpoint.sha256, **checkpoint.record, "metrics": checkpoint.metrics},
        "model": {"factory": checkpoint.factory, "config": checkpoint.config},
        "artifact": converted,
        "gates": [_recorded(gate, allow_slower=candidate.allow_slower) for gate in candidate.gates],
        "thresholds": candidate.thresholds.to_document(),
        "evaluated": evaluated,
        "machine": _machine(artifact.device),
        "versions": package_versions(*quantisers(artifact)),
    }


def _method(candidate: Candidate) -> str:
    if candidate.combination.format == "torchscript":
        return candidate.method
    return {"onnx": "dynamo", "pt2": "aot-inductor", "eager": "state-dict"}[candidate.combination.format]


def _quantization(candidate: Candidate) -> str:
    """How int8 came about: when ranges of activations are measured, and by what for pt2."""
    if quantisers(candidate.artifact):
        return "static, pt2e x86-inductor"
    return "dynamic" if candidate.calibration is None else "static"


def _opsets(file: Path) -> dict[str, int]:
    """Versions of the operator sets that a graph uses, by domain."""
    graph = onnx.load(file, load_external_data=False)
    return {
        entry.domain or "ai.onnx": entry.version for entry in sorted(graph.opset_import, key=lambda one: one.domain)
    }


def _recorded(gate: GateResult, *, allow_slower: bool) -> dict[str, Any]:
    """A gate as archives keep it.

    Times differ from run to run, and the same inputs must give the same bytes: of the speed only what was asked for is
    kept, and that the artifact held it.
    """
    document = gate.to_document()
    if gate.gate != _SPEED:
        return document
    detail = "might be slower than fp32" if allow_slower else "at least as fast as fp32 on the exporting machine"
    return {**document, "measured": None, "detail": detail}


def _machine(device: str) -> dict[str, str]:
    """What the gates ran on: its rounding is in the golden samples."""
    machine = {"isa": cpu_isa()}
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        machine["gpu"] = torch.cuda.get_device_name()
        machine["compute_capability"] = f"{major}.{minor}"
    return machine
