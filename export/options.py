"""What to export and how: everything that a user can choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.archive import check_name, check_store, created_on
from export.candidate import Source
from export.combinations import TRACE, Combination, refusal
from export.errors import ConversionError, ExportError
from export.signing import load_signer
from export.staging import check_staging
from export.table import Columns
from export.thresholds import Thresholds, load_thresholds


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportOptions:
    """What to export and how.

    Attributes:
        source: A run folder, a checkpoint, or a file of weights: a plain ``state_dict`` or safetensors.
        name: Model name of the archive.
        format: One of :data:`handlers.artifact.FORMATS`.
        precision: One of :data:`handlers.artifact.PRECISIONS`.
        method: ``trace`` or ``script``; TorchScript only.
        device: ``cpu`` or ``cuda``: where the artifact is made, checked and served.
        version: Model version of the archive.
        out: The model store.
        factory: Import path of the module's factory, for bare weights.
        signature_file: The signature, for bare weights.
        factory_config: Keyword arguments of the factory; None for those of the checkpoint.
        evaluation: Evaluation data, see :mod:`export.evaluation`; None takes what the checkpoint names.
        calibration: Calibration data for static int8; None takes the checkpoint's own training data.
        columns: Where text and label stand in tables of evaluation and calibration data.
        thresholds: Bounds of the gates, or the file that has them; None for those of the precision.
        allow_slower: Pack an artifact of lower precision even if it is slower than fp32 on this machine.
        model_card: Goes into the archive; None takes the run folder's own, if there is one.
        licence: A licence text for the archive.
        staging_only: Leave a folder that ``torch-model-archiver`` packs, instead of an archive.
        signing_key: Private key that signs the archive; None signs nothing.
    """

    source: Path
    name: str
    format: str = "torchscript"
    precision: str = "fp32"
    method: str = TRACE
    device: str = "cpu"
    version: str = "1.0"
    out: Path = Path("model_store")
    factory: str | None = None
    signature_file: Path | None = None
    factory_config: Mapping[str, Any] | None = None
    evaluation: Path | None = None
    calibration: Path | None = None
    columns: Columns | None = None
    thresholds: Thresholds | Path | None = None
    allow_slower: bool = False
    model_card: Path | None = None
    licence: Path | None = None
    staging_only: bool = False
    signing_key: Path | None = None

    @property
    def combination(self) -> Combination:
        """Format, precision and device."""
        return Combination(format=self.format, precision=self.precision, device=self.device)


def source_of(options: ExportOptions) -> Source:
    """What is exported, without how."""
    return Source(
        path=options.source,
        factory=options.factory,
        signature_file=options.signature_file,
        config=options.factory_config,
        evaluation=options.evaluation,
        calibration=options.calibration,
        columns=options.columns,
    )


def resolve_thresholds(options: ExportOptions, precision: str) -> Thresholds:
    """The bounds that the options give for a precision.

    Raises:
        ThresholdError: If they are a file that cannot be used.
    """
    if isinstance(options.thresholds, Thresholds):
        return options.thresholds
    return Thresholds.of(precision) if options.thresholds is None else load_thresholds(options.thresholds, precision)


def check_options(options: ExportOptions) -> None:
    """Refuse what cannot work before any of the slow steps.

    Raises:
        ExportError: If an option cannot be used.
    """
    reason = refusal(options.combination, method=options.method)
    if reason is not None:
        raise ConversionError(reason)
    check_name(options.name, "model name")
    check_name(options.version, "model version")
    check_store(options.out)
    if options.columns is not None and options.evaluation is None and options.calibration is None:
        raise ExportError(
            "--columns says where the texts of --eval or --calibration are; give one of them, or leave it"
        )
    created_on()
    if options.staging_only:
        check_staging(options.out, options.name)
        if options.signing_key is not None:
            raise ExportError(
                "a staged folder is no archive yet, so there is nothing to sign; sign what is packed from it"
            )
    if options.signing_key is not None:
        load_signer(options.signing_key)
    for path in (options.model_card, options.licence):
        if path is not None:
            read_document(path)


def read_document(path: Path) -> bytes:
    """The bytes of a model card or licence.

    Raises:
        ExportError: If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror or error}") from error
