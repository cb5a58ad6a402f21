"""Thresholds: how far an artifact of each precision may differ from its checkpoint.

The defaults stand between what clean exports were measured to do and what faults were measured to do
(``tests/benchmarks/mutations.py`` measures both again).
"""

from __future__ import annotations

from collections.abc import Mapping
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
        least_accuracy: Least accuracy of the checkpoint itself on labelled evaluation data, as a share of 1. None: it
            must exceed that of always answering the commonest class, given 20 samples of two classes.
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
    least_accuracy: float | None = None
    slowdown: float = 1.05

    @classmethod
    def of(cls, precision: str) -> Thresholds:
        """The defaults for a precision."""
        return _DEFAULTS[precision]

    @classmethod
    def from_document(cls, document: Mapping[str, Any], precision: str) -> Thresholds:
        """What :meth:`to_document` gave; fields that are absent or no numbers have the defaults of the precision."""
        names = {field.name for field in fields(cls)}
        known = {
            name: value
            for name, value in document.items()
            if name in names and ((value is None and name in _OPTIONAL) or type(value) in (int, float))
        }
        return replace(cls.of(precision), **known)

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)

    def looser_than_defaults(self, precision: str) -> str | None:
        """What lets more through than the defaults of a precision, in one line; None if nothing does."""
        defaults = Thresholds.of(precision)
        looser = [
            f"{field.name} {_shown(value)} (default {_shown(default)})"
            for field in fields(self)
            if _is_looser(field.name, value := getattr(self, field.name), default := getattr(defaults, field.name))
        ]
        return f"thresholds looser than the defaults: {', '.join(looser)}" if looser else None


def _is_looser(name: str, value: float | None, default: float | None) -> bool:
    if name == "least_accuracy":  # a number replaces a floor that follows from the data
        return value is not None
    if value is None or default is None:  # what is None is not compared
        return value is None and default is not None
    return value < default if name == "agreement" else value > default


def _shown(value: float | None) -> str:
    return "none" if value is None else f"{value:g}"


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
# The most that each may be: beyond it the gate could not fail.
_GREATEST = {
    "agreement": 1,
    "metric_drop": 1,
    "training_drop": 1,
    "least_accuracy": 1,
    "noise": 1,
    "random_noise": 1,
    "slowdown": 100,
}
# Those that can be None.
_OPTIONAL = ("atol", "least_accuracy")


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
            greatest = _GREATEST.get(field.name)
            if value < 0 or (greatest is not None and value > greatest):
                bounds = "at least 0" if greatest is None else f"from 0 to {greatest}"
                raise SignatureError(f"the threshold {field.name!r} is {value:g}; it must be {bounds}")
            changes[field.name] = value
        elif field.name in section.names():
            if field.name not in _OPTIONAL:
                raise SignatureError(f"the threshold {field.name!r} is empty; give a number, or remove it")
            changes[field.name] = None
    section.finish()
    return changes
