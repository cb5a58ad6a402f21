"""Thresholds: how far an artifact of each precision may differ from its checkpoint.

The defaults stand between what clean exports were measured to do and what faults were measured to do
(``tests/benchmarks/mutations.py`` measures both again).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from export.errors import ThresholdError
from export.yaml_file import read_settings
from handlers.artifact import PRECISIONS
from handlers.document import Section
from handlers.errors import SignatureError


@dataclass(frozen=True, kw_only=True, slots=True)
class Thresholds:
    """How far an artifact may differ from its checkpoint.

    Attributes:
        atol: Absolute tolerance of single output values, in units of the output; for outputs whose root mean square
            exceeds 1, in units of that. None: single values are not compared, only ``noise`` is.
        rtol: Relative tolerance of single output values, added to ``atol``.
        noise: Greatest root mean square of the differences on evaluation data, as a share of the root mean square by
            which the checkpoint's outputs differ from sample to sample. It needs no scale: logits of 0.001 and of
            1,000 are held to the same share.
        random_noise: The same on random inputs, which are like nothing that the model was trained or calibrated on:
            it answers them with less variety and more rounding. Where they are all there is, twice ``noise`` is the
            bound, if that is less.
        agreement: Least share of samples on which both rank the same class first.
        metric_drop: Most accuracy that the artifact may lose against the checkpoint, as a share of 1.
        training_drop: Most accuracy that the checkpoint may lose against what training measured, as a share of 1. It
            allows for one borderline sample in a few hundred, where another machine rounds differently.
        loss_drift: Largest relative change of the mean cross-entropy against what training measured on the same
            samples.
        slowdown: Greatest time for a batch, as a multiple of the fp32 artifact's. It allows for the scatter of the
            measurement.
    """

    atol: float | None = 1e-4
    rtol: float = 1e-3
    noise: float = 5e-5
    random_noise: float = 5e-5
    agreement: float = 1.0
    metric_drop: float = 0.005
    training_drop: float = 0.005
    loss_drift: float = 0.01
    slowdown: float = 1.05

    @classmethod
    def of(cls, precision: str) -> Thresholds:
        """The defaults for a precision."""
        return _DEFAULTS[precision]

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


# Measured on clean exports, trained and with fresh weights, on evaluation data and on random inputs: fp32 up to 1e-6
# and 9e-6 (24 layers), bf16 0.014 and 0.04 (0.1 in MobileNetV2), int8 0.02 and 0.11 (0.33 in a ResNet). The smallest
# fault that fp32 must show is the GELU that is approximated by tanh, with 1e-4; those of int8 begin at 0.22.
_HALF = Thresholds(atol=None, noise=0.05, random_noise=0.25, agreement=0.995)
_DEFAULTS = {
    "fp32": Thresholds(),
    "bf16": _HALF,
    "fp16": _HALF,
    "int8": Thresholds(atol=None, noise=0.1, random_noise=0.5, agreement=0.98, metric_drop=0.01),
}
_SHARES = ("agreement", "metric_drop", "training_drop")


def load_thresholds(path: Path, precision: str) -> Thresholds:
    """Read a YAML or JSON file of thresholds; what it leaves out keeps its default.

    Its fields are those of :class:`Thresholds`. Under the name of a precision they count for that one only::

        metric_drop: 0.01
        int8:
          noise: 0.3

    Args:
        path: The file.
        precision: Whose thresholds are wanted.

    Raises:
        ThresholdError: If it cannot be read, has an unknown name, or a value that no threshold can have.
    """
    document = read_settings(path, "the thresholds", ThresholdError)
    try:
        root = Section(document, "thresholds")
        # Every precision's, so that a slip is found whichever of them is exported first.
        own = {name: _changes(root.section(name)) for name in PRECISIONS if root.has(name)}
        common = _changes(root)
    except SignatureError as error:
        raise ThresholdError(f"{path} cannot be used: {error}") from error
    return replace(Thresholds.of(precision), **{**common, **own.get(precision, {})})


def _changes(section: Section) -> dict[str, Any]:
    """The thresholds that one mapping of the file sets."""
    changes: dict[str, Any] = {}
    for field in fields(Thresholds):
        if section.has(field.name):
            value = section.number(field.name)
            if value < 0 or (field.name in _SHARES and value > 1):
                bounds = "from 0 to 1" if field.name in _SHARES else "at least 0"
                raise SignatureError(f"the threshold {field.name!r} is {value:g}; it must be {bounds}")
            changes[field.name] = value
        elif field.name in section.names():
            if field.name != "atol":  # the only one that can be left out of the comparison
                raise SignatureError(f"the threshold {field.name!r} is empty; give a number, or remove it")
            changes[field.name] = None
    section.finish()
    return changes
