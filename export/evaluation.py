"""Evaluation and calibration data: request bodies, exactly as a client would send them.

============================  ====================================================================================
task                          ``--eval DATA`` and ``--calibration DATA``
============================  ====================================================================================
``image-classification``      a folder with one sub-folder of PNG or JPEG files a label
``text-classification``       a .csv, .tsv or .jsonl file with a text and a label in each row
``tensor``                    an .npz file: one stacked array an input, and optionally ``labels`` (class indices) or
                              the right outputs by their names
============================  ====================================================================================

Without DATA, the samples come from what the checkpoint itself names. Calibration data needs no labels.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from export.checkpoint import check_own, import_object
from export.errors import CheckpointError, EvaluationError
from export.inputs import SEED, random_samples
from export.table import Columns, read_table
from export.tensor_file import read_tensors
from handlers.document import shown
from handlers.errors import one_line
from handlers.preprocessing import ImagePreprocessing
from handlers.request import Part
from handlers.signature import IMAGE_CLASSIFICATION, TENSOR, TEXT_CLASSIFICATION, Signature
from handlers.tensors import Array, TensorBatch

CALIBRATION_SAMPLES = 256
JSON = "application/json"

_IMAGE_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}
_LETTERS = "etaoinshrdlucmfwypvbgkjqxz"


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledRequest:
    """A request body with one sample, and what is right for it.

    Attributes:
        body: The bytes that a client would send.
        content_type: Their media type.
        label: Index of the right class; None when unknown.
        outputs: The right outputs by name, where they are known.
        where: Where it comes from, for messages.
    """

    body: bytes
    content_type: str
    label: int | None = None
    outputs: Mapping[str, Array] = field(default_factory=dict)
    where: str = "a sample"

    def parts(self) -> list[Part]:
        """The form in which handlers take it."""
        return [Part(value=self.body, content_type=self.content_type)]


def load_evaluation(
    signature: Signature,
    *,
    data: Path | None,
    source: Mapping[str, Any] | None,
    columns: Columns | None = None,
) -> list[LabelledRequest]:
    """Collect the evaluation data of an export.

    Args:
        signature: Its labels are the classes allowed.
        data: A folder or file, see above; it wins over ``source``.
        source: ``{"source": "package.module:function", "options": {...}}`` from the checkpoint; the function yields
            ``(sample, class index)``, where a sample is a text, or uint8 pixels ``[height, width]`` or
            ``[height, width, 3]``.
        columns: Where text and label stand in a table.

    Returns:
        The samples in their own order; empty when neither place is known.

    Raises:
        EvaluationError: If the data cannot be read or names unknown classes.
    """
    if data is not None:
        return list(_from_data(data, signature, columns, labelled=True))
    if source:
        return list(_from_source(source, signature, {}, "evaluation", "--eval"))
    return []


def load_calibration(
    signature: Signature,
    *,
    data: Path | None,
    source: Mapping[str, Any] | None,
    columns: Columns | None = None,
) -> list[LabelledRequest]:
    """Collect the first samples that an int8 export measures value ranges on.

    Args:
        signature: What the samples must be.
        data: A folder or file, see above; it wins over ``source``.
        source: As in :func:`load_evaluation`. Asked for its split ``train``: ranges that were measured on the
            held-out split would make the accuracy on it look better than it is.
        columns: Where the text stands in a table.

    Returns:
        At most ``CALIBRATION_SAMPLES`` samples, in the order of the data; empty when neither place is known.

    Raises:
        EvaluationError: If the data cannot be read.
    """
    samples: Iterator[LabelledRequest] = iter(())
    if data is not None:
        samples = _from_data(data, signature, columns, labelled=False)
    elif source:
        samples = _from_source(source, signature, {"split": "train"}, "calibration", "--calibration")
    return list(itertools.islice(samples, CALIBRATION_SAMPLES))


def random_requests(signature: Signature, count: int, *, seed: int = SEED) -> list[LabelledRequest]:
    """Requests with random contents, for models that come without evaluation data."""
    generator = np.random.default_rng([seed, count])
    if signature.task == TENSOR:
        return [tensor_request(sample) for sample in random_samples(signature, count, seed=seed)]
    if signature.image is not None:
        return [image_request(_random_pixels(generator, signature.image)) for _ in range(count)]
    return [text_request(_random_text(generator, words=1 << (i % 7))) for i in range(count)]


def image_request(pixels: Array, *, label: int | None = None, where: str = "a sample") -> LabelledRequest:
    """A PNG file of uint8 pixels, ``[height, width]`` or ``[height, width, 3]``."""
    if pixels.dtype != np.uint8:
        raise EvaluationError(f"{where}: evaluation images must be uint8 arrays, not {pixels.dtype}")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return LabelledRequest(body=buffer.getvalue(), content_type="image/png", label=label, where=where)


def text_request(text: str, *, label: int | None = None, where: str = "a sample") -> LabelledRequest:
    """A JSON body with one text."""
    body = json.dumps({"inputs": text}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return LabelledRequest(body=body, content_type=JSON, label=label, where=where)


def tensor_request(
    sample: TensorBatch,
    *,
    label: int | None = None,
    outputs: Mapping[str, Array] | None = None,
    where: str = "a sample",
) -> LabelledRequest:
    """A JSON body with one sample's tensors; float32 survives JSON bit for bit."""
    body = json.dumps({"inputs": {name: values.tolist() for name, values in sample.items()}}).encode()
    return LabelledRequest(body=body, content_type=JSON, label=label, outputs=outputs or {}, where=where)


def _random_pixels(generator: np.random.Generator, image: ImagePreprocessing) -> Array:
    shape = (image.height, image.width) if image.channels == 1 else (image.height, image.width, image.channels)
    return generator.integers(0, 256, size=shape, dtype=np.uint8)


def _random_text(generator: np.random.Generator, *, words: int) -> str:
    letters = np.array(list(_LETTERS))
    return " ".join("".join(generator.choice(letters, size=generator.integers(1, 9))) for _ in range(words))


def _from_data(
    data: Path, signature: Signature, columns: Columns | None, *, labelled: bool
) -> Iterator[LabelledRequest]:
    if columns is not None and signature.task != TEXT_CLASSIFICATION:
        raise EvaluationError(
            f"--columns names the columns of a table of texts, and this model's task is {signature.task}"
        )
    if signature.task == IMAGE_CLASSIFICATION:
        yield from _from_folder(data, signature, labelled=labelled)
    elif not data.is_file():
        kind = "a .csv, .tsv or .jsonl file" if signature.task == TEXT_CLASSIFICATION else "an .npz file"
        raise EvaluationError(f"there is no file {data}; data for the task {signature.task} is {kind}")
    elif signature.task == TEXT_CLASSIFICATION:
        yield from _from_table(data, signature, columns, labelled=labelled)
    else:
        for row in read_tensors(data, signature):
            yield tensor_request(row.inputs, label=row.label, outputs=row.outputs, where=f"{data}, row {row.index}")


def _from_folder(folder: Path, signature: Signature, *, labelled: bool) -> Iterator[LabelledRequest]:
    if not folder.is_dir():
        raise EvaluationError(f"there is no folder {folder}; images come in one sub-folder for each label")
    try:
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        if not labelled and not classes:
            classes = [folder]
        unknown = [path.name for path in classes if path.name not in signature.labels]
        if labelled and unknown:
            raise EvaluationError(
                f"{folder / unknown[0]} is not named after a label; the labels are {', '.join(signature.labels)}"
            )
        files = [path for label in classes for path in sorted(label.iterdir()) if path.suffix.lower() in _IMAGE_TYPES]
        if not files:
            raise EvaluationError(f"{folder} holds no PNG or JPEG files in sub-folders named after labels")
        for path in files if labelled else _alternating(files):
            name = path.parent.name
            yield LabelledRequest(
                body=path.read_bytes(),
                content_type=_IMAGE_TYPES[path.suffix.lower()],
                label=signature.labels.index(name) if name in signature.labels else None,
                where=str(path),
            )
    except OSError as error:
        raise EvaluationError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from error


def _alternating(files: Iterable[Path]) -> list[Path]:
    """The first of every folder, then the second ...: the first 256 files might all be of one class."""
    seen: dict[Path, int] = {}
    ranks = []
    for path in files:
        seen[path.parent] = seen.get(path.parent, -1) + 1
        ranks.append((seen[path.parent], path))
    return [path for _, path in sorted(ranks)]


def _from_table(
    path: Path, signature: Signature, columns: Columns | None, *, labelled: bool
) -> Iterator[LabelledRequest]:
    count = 0
    for row in read_table(path, columns, labelled=labelled):
        where = f"{path}, line {row.line}"
        label = _class_index(row.label, signature, where) if labelled else None
        yield text_request(row.text, label=label, where=where)
        count += 1
    if not count:
        raise EvaluationError(f"{path} holds no row; give a table with at least one")


def _class_index(label: object, signature: Signature, where: str) -> int:
    """The class that a table's label names, or whose index it is."""
    labels = signature.labels
    if label in labels:
        return labels.index(str(label))
    text = str(label)
    if text in labels:
        return labels.index(text)
    if text.isdecimal() and len(text) < 10 and int(text) < len(labels):
        return int(text)
    raise EvaluationError(
        f"{where}, has the label {shown(label)}, which the model does not know; its labels are {', '.join(labels)}"
    )


def _from_source(
    source: Mapping[str, Any], signature: Signature, extra: Mapping[str, Any], kind: str, option: str
) -> Iterator[LabelledRequest]:
    path = str(source.get("source"))
    try:
        check_own(path, f"give {option} DATA")
        options = {**(source.get("options") or {}), **extra}
        samples: Iterable[tuple[Any, int]] = import_object(path)(**options)
        count = 0
        for sample, index in samples:
            if not 0 <= index < len(signature.labels):
                raise EvaluationError(f"{path} gives the class {index}; there are {len(signature.labels)} labels")
            build = text_request if isinstance(sample, str) else image_request
            yield build(sample, label=int(index), where=f"sample {count} of {path}")
            count += 1
        if not count:
            raise EvaluationError(f"{path} gives no {kind} data; give {option} DATA")
    except EvaluationError:
        raise
    except CheckpointError as error:
        raise EvaluationError(f"the checkpoint's {kind} data cannot be found: {error}") from error
    except Exception as error:  # its options come out of a file that anybody may have written
        raise EvaluationError(f"{path} fails to give the {kind} data: {one_line(error)}; give {option} DATA") from error
