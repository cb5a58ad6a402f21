"""Candidates: a checkpoint converted in one way, loaded, and checked. Whether it is packed is for the pipeline to say.

``prepare`` reads everything once; ``convert_and_check`` may then be called for any number of combinations.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.calibration import write_calibration
from export.checkpoint import Checkpoint, load_checkpoint
from export.checks import Evidence, check_artifact
from export.combinations import TRACE, Combination, refusal
from export.convert import convert_in_fresh_process
from export.errors import CheckpointError, ConversionError, EvaluationError
from export.evaluation import LabelledRequest, load_calibration, load_evaluation
from export.gates import GateResult
from export.quantization import needs_calibration
from export.reference import Reference
from export.speed import speed_gate
from export.table import Columns
from export.thresholds import Thresholds
from handlers.artifact import Artifact
from handlers.decoder import Decoder, build_decoder
from handlers.digests import file_sha256
from handlers.errors import LoadError, RequestError
from handlers.model import SIGNATURE_FILE, ServedModel
from handlers.signature import Signature
from handlers.tensors import TensorBatch

Step = Callable[[str], None]

_CALIBRATION_FILE = "calibration.npz"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What is exported.

    Attributes:
        path: A run folder, a checkpoint, or a file of weights.
        factory: Import path of the module's factory, for bare weights.
        signature_file: The signature, for bare weights.
        config: Keyword arguments of the factory; None for those of the checkpoint.
        evaluation: Evaluation data; None takes what the checkpoint names.
        calibration: Calibration data; None takes the checkpoint's own training data.
        columns: Where text and label stand in tables.
    """

    path: Path
    factory: str | None = None
    signature_file: Path | None = None
    config: Mapping[str, Any] | None = None
    evaluation: Path | None = None
    calibration: Path | None = None
    columns: Columns | None = None


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A source that has been read.

    Attributes:
        source: Where it came from.
        checkpoint: The checkpoint.
        requests: The evaluation data; empty when there is none.
        evidence: What artifacts are held against.
    """

    source: Source
    checkpoint: Checkpoint
    requests: Sequence[LabelledRequest]
    evidence: Evidence


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """What int8 ranges were measured on.

    Attributes:
        sha256: Digest of the samples as tensors.
        samples: How many.
    """

    sha256: str
    samples: int


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """An artifact with its gates.

    Attributes:
        combination: Format, precision and device.
        method: How it was converted.
        folder: What an archive of it holds at its root: artifact, signature, tokenizer and, for eager, sources.
        artifact: The artifact.
        signature: The checkpoint's, with the artifact.
        served: The artifact, loaded with one thread.
        thresholds: What it was held against.
        gates: All results.
        calibration: What ranges were measured on; None if none were.
        allow_slower: Whether it might be slower than fp32.
    """

    combination: Combination
    method: str
    folder: Path
    artifact: Artifact
    signature: Signature
    served: ServedModel | None
    thresholds: Thresholds
    gates: tuple[GateResult, ...]
    calibration: Calibration | None = None
    allow_slower: bool = False

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return all(gate.passed for gate in self.gates)


def prepare(source: Source) -> Prepared:
    """Read a checkpoint and its evaluation data.

    Raises:
        CheckpointError: If the checkpoint cannot be used.
        EvaluationError: If the evaluation data cannot be used.
    """
    checkpoint = load_checkpoint(
        source.path, factory=source.factory, signature_file=source.signature_file, config=source.config
    )
    signature = checkpoint.signature
    requests = load_evaluation(signature, data=source.evaluation, source=checkpoint.evaluation, columns=source.columns)
    decoder = _decoder(checkpoint)
    for request in requests:  # a worker would refuse it: better found before the slow steps
        _decode(decoder, request)
    evidence = Evidence(
        reference=Reference.of(checkpoint.module, signature),
        requests=requests,
        trained=checkpoint.metrics,
        own_data=source.evaluation is None,
    )
    return Prepared(source=source, checkpoint=checkpoint, requests=requests, evidence=evidence)


def convert_and_check(
    prepared: Prepared,
    combination: Combination,
    folder: Path,
    *,
    method: str = TRACE,
    thresholds: Thresholds | None = None,
    allow_slower: bool = False,
    baseline: ServedModel | None = None,
    step: Step = lambda name: None,
) -> Candidate:
    """Convert a checkpoint in one way and run every gate on what came of it; nothing is packed.

    Args:
        prepared: The checkpoint and what it is held against.
        combination: Format, precision and device.
        folder: An empty folder for the artifact.
        method: ``trace`` or ``script``; TorchScript only.
        thresholds: Bounds of the gates; by default those of the precision.
        allow_slower: Let an artifact of lower precision pass that is slower than fp32.
        baseline: The fp32 artifact of the same format and device; None converts one, where the speed gate needs it.
        step: Called with a few words when each step begins.

    Returns:
        The artifact and its gates, whether they passed or not.

    Raises:
        ConversionError: If the combination is not offered, or the model cannot be converted.
        CheckpointError: If the checkpoint's own model fails.
        EvaluationError: If the calibration data cannot be used.
    """
    reason = refusal(combination, method=method)
    if reason is not None:
        raise ConversionError(reason)
    thresholds = thresholds or Thresholds.of(combination.precision)
    step(f"converting to {combination.format} {combination.precision}")
    artifact, calibration = _convert(prepared, combination, folder, method)
    signature = prepared.checkpoint.signature.with_artifact(artifact)
    served, gates = _load(folder, signature, prepared.checkpoint)
    if served is not None:
        step("comparing with the checkpoint")
        gates += check_artifact(served, prepared.evidence, thresholds)
        if combination.precision != "fp32":
            step("measuring against fp32")
            gates.append(_speed_gate(prepared, combination, folder, method, served, baseline, thresholds, allow_slower))
    return Candidate(
        combination=combination,
        method=method,
        folder=folder,
        artifact=artifact,
        signature=signature,
        served=served,
        thresholds=thresholds,
        gates=tuple(gates),
        calibration=calibration,
        allow_slower=allow_slower,
    )


def _convert(
    prepared: Prepared, combination: Combination, folder: Path, method: str
) -> tuple[Artifact, Calibration | None]:
    source = prepared.source
    with tempfile.TemporaryDirectory(prefix="torchport-calibration-") as temporary:
        file = Path(temporary) / _CALIBRATION_FILE
        calibration = None
        if combination.precision == "int8" and combination.format in ("onnx", "pt2"):
            calibration = _write_calibration(prepared, combination.format, file)
        artifact = convert_in_fresh_process(
            source.path,
            folder,
            format=combination.format,
            precision=combination.precision,
            method=method,
            device=combination.device,
            factory=source.factory,
            signature_file=source.signature_file,
            config=source.config,
            calibration=file if calibration else None,
        )
    return artifact, calibration


def _write_calibration(prepared: Prepared, format: str, file: Path) -> Calibration | None:
    """Write the samples that static quantisation needs; None where it is dynamic, or there are none."""
    checkpoint, source = prepared.checkpoint, prepared.source
    static = needs_calibration(checkpoint.module, format=format)
    if source.calibration is None and not static:
        return None
    requests = load_calibration(
        checkpoint.signature, data=source.calibration, source=checkpoint.evaluation, columns=source.columns
    )
    if not requests or not static:
        return None
    decoder = _decoder(checkpoint)
    write_calibration(file, [_decode(decoder, request) for request in requests])
    return Calibration(sha256=file_sha256(file), samples=len(requests))


def _load(folder: Path, signature: Signature, checkpoint: Checkpoint) -> tuple[ServedModel | None, list[GateResult]]:
    """Complete an archive's root and load it as a worker does."""
    (folder / SIGNATURE_FILE).write_bytes(json_bytes(signature.to_document()))
    for name, content in checkpoint.files.items():
        (folder / name).write_bytes(content)
    try:
        served = ServedModel.load(folder, threads=1)
        served.warm_up()
    except LoadError as error:
        return None, [GateResult(gate="loads", passed=False, detail=f"the artifact does not load: {error}")]
    return served, []


def _speed_gate(
    prepared: Prepared,
    combination: Combination,
    folder: Path,
    method: str,
    served: ServedModel,
    baseline: ServedModel | None,
    thresholds: Thresholds,
    allow_slower: bool,
) -> GateResult:
    if baseline is None:
        fp32 = Combination(format=combination.format, precision="fp32", device=combination.device)
        with tempfile.TemporaryDirectory(prefix="torchport-fp32-") as temporary:
            place = Path(temporary)
            try:
                artifact, _ = _convert(prepared, fp32, place, method)
            except ConversionError as error:
                detail = f"there is no fp32 artifact to compare with: {error}"
                return GateResult(gate="speed", passed=allow_slower, bound=thresholds.slowdown, detail=detail)
            signature = prepared.checkpoint.signature.with_artifact(artifact)
            baseline, failures = _load(place, signature, prepared.checkpoint)
            if baseline is None:
                return GateResult(
                    gate="speed",
                    passed=allow_slower,
                    bound=thresholds.slowdown,
                    detail=f"there is no fp32 artifact to compare with: {failures[0].detail}",
                )
    return speed_gate(served.backend, baseline.backend, served.signature, thresholds, allow_slower=allow_slower)


def _decoder(checkpoint: Checkpoint) -> Decoder:
    """What decodes requests as the archive's handlers will."""
    with tempfile.TemporaryDirectory(prefix="torchport-files-") as temporary:
        for name, content in checkpoint.files.items():
            (Path(temporary) / name).write_bytes(content)
        try:
            return build_decoder(checkpoint.signature, max_samples=1, folder=Path(temporary))
        except LoadError as error:
            raise CheckpointError(f"the checkpoint's requests cannot be decoded: {error}") from error


def _decode(decoder: Decoder, request: LabelledRequest) -> TensorBatch:
    try:
        return decoder.decode(request.parts()).samples[0]
    except RequestError as error:
        raise EvaluationError(f"{request.where} is nothing that the model takes: {error.message}") from error


def json_bytes(document: Any) -> bytes:
    """A JSON document in the form that archives hold: the same bytes for the same content."""
    return (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()
