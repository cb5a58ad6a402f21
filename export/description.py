"""Descriptions: an inspected archive in words, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from export.inspection import UNSIGNED, VERIFIED, Inspection
from export.thresholds import Thresholds
from handlers.signature import Signature
from handlers.tensors import TensorSpec

_SIGNING = {
    UNSIGNED: "no",
    VERIFIED: "yes, by the key that was given",
}
_UNVERIFIED = "yes, not verified (give --public-key)"


def describe(inspection: Inspection) -> list[tuple[str, str]]:
    """What an archive says of itself, line by line: what it is called, and what it is."""
    archive, signature, provenance = inspection.archive, inspection.signature, inspection.provenance
    checkpoint = provenance["checkpoint"]
    packed = "packed by hand: its manifest has a date and no digest" if archive.packed_by_hand else "as exported"
    return [
        ("digests", f"{len(archive.digests)} files, all {packed}"),
        ("sha256", archive.sha256),
        ("signed", _SIGNING.get(inspection.signing, _UNVERIFIED)),
        ("task", signature.task),
        ("inputs", _tensors(signature.inputs)),
        ("outputs", _tensors(signature.outputs)),
        *([("labels", ", ".join(signature.labels))] if signature.labels else []),
        *_artifact(signature),
        ("checkpoint", f"sha256 {checkpoint['sha256']}, git {checkpoint.get('git_revision') or 'unknown'}"),
        ("metrics", _pairs({name: f"{value:.4g}" for name, value in checkpoint["metrics"].items()}) or "none"),
        *((f"gate: {gate['gate']}", gate["detail"]) for gate in provenance["gates"]),
        *_thresholds(signature, provenance),
        ("versions", _pairs(provenance["versions"])),
        ("model card", "yes" if inspection.model_card else "none"),
        ("licence", "yes" if inspection.licence else "none"),
        ("golden samples", _golden(inspection)),
    ]


def _artifact(signature: Signature) -> list[tuple[str, str]]:
    artifact = signature.artifact
    if artifact is None:
        return []
    rows = [("artifact", f"{artifact.format} {artifact.precision} on {artifact.device} ({artifact.file})")]
    if artifact.requires:
        rows.append(("requires", _pairs(artifact.requires)))
    return rows


def _thresholds(signature: Signature, provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    recorded = provenance.get("thresholds")
    if signature.artifact is None or not isinstance(recorded, Mapping):
        return []
    precision = signature.artifact.precision
    looser = Thresholds.from_document(recorded, precision).looser_than_defaults(precision)
    return [("thresholds", looser)] if looser else []


def _tensors(specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype} {list(spec.shape)}" for spec in specs)


def _pairs(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _golden(inspection: Inspection) -> str:
    difference = inspection.golden_difference
    replayed = "not replayed (use --verify)" if difference is None else f"replayed: largest difference {difference:.2g}"
    return f"{inspection.golden_samples}, {replayed}"
