"""Evaluation data: labelled request bodies, exactly as a client would send them."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from export.checkpoint import check_own, import_object
from export.errors import CheckpointError, EvaluationError
from handlers.errors import RequestError, one_line
from handlers.image import ImageDecoder
from handlers.request import Part, parse_request
from handlers.signature import Signature

_SUFFIXES = {".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg"}


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledRequest:
    """A request body and its right class.

    Attributes:
        body: The bytes that a client would send.
        content_type: Their media type.
        label: The right class, one of the signature's labels.
    """

    body: bytes
    content_type: str
    label: str

    def parts(self) -> list[Part]:
        """The form in which handlers take it."""
        return [Part(value=self.body, content_type=self.content_type)]


def load_evaluation(
    signature: Signature, *, folder: Path | None, source: dict[str, Any] | None
) -> list[LabelledRequest]:
    """Collect the evaluation data of an export.

    Args:
        signature: Its labels are the classes allowed.
        folder: A folder with one sub-folder of PNG or JPEG files a class; it wins over ``source``.
        source: ``{"source": "package.module:function", "options": {...}}`` from the checkpoint; the function
            yields ``(uint8 array [height, width] or [height, width, 3], class index)``.

    Returns:
        The samples in their own order; empty when neither place is known.

    Raises:
        EvaluationError: If the data cannot be read or names unknown classes.
    """
    if folder is not None:
        return list(_from_folder(folder, signature))
    if source is not None:
        return list(_from_source(source, signature))
    return []


def random_images(signature: Signature, count: int, *, seed: int) -> Iterator[LabelledRequest]:
    """Images of uniformly random pixels, for models that come without evaluation data; their label is empty."""
    image = signature.image
    shape = (image.height, image.width) if image.channels == 1 else (image.height, image.width, image.channels)
    generator = np.random.default_rng(seed)
    for _ in range(count):
        pixels = generator.integers(0, 256, size=shape, dtype=np.uint8)
        yield LabelledRequest(body=_png(pixels), content_type="image/png", label="")


def _from_folder(folder: Path, signature: Signature) -> Iterator[LabelledRequest]:
    if not folder.is_dir():
        raise EvaluationError(f"there is no folder {folder}; --eval takes one sub-folder of images for each label")
    try:
        classes = sorted(path for path in folder.iterdir() if path.is_dir())
        unknown = [path.name for path in classes if path.name not in signature.labels]
        if unknown:
            raise EvaluationError(
                f"{folder / unknown[0]} is not named after a label; the labels are {', '.join(signature.labels)}"
            )
        files = [path for label in classes for path in sorted(label.iterdir()) if path.suffix.lower() in _SUFFIXES]
        if not files:
            raise EvaluationError(f"{folder} holds no PNG or JPEG files in sub-folders named after labels")
        for path in files:
            request = LabelledRequest(
                body=path.read_bytes(), content_type=_SUFFIXES[path.suffix.lower()], label=path.parent.name
            )
            _check(request, signature, str(path))
            yield request
    except OSError as error:
        raise EvaluationError(f"{error.filename or folder} cannot be read: {error.strerror or error}") from error


def _from_source(source: dict[str, Any], signature: Signature) -> Iterator[LabelledRequest]:
    path = str(source.get("source"))
    try:
        check_own(path, "give --eval with a folder of labelled images")
        samples: Iterable[tuple[np.ndarray[Any, Any], int]] = import_object(path)(**(source.get("options") or {}))
        count = 0
        for pixels, index in samples:
            if not 0 <= index < len(signature.labels):
                raise EvaluationError(f"{path} gives the class {index}; there are {len(signature.labels)} labels")
            yield LabelledRequest(body=_png(pixels), content_type="image/png", label=signature.labels[index])
            count += 1
        if not count:
            raise EvaluationError(f"{path} gives no evaluation data; give --eval with a folder of labelled images")
    except EvaluationError:
        raise
    except CheckpointError as error:
        raise EvaluationError(f"the checkpoint's evaluation data cannot be found: {error}") from error
    except Exception as error:  # its options come out of a file that anybody may have written
        raise EvaluationError(f"{path} fails to give the evaluation data: {one_line(error)}") from error


def _check(request: LabelledRequest, signature: Signature, where: str) -> None:
    """Refuse here what a worker would refuse: else a gate would blame the artifact for the data."""
    try:
        for payload in parse_request(request.parts(), max_samples=1).payloads:
            ImageDecoder(signature.image, max_samples=1).decode(payload)
    except RequestError as error:
        raise EvaluationError(f"{where} is no image that the model takes: {error.message}") from error


def _png(pixels: np.ndarray[Any, Any]) -> bytes:
    if pixels.dtype != np.uint8:
        raise EvaluationError(f"evaluation images must be uint8 arrays, not {pixels.dtype}")
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()
