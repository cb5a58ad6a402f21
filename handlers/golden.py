"""Golden samples: request bodies with the outputs that the checkpoint gave for them at export."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.document import Section
from handlers.errors import GoldenError, SignatureError

GOLDEN_FILE = "golden/expected.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenSample:
    """One request and its right answer.

    Attributes:
        file: Path of the request body within the archive.
        content_type: Media type to send it with.
        output: The checkpoint's output for it, a row of the model's output tensor.
        label: The checkpoint's likeliest class.
    """

    file: str
    content_type: str
    output: tuple[float, ...]
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class GoldenSet:
    """All golden samples of an archive.

    Attributes:
        output_name: Which output the samples hold.
        rtol: Relative tolerance of the comparison.
        atol: Absolute tolerance of the comparison, in units of the output.
        samples: The samples, in order.
    """

    output_name: str
    rtol: float
    atol: float
    samples: tuple[GoldenSample, ...]

    @classmethod
    def load(cls, folder: Path, output_name: str) -> GoldenSet:
        """Read the golden samples of an extracted archive.

        Raises:
            GoldenError: If the document breaks its schema or a body is missing.
        """
        try:
            return cls.from_document(json.loads((folder / GOLDEN_FILE).read_bytes()), output_name)
        except (OSError, ValueError, SignatureError) as error:
            raise GoldenError(f"{GOLDEN_FILE} cannot be read: {error}") from error

    @classmethod
    def from_document(cls, document: object, output_name: str) -> GoldenSet:
        """Read the JSON form.

        Raises:
            SignatureError: If it breaks its schema.
        """
        root = Section(document, "golden")
        samples = []
        for item in root.sections("samples"):
            outputs = item.section("outputs")
            samples.append(
                GoldenSample(
                    file=item.string("file"),
                    content_type=item.string("content_type"),
                    output=outputs.numbers(output_name),
                    label=item.string("label"),
                )
            )
            outputs.finish()
            item.finish()
        golden = cls(
            output_name=output_name,
            rtol=root.number("rtol"),
            atol=root.number("atol"),
            samples=tuple(samples),
        )
        root.finish()
        if not samples:
            raise SignatureError("golden.samples is empty; an archive without golden samples cannot be trusted")
        return golden

    def to_document(self) -> dict[str, Any]:
        """The JSON form; :meth:`from_document` reads it back."""
        return {
            "rtol": self.rtol,
            "atol": self.atol,
            "samples": [
                {
                    "file": sample.file,
                    "content_type": sample.content_type,
                    "outputs": {self.output_name: list(sample.output)},
                    "label": sample.label,
                }
                for sample in self.samples
            ],
        }

    def check(self, outputs: list[NDArray[np.float32]], labels: list[str]) -> float:
        """Compare a replay with the recorded answers.

        Args:
            outputs: One row ``[...]`` a sample.
            labels: One likeliest class a sample.

        Returns:
            The largest absolute difference.

        Raises:
            GoldenError: If a row lies outside the tolerances, holds NaN, or ranks another class first.
        """
        largest = 0.0
        for sample, output, label in zip(self.samples, outputs, labels, strict=True):
            expected = np.asarray(sample.output, dtype=np.float64)
            if output.shape != expected.shape:
                raise GoldenError(f"{sample.file}: the output has shape {output.shape}, expected {expected.shape}")
            difference = float(np.abs(output - expected).max())
            # Not written as `difference > bound`: a NaN must fail.
            if not np.all(np.abs(output - expected) <= self.atol + self.rtol * np.abs(expected)):
                raise GoldenError(
                    f"{sample.file}: the output differs from the checkpoint's by up to {difference:.3g}, more than "
                    f"atol {self.atol:g} + rtol {self.rtol:g} allow; this machine does not compute what was exported"
                )
            if label != sample.label:
                raise GoldenError(f"{sample.file}: the answer is {label!r}, the checkpoint's was {sample.label!r}")
            largest = max(largest, difference)
        return largest
