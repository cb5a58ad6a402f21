"""Errors of the export.

ExportError
├── CheckpointError     the checkpoint cannot be read, or does not fit its model
├── EvaluationError     the evaluation data cannot be read, or does not fit the signature
├── ConversionError     the model cannot be turned into the format asked for
├── GateError           the artifact does not compute what the checkpoint computes; no archive is written
└── ArchiveError        an archive cannot be written, or is not what its export wrote
"""


class ExportError(Exception):
    """Base of all errors raised by the export."""

    user_facing = True


class CheckpointError(ExportError):
    """The checkpoint cannot be read, or does not fit its model."""


class EvaluationError(ExportError):
    """The evaluation data cannot be read, or does not fit the signature."""


class ConversionError(ExportError):
    """The model cannot be turned into the format asked for."""


class GateError(ExportError):
    """At least one gate failed, so there is no archive."""


class ArchiveError(ExportError):
    """The archive cannot be written, or is not what its export wrote."""
