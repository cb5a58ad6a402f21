"""What a benchmark sends: requests like those that the load will bring, in a seeded order."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.archive import Archive
from export.errors import MeasurementError
from export.evaluation import JSON, LabelledRequest, random_requests, text_request
from export.inspection import Inspection
from export.table import Columns, read_table
from handlers.errors import RequestError
from handlers.golden import GOLDEN_FILE, GoldenSet
from handlers.model import ServedModel
from handlers.signature import TEXT_CLASSIFICATION, Signature
from handlers.tensors import TensorBatch

RANDOM_REQUESTS = 256
# Enough to stand for a distribution; decoding them takes seconds at most.
MOST_REQUESTS = 2048

# Written out, not asked of `mimetypes`: that module reads the machine's own tables.
_CONTENT_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".json": JSON,
    ".txt": "text/plain",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """Requests to draw from, decoded.

    Attributes:
        source: Where they come from, in words.
        requests: The requests.
        samples: For each of them, its samples.
    """

    source: str
    requests: tuple[LabelledRequest, ...]
    samples: tuple[tuple[TensorBatch, ...], ...]

    def draw(self, count: int, *, seed: int) -> list[int]:
        """Positions of requests, drawn with replacement: as independent of each other as clients are."""
        return [int(i) for i in np.random.default_rng([seed, count]).integers(len(self.requests), size=count)]

    def sizes(self, signature: Signature) -> dict[str, dict[str, float]]:
        """For each dynamic axis: the shortest, mean and longest size of the samples."""
        found: dict[str, list[int]] = {name: [] for name in signature.axes}
        for sample in itertools.chain.from_iterable(self.samples):
            for name, size in _axis_sizes(sample, signature).items():
                found[name].append(size)
        return {
            name: {"minimum": min(sizes), "mean": sum(sizes) / len(sizes), "maximum": max(sizes)}
            for name, sizes in found.items()
        }

    def to_document(self, signature: Signature) -> dict[str, Any]:
        """The JSON form, without the requests themselves."""
        return {
            "source": self.source,
            "requests": len(self.requests),
            "samples": sum(map(len, self.samples)),
            "sizes": self.sizes(signature),
        }


def golden_requests(archive: Archive) -> list[LabelledRequest]:
    """The golden samples of an archive as requests."""
    golden = GoldenSet.from_document(archive.read_json(GOLDEN_FILE))
    return [
        LabelledRequest(body=archive.read(sample.file), content_type=sample.content_type, where=sample.file)
        for sample in golden.samples
    ]


def file_requests(paths: Sequence[Path]) -> list[LabelledRequest]:
    """One request a file, whose name says what it is.

    Raises:
        MeasurementError: If a file cannot be read, or its name says nothing.
    """
    requests = []
    for path in paths:
        content_type = _CONTENT_TYPES.get(path.suffix.lower())
        if content_type is None:
            raise MeasurementError(
                f"the name of the input {path} does not say what it is; it must end in {', '.join(_CONTENT_TYPES)}"
            )
        try:
            body = path.read_bytes()
        except OSError as error:
            raise MeasurementError(f"cannot read the input {path}: {error.strerror}; give an existing file") from error
        requests.append(LabelledRequest(body=body, content_type=content_type, where=str(path)))
    return requests


def text_file_requests(path: Path, columns: Columns | None = None) -> list[LabelledRequest]:
    """One request a text: of each line of a ``.txt`` file, or of each row of a table.

    Args:
        path: The file.
        columns: Where a table has its text.

    Raises:
        MeasurementError: If the file cannot be read or holds no text.
        EvaluationError: If it is a broken table.
    """
    if not path.is_file():
        raise MeasurementError(f"there is no file of texts {path}; give an existing one with --texts")
    if path.suffix.lower() != ".txt":
        requests = [
            text_request(row.text, where=f"{path}, line {row.line}")
            for row in read_table(path, columns, labelled=False)
        ]
    else:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise MeasurementError(f"{path} is not UTF-8 text; convert it") from error
        except OSError as error:
            raise MeasurementError(f"{path} cannot be read: {error.strerror}") from error
        requests = [
            text_request(line, where=f"{path}, line {number}")
            for number, line in enumerate(lines, start=1)
            if line.strip()
        ]
    if not requests:
        raise MeasurementError(f"{path} holds no text; write one a line")
    return requests


def collect(
    inspection: Inspection,
    *,
    inputs: Sequence[Path],
    texts: Path | None,
    columns: Columns | None,
    random: bool,
    seed: int,
) -> tuple[str, list[LabelledRequest]]:
    """The requests that were asked for, and where they come from in words.

    Args:
        inspection: The archive.
        inputs: Files with one request each.
        texts: A file of texts.
        columns: Where it has its text, if it is a table.
        random: Random requests over the signature's ranges.
        seed: Decides which of too many are taken, and the random ones.

    Raises:
        MeasurementError: If more than one source was given, or one that does not fit the model.
    """
    if sum((bool(inputs), texts is not None, random)) > 1:
        raise MeasurementError("give only one of --input, --texts and --random")
    if columns is not None and texts is None:
        raise MeasurementError("--columns names the column of a table of texts; give the table with --texts")
    signature = inspection.signature
    if inputs:
        source, requests = f"{len(inputs)} files", file_requests(inputs)
    elif texts is not None:
        if signature.task != TEXT_CLASSIFICATION:
            raise MeasurementError(f"--texts is for models of texts, and this one's task is {signature.task}")
        source, requests = f"the texts of {texts.name}", text_file_requests(texts, columns)
    elif random:
        source = "random requests over the signature's ranges"
        requests = random_requests(signature, RANDOM_REQUESTS, seed=seed)
    else:
        source, requests = "golden samples", golden_requests(inspection.archive)
    if len(requests) > MOST_REQUESTS:
        chosen = np.random.default_rng(seed).choice(len(requests), MOST_REQUESTS, replace=False)
        requests = [requests[int(i)] for i in sorted(chosen)]
    return source, requests


def decode_all(served: ServedModel, source: str, requests: Sequence[LabelledRequest]) -> Workload:
    """Decode requests, once each.

    Raises:
        MeasurementError: If the model refuses one: the time to refuse is not what a benchmark is for.
    """
    samples = []
    for request in requests:
        try:
            samples.append(tuple(served.decode(request.parts())))
        except RequestError as error:
            raise MeasurementError(f"{request.where} is refused: {error.message}") from error
    return Workload(source=source, requests=tuple(requests), samples=tuple(samples))


def _axis_sizes(sample: TensorBatch, signature: Signature) -> dict[str, int]:
    return {
        name: sample[spec.name].shape[axis - 1] for spec in signature.inputs for axis, name in spec.dynamic_axes.items()
    }
