"""Provenance: where an archive comes from. No clocks and no paths: the same inputs must give the same bytes."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from export.checkpoint import Checkpoint
from export.gates import GateResult
from handlers.signature import Artifact

PROVENANCE_FILE = "provenance.json"
_PACKAGES = ("torchport", "torch", "numpy", "pillow", "onnx", "onnxscript", "torch-model-archiver", "torchserve")
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu")


def package_versions() -> dict[str, str]:
    """Versions of Python and of every package that shapes an archive."""
    versions = {"python": platform.python_version()}
    for name in (*_PACKAGES, *_RUNTIMES):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            if name not in _RUNTIMES:  # one of the two runtimes is always absent
                raise
    return versions


def build_provenance(
    checkpoint: Checkpoint, artifact: Artifact, artifact_sha256: str, method: str, gates: Sequence[GateResult]
) -> dict[str, Any]:
    """Collect the provenance of an archive as a JSON document."""
    return {
        "checkpoint": {"sha256": checkpoint.sha256, **checkpoint.record, "metrics": checkpoint.metrics},
        "model": {"factory": checkpoint.factory, "config": checkpoint.config},
        "artifact": {**artifact.to_document(), "method": method, "sha256": artifact_sha256},
        "gates": [gate.to_document() for gate in gates],
        "versions": package_versions(),
    }
