"""Errors of the export.

ExportError
├── CheckpointError     the checkpoint cannot be read, or does not fit its model
├── EvaluationError     evaluation or calibration data cannot be read, or does not fit the signature
├── ThresholdError      a file of thresholds cannot be used
├── ConversionError     the model cannot be turned into the format asked for
├── GateError           the artifact does not compute what the checkpoint computes; no archive is written
├── MeasurementError    an artifact cannot be measured, or the measurements cannot be written
├── ArchiveError        an archive cannot be written, or is not what its export wrote
└── SigningError        an archive cannot be signed, or does not have the signature that it must have
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.gates import GateResult


class ExportError(Exception):
    """Base of all errors raised by the export."""

    user_facing = True


class CheckpointError(ExportError):
    """The checkpoint cannot be read, or does not fit its model."""


class EvaluationError(ExportError):
    """Evaluation or calibration data cannot be read, or does not fit the signature."""


class ThresholdError(ExportError):
    """A file of thresholds cannot be used."""


class ConversionError(ExportError):
    """The model cannot be turned into the format asked for."""


class GateError(ExportError):
    """At least one gate failed, so there is no archive.

    Args:
        message: One sentence.
        gates: The results of all gates, passed and failed; empty when it came to none.
    """

    def __init__(self, message: str, gates: Sequence[GateResult] = ()) -> None:
        super().__init__(message)
        self.gates = tuple(gates)

    def to_document(self) -> dict[str, Any]:
        """What ``--json`` adds to the error."""
        return {"gates": [gate.to_document() for gate in self.gates]}


class MeasurementError(ExportError):
    """An artifact cannot be measured, or the measurements cannot be written."""


class ArchiveError(ExportError):
    """The archive cannot be written, or is not what its export wrote."""


class SigningError(ExportError):
    """An archive cannot be signed, or does not have the signature that it must have."""
