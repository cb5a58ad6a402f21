"""The export: convert, check, pack. It either ends with an archive that passed every gate, or changes nothing."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from export.archive import ArchiveFiles, check_name, check_store, created_on, write_archive
from export.checkpoint import Checkpoint, load_checkpoint
from export.convert import METHODS, convert_in_fresh_process
from export.errors import ConversionError, GateError
from export.evaluation import LabelledRequest, load_evaluation, random_images
from export.gates import GateResult, Reference, Thresholds, accuracy_gate, agreement_gate, parity_gate
from export.golden import MAX_SAMPLES, choose_golden
from export.inputs import SEED, random_batch
from export.provenance import PROVENANCE_FILE, build_provenance
from handlers.digests import file_sha256
from handlers.errors import LoadError, RequestError
from handlers.golden import GOLDEN_FILE
from handlers.model import DEFAULT_MAX_BATCH, SIGNATURE_FILE, ServedModel
from handlers.signature import FORMATS, PRECISIONS

# One, odd, and the largest: dynamic axes that were baked in fail on one of them.
_PARITY_BATCHES = (1, 3, 7, DEFAULT_MAX_BATCH)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What to export and how.

    Attributes:
        source: A run folder, a checkpoint, or a plain ``state_dict``.
        format: One of :data:`handlers.signature.FORMATS`.
        precision: One of :data:`handlers.signature.PRECISIONS`.
        method: ``trace`` or ``script``; TorchScript only.
        name: Model name of the archive.
        version: Model version of the archive.
        out: The model store.
        factory: Import path of the module's factory, for a plain ``state_dict``.
        signature_file: The signature, for a plain ``state_dict``.
        evaluation: Folder of labelled images; None takes what the checkpoint names.
        thresholds: Bounds of the gates.
    """

    source: Path
    name: str
    format: str = "torchscript"
    precision: str = "fp32"
    method: str = "trace"
    version: str = "1.0"
    out: Path = Path("model_store")
    factory: str | None = None
    signature_file: Path | None = None
    evaluation: Path | None = None
    thresholds: Thresholds = field(default_factory=Thresholds)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What came of an export.

    Attributes:
        archive: The archive's path.
        sha256: Digest of the whole archive.
        bytes: Its size.
        gates: All results; all passed.
        evaluated: Number of labelled samples that the gates used; 0 means random inputs only.
    """

    archive: Path
    sha256: str
    bytes: int
    gates: tuple[GateResult, ...]
    evaluated: int

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "archive": str(self.archive),
            "sha256": self.sha256,
            "bytes": self.bytes,
            "gates": [gate.to_document() for gate in self.gates],
            "evaluated": self.evaluated,
        }


def export_archive(options: ExportOptions, *, step: Callable[[str], None] = lambda name: None) -> ExportReport:
    """Export a checkpoint into an archive.

    Args:
        options: What to export and how.
        step: Called with a few words when each step begins, for progress displays.

    Raises:
        ExportError: If the input cannot be used, the model cannot be converted, or a gate fails. The model store is
            then as it was before.
    """
    _check_options(options)
    step("reading the checkpoint")
    checkpoint = load_checkpoint(options.source, factory=options.factory, signature_file=options.signature_file)
    requests = load_evaluation(checkpoint.signature, folder=options.evaluation, source=checkpoint.evaluation)
    with tempfile.TemporaryDirectory(prefix="torchport-export-") as temporary:
        folder = Path(temporary)
        step(f"converting to {options.format}")
        artifact = convert_in_fresh_process(
            options.source,
            folder,
            format=options.format,
            method=options.method,
            factory=options.factory,
            signature_file=options.signature_file,
        )
        signature = checkpoint.signature.with_artifact(artifact)
        _write_json(folder / SIGNATURE_FILE, signature.to_document())
        step("comparing with the checkpoint")
        served = _load_served(folder)
        reference = Reference(checkpoint.module)
        gates = _run_gates(checkpoint, reference, served, requests, options.thresholds)
        _refuse_failures(gates, options.format)
        step("packing")
        golden_requests = requests or list(random_images(signature, MAX_SAMPLES, seed=SEED))
        golden, bodies = choose_golden(golden_requests, reference, served, options.thresholds)
        provenance = build_provenance(
            checkpoint, artifact, file_sha256(folder / artifact.file), _method(options), gates
        )
        archive = write_archive(
            ArchiveFiles(
                artifact=folder / artifact.file,
                documents={
                    SIGNATURE_FILE: _json_bytes(signature.to_document()),
                    PROVENANCE_FILE: _json_bytes(provenance),
                    GOLDEN_FILE: _json_bytes(golden.to_document()),
                    **bodies,
                },
                config=_serving_config(),
            ),
            name=options.name,
            version=options.version,
            out=options.out,
        )
    return ExportReport(
        archive=archive,
        sha256=file_sha256(archive),
        bytes=archive.stat().st_size,
        gates=tuple(gates),
        evaluated=len(requests),
    )


def _check_options(options: ExportOptions) -> None:
    """Refuse what cannot work before any of the slow steps."""
    for what, value, known in (
        ("format", options.format, FORMATS),
        ("precision", options.precision, PRECISIONS),
        ("method", options.method, METHODS),
    ):
        if value not in known:
            raise ConversionError(f"the {what} {value!r} is not known; choose one of: {', '.join(known)}")
    check_name(options.name, "model name")
    check_name(options.version, "model version")
    check_store(options.out)
    created_on()


def _method(options: ExportOptions) -> str:
    return options.method if options.format == "torchscript" else "dynamo"


def _load_served(folder: Path) -> ServedModel:
    try:
        served = ServedModel.load(folder, threads=1)
        served.warm_up()
    except LoadError as error:
        raise GateError(f"the artifact does not load, so there is no archive: {error}") from error
    return served


def _run_gates(
    checkpoint: Checkpoint,
    reference: Reference,
    served: ServedModel,
    requests: Sequence[LabelledRequest],
    thresholds: Thresholds,
) -> list[GateResult]:
    batches = [random_batch(checkpoint.signature, size) for size in _PARITY_BATCHES]
    gates = [parity_gate(reference, served, batches, thresholds)]
    if requests:
        # Noise alone hardly shows some faults: a transposed image of noise is noise.
        real = _decoded_batches(served, requests)
        gates.append(parity_gate(reference, served, real, thresholds, gate="parity on evaluation data"))
        accuracy = checkpoint.metrics.get("accuracy")
        gates.append(agreement_gate(reference, served, requests, thresholds))
        gates.append(accuracy_gate(served, requests, accuracy, thresholds))
    return gates


def _decoded_batches(served: ServedModel, requests: Sequence[LabelledRequest]) -> list[NDArray[np.float32]]:
    """The evaluation data as input batches; a request that is refused is for the agreement gate to report."""
    samples = []
    for request in requests:
        with contextlib.suppress(RequestError):
            samples.append(served.decode(request.parts()))
    return [
        np.concatenate(samples[start : start + DEFAULT_MAX_BATCH])
        for start in range(0, len(samples), DEFAULT_MAX_BATCH)
    ]


def _refuse_failures(gates: Sequence[GateResult], format: str) -> None:
    failed = [f"{gate.gate}: {gate.detail}" for gate in gates if not gate.passed]
    if failed:
        raise GateError(
            f"the {format} artifact does not compute what the checkpoint computes, so there is no archive "
            f"({'; '.join(failed)})"
        )


def _serving_config() -> bytes:
    """The archive's defaults for TorchServe: safe everywhere, to be tuned by measurement."""
    config = {
        "minWorkers": 1,
        "maxWorkers": 1,
        "batchSize": DEFAULT_MAX_BATCH,
        # In ms. 0 silently becomes 100; while a worker is busy its queue fills by itself, so 1 costs no batching.
        "maxBatchDelay": 1,
        # In seconds. Any YAML pins both to 120 unless it says otherwise.
        "responseTimeout": 60,
        "startupTimeout": 300,
        "deviceType": "cpu",
        "torchport": {"threads": 1},
    }
    return yaml.safe_dump(config, sort_keys=False).encode()


def _json_bytes(document: Any) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _write_json(path: Path, document: Any) -> None:
    path.write_bytes(_json_bytes(document))
