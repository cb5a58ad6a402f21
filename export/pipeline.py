"""The export: convert, check, pack. It either ends with an archive that passed every gate, or changes nothing.

From a notebook or CI::

    from pathlib import Path
    from export.pipeline import ExportOptions, export_archive

    report = export_archive(ExportOptions(source=Path("run"), name="tickets", format="onnx", precision="int8"))
    print(report.archive, report.sha256)
    for gate in report.gates:
        print(gate.gate, gate.detail)

A gate that fails raises :class:`export.errors.GateError`, whose ``gates`` are all results, and leaves the model store
as it was. To look at an artifact without packing it, call ``prepare`` and ``convert_and_check``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from export.archive import (
    LICENCE_FILE,
    MODEL_CARD_FILE,
    PROVENANCE_FILE,
    ArchiveFiles,
    write_archive,
)
from export.candidate import Candidate, Prepared, Source, Step, convert_and_check, json_bytes, prepare
from export.eager import SOURCE_FOLDER
from export.errors import ExportError, GateError
from export.evaluation import random_requests
from export.gates import GateResult
from export.golden import MAX_SAMPLES, choose_golden
from export.options import ExportOptions, check_options, read_document, resolve_thresholds, source_of
from export.provenance import build_provenance
from export.signing import load_signer
from export.staging import StagedFolder, write_staging
from handlers.digests import file_sha256
from handlers.errors import GoldenError
from handlers.golden import GOLDEN_FILE
from handlers.model import DEFAULT_MAX_BATCH, SIGNATURE_FILE, ServedModel

__all__ = [
    "Candidate",
    "ExportOptions",
    "ExportReport",
    "Prepared",
    "Source",
    "convert_and_check",
    "export_archive",
    "pack",
    "prepare",
]

_RUN_MODEL_CARD = "model_card.md"
_DEVICE_TYPES = {"cpu": "cpu", "cuda": "gpu"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportReport:
    """What came of an export.

    Attributes:
        archive: The archive's path; None if only a folder was staged.
        sha256: Digest of the whole archive; None if there is none.
        bytes: Its size; of a staged folder, of all its files.
        gates: All results; all passed.
        evaluated: Number of samples of evaluation data that the gates used; 0 means random inputs only.
        staged: The staged folder; None if an archive was packed.
    """

    archive: Path | None
    sha256: str | None
    bytes: int
    gates: tuple[GateResult, ...]
    evaluated: int
    staged: StagedFolder | None = None

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "archive": None if self.archive is None else str(self.archive),
            "sha256": self.sha256,
            "bytes": self.bytes,
            "gates": [gate.to_document() for gate in self.gates],
            "evaluated": self.evaluated,
            "staged": None if self.staged is None else self.staged.to_document(),
        }


def export_archive(options: ExportOptions, *, step: Step = lambda name: None) -> ExportReport:
    """Export a checkpoint into an archive.

    Args:
        options: What to export and how.
        step: Called with a few words when each step begins, for progress displays.

    Raises:
        ExportError: If the input cannot be used, the model cannot be converted, or a gate fails (then a
            :class:`~export.errors.GateError` with all results). The model store is then as it was before.
    """
    check_options(options)
    if options.calibration is not None and options.precision != "int8":
        raise ExportError(f"--calibration is for int8, and --precision is {options.precision}; leave one of them away")
    thresholds = resolve_thresholds(options, options.precision)
    step("reading the checkpoint")
    prepared = prepare(source_of(options))
    with tempfile.TemporaryDirectory(prefix="torchport-export-") as temporary:
        candidate = convert_and_check(
            prepared,
            options.combination,
            Path(temporary),
            method=options.method,
            thresholds=thresholds,
            allow_slower=options.allow_slower,
            step=step,
        )
        return pack(options, prepared, candidate, step=step)


def pack(
    options: ExportOptions, prepared: Prepared, candidate: Candidate, *, step: Step = lambda name: None
) -> ExportReport:
    """Pack a candidate that passed every gate.

    Args:
        options: Name, version, model store, documents and signing count here.
        prepared: What the candidate was made of.
        candidate: What ``convert_and_check`` gave.
        step: Called with a few words when each step begins.

    Raises:
        GateError: If a gate has failed; nothing is written.
        ArchiveError: If the archive cannot be written.
    """
    served = _require_passed(candidate)
    step("choosing golden samples")
    requests = prepared.requests or random_requests(candidate.signature, 4 * MAX_SAMPLES)
    golden, bodies = choose_golden(requests, prepared.evidence.reference, served, candidate.thresholds)
    bodies[GOLDEN_FILE] = json_bytes(golden.to_document())
    _replay(served, bodies, candidate.folder)
    step("packing")
    files = ArchiveFiles(
        artifact=candidate.folder / candidate.artifact.file,
        documents={
            SIGNATURE_FILE: json_bytes(candidate.signature.to_document()),
            PROVENANCE_FILE: json_bytes(
                build_provenance(prepared.checkpoint, candidate, evaluated=len(prepared.requests))
            ),
            **prepared.checkpoint.files,
            **_sources(candidate),
            **_documents(options),
            **bodies,
        },
        config=serving_config(candidate.artifact.device),
    )
    return _write(options, files, candidate.gates, len(prepared.requests))


def _write(options: ExportOptions, files: ArchiveFiles, gates: tuple[GateResult, ...], evaluated: int) -> ExportReport:
    if options.staging_only:
        staged = write_staging(files, name=options.name, version=options.version, out=options.out)
        size = sum(path.stat().st_size for path in staged.path.rglob("*") if path.is_file())
        return ExportReport(archive=None, sha256=None, bytes=size, gates=gates, evaluated=evaluated, staged=staged)
    sign = None if options.signing_key is None else load_signer(options.signing_key)
    archive = write_archive(files, name=options.name, version=options.version, out=options.out, sign=sign)
    return ExportReport(
        archive=archive,
        sha256=file_sha256(archive),
        bytes=archive.stat().st_size,
        gates=gates,
        evaluated=evaluated,
    )


def _require_passed(candidate: Candidate) -> ServedModel:
    refuse_failures(candidate.gates, str(candidate.combination))
    if candidate.served is None:
        raise GateError("the artifact was not loaded, so there is no archive", candidate.gates)
    return candidate.served


def refuse_failures(gates: Sequence[GateResult], what: str) -> None:
    """Raise one error for all gates that failed.

    Raises:
        GateError: If any did.
    """
    failed = [f"{gate.gate}: {gate.detail}" for gate in gates if not gate.passed]
    if failed:
        share = f"{len(failed)} of {len(gates)} gates"
        raise GateError(f"the {what} artifact fails {share}, so there is no archive ({'; '.join(failed)})", gates)


def _replay(served: ServedModel, bodies: Mapping[str, bytes], folder: Path) -> None:
    """Answer the golden samples as a worker will when it starts."""
    for name, content in bodies.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    try:
        served.replay(folder)
    except GoldenError as error:
        raise GateError(f"the artifact does not repeat its golden samples, so there is no archive: {error}") from error


def _sources(candidate: Candidate) -> dict[str, bytes]:
    """The source files that build an eager artifact's module."""
    root = candidate.folder
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted((root / SOURCE_FOLDER).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts  # what Python left there when the gates ran it
    }


def _documents(options: ExportOptions) -> dict[str, bytes]:
    """What people want to read: model card and licence."""
    documents = {}
    card = options.model_card
    if card is None and (options.source / _RUN_MODEL_CARD).is_file():
        card = options.source / _RUN_MODEL_CARD
    if card is not None:
        documents[MODEL_CARD_FILE] = read_document(card)
    if options.licence is not None:
        documents[LICENCE_FILE] = read_document(options.licence)
    return documents


def serving_config(device: str) -> bytes:
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
        "deviceType": _DEVICE_TYPES[device],
        "torchport": {"threads": 1},
    }
    return yaml.safe_dump(config, sort_keys=False).encode()
