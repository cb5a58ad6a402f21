"""Golden samples: request bodies with the outputs that the checkpoint gave for them at export."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from handlers.document import Section
from handlers.errors import GoldenError, SignatureError
from handlers.tensors import Array

GOLDEN_FILE = "golden/expected.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenSample:
    """One request and its right answer.

    Attributes:
        file: Path of the request body within the archive.
        content_type: Media type to send it with.
        outputs: For each output of the model, the path within the archive of a ``.npy`` file with the checkpoint's
            output for this one sample, without the batch axis.
        label: The likeliest class; None if the model has no classes, or none of them leads by more than rounding.
    """

    file: str
    content_type: str
    outputs: Mapping[str, str]
    label: str | None

    @classmethod
    def from_section(cls, section: Section) -> GoldenSample:
        """Read one entry of ``samples``."""
        outputs = section.section("outputs")
        sample = cls(
            file=_inside(section.string("file")),
            content_type=section.string("content_type"),
            outputs={name: _inside(outputs.string(name)) for name in outputs.names()},
            label=section.string("label") if section.has("label") else None,
        )
        section.finish()
        if not sample.outputs:
            raise SignatureError(f"the golden sample {sample.file} has no outputs; export the model again")
        return sample

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "file": self.file,
            "content_type": self.content_type,
            "outputs": dict(self.outputs),
            "label": self.label,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenSet:
    """All golden samples of an archive.

    Attributes:
        rtol: Relative tolerance of the comparison.
        atol: Absolute tolerance of the comparison for each output of the model, in units of that output; 0 for what
            is counted, not measured.
        samples: The samples, in order.
    """

    rtol: float
    atol: Mapping[str, float]
    samples: tuple[GoldenSample, ...]

    @classmethod
    def load(cls, folder: Path) -> GoldenSet:
        """Read the golden samples of an extracted archive.

        Raises:
            GoldenError: If the document breaks its schema.
        """
        try:
            return cls.from_document(json.loads((folder / GOLDEN_FILE).read_bytes()))
        except (OSError, ValueError, SignatureError) as error:
            raise GoldenError(f"{GOLDEN_FILE} cannot be read: {error}") from error

    @classmethod
    def from_document(cls, document: object) -> GoldenSet:
        """Read the JSON form.

        Raises:
            SignatureError: If it breaks its schema.
        """
        root = Section(document, "golden")
        atol = root.section("atol")
        golden = cls(
            rtol=root.number("rtol"),
            atol={name: atol.number(name) for name in atol.names()},
            samples=tuple(GoldenSample.from_section(item) for item in root.sections("samples")),
        )
        atol.finish()
        root.finish()
        for sample in golden.samples:
            for name in sample.outputs.keys() - golden.atol.keys():
                raise SignatureError(f"golden.atol has no tolerance for the output {name!r}; export the model again")
        if not golden.samples:
            raise SignatureError("golden.samples is empty; an archive without golden samples cannot be trusted")
        return golden

    def to_document(self) -> dict[str, Any]:
        """The JSON form; :meth:`from_document` reads it back."""
        return {
            "rtol": self.rtol,
            "atol": dict(self.atol),
            "samples": [sample.to_document() for sample in self.samples],
        }

    def check(self, folder: Path, outputs: Sequence[Mapping[str, Array]], labels: Sequence[str | None]) -> float:
        """Compare a replay with the recorded answers.

        Args:
            folder: Where the archive's files lie.
            outputs: For each sample, the model's outputs by name, without the batch axis.
            labels: For each sample, the likeliest class; None if the model has no classes.

        Returns:
            The largest absolute difference.

        Raises:
            GoldenError: If an output lies outside the tolerances, holds NaN, or ranks another class first.
        """
        largest = 0.0
        for sample, found, label in zip(self.samples, outputs, labels, strict=True):
            if found.keys() != sample.outputs.keys():
                raise GoldenError(
                    f"{sample.file}: the outputs are {', '.join(sorted(found))}, "
                    f"expected {', '.join(sorted(sample.outputs))}"
                )
            for name, path in sample.outputs.items():
                largest = max(largest, self._difference(sample.file, name, found[name], _read_output(folder, path)))
            if sample.label is not None and label != sample.label:
                raise GoldenError(f"{sample.file}: the answer is {label!r}, the checkpoint's was {sample.label!r}")
        return largest

    def _difference(self, file: str, name: str, output: Array, expected: Array) -> float:
        """The largest absolute difference of one output."""
        if output.shape != expected.shape:
            raise GoldenError(f"{file}: {name} has the shape {output.shape}, expected {expected.shape}")
        if expected.dtype.kind not in "biuf" or (expected.dtype.kind == "f") != (output.dtype.kind == "f"):
            raise GoldenError(f"{file}: {name} is {output.dtype}, expected {expected.dtype}")
        expected = expected.astype(np.float64)
        if not np.isfinite(expected).all():
            raise GoldenError(f"{file}: the expected {name} holds infinity or NaN; export the model again")
        with np.errstate(over="ignore"):  # infinity fails below
            differences = np.abs(output.astype(np.float64) - expected)
        difference = float(differences.max(initial=0.0))
        # Numbers that are not measured but counted must be the same.
        exact = output.dtype.kind != "f"
        bound = 0.0 if exact else self.atol[name] + self.rtol * np.abs(expected)
        # Not written as `differences > bound`: a NaN must fail.
        if not np.all(differences <= bound):
            allowed = "0" if exact else f"atol {self.atol[name]:g} + rtol {self.rtol:g}"
            raise GoldenError(
                f"{file}: {name} differs from the checkpoint's by up to {difference:.3g}, more than "
                f"{allowed} allow; this machine does not compute what was exported"
            )
        return difference


def _inside(path: str) -> str:
    """Refuse a path that could lead out of the archive."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path:
        raise SignatureError(f"the path {path!r} leads out of the archive; give one relative to its root")
    return path


def _read_output(folder: Path, path: str) -> Array:
    try:
        array: Array = np.load(folder / path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise GoldenError(f"{path} cannot be read: {error}; export the model again") from error
    if not isinstance(array, np.ndarray):  # an .npz
        raise GoldenError(f"{path} holds several arrays, not one; export the model again")
    return array
