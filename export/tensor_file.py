"""Evaluation data of the task ``tensor``: arrays in an ``.npz`` file."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from export.errors import EvaluationError
from handlers.document import shown
from handlers.signature import Signature
from handlers.tensors import Array, TensorSpec

LABELS = "labels"
# Of all arrays together, unpacked: a small file can unpack to more than any memory holds.
_MAX_BYTES = 4 << 30


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorRow:
    """One sample.

    Attributes:
        index: Its place in the file.
        inputs: Arrays by input name.
        label: Index of the right class; None when the file has no labels.
        outputs: The right outputs by name, as far as the file has them.
    """

    index: int
    inputs: dict[str, Array]
    label: int | None
    outputs: dict[str, Array]


def read_tensors(path: Path, signature: Signature) -> Iterator[TensorRow]:
    """The samples of a file.

    Args:
        path: An ``.npz`` file with one array for each input, samples on the first axis; optionally ``labels``, and
            arrays named after outputs.
        signature: Names, dtypes and shapes.

    Raises:
        EvaluationError: If the file cannot be read, or an array is missing, unknown, or does not fit.
    """
    arrays = _load(path)
    inputs = {spec.name: _fitted(path, arrays, spec) for spec in signature.inputs}
    outputs = {spec.name: _fitted(path, arrays, spec) for spec in signature.outputs if spec.name in arrays}
    known = {*inputs, *outputs, LABELS}
    unknown = sorted(arrays.keys() - known)
    if unknown:
        raise EvaluationError(
            f"{path} has an array {shown(unknown[0])}, which is no input or output; the names are "
            f"{', '.join(spec.name for spec in (*signature.inputs, *signature.outputs))} and {LABELS}"
        )
    labels = None
    if LABELS in arrays and LABELS not in inputs and LABELS not in outputs:
        labels = _class_indices(path, arrays[LABELS], signature)
    sizes = {name: len(array) for name, array in (*inputs.items(), *outputs.items())}
    if labels is not None:
        sizes[LABELS] = len(labels)
    if len(set(sizes.values())) != 1:
        raise EvaluationError(
            f"{path} has arrays of different lengths: {_listed(sizes)}; give one row a sample in each"
        )
    if not next(iter(sizes.values())):
        raise EvaluationError(f"{path} holds no sample; give at least one")
    for i in range(next(iter(sizes.values()))):
        yield TensorRow(
            index=i,
            inputs={name: array[i] for name, array in inputs.items()},
            label=None if labels is None else int(labels[i]),
            outputs={name: array[i] for name, array in outputs.items()},
        )


def _load(path: Path) -> dict[str, Array]:
    try:
        # Opened here: NumPy leaves a file open that turns out to be no archive.
        with path.open("rb") as file:
            _check_size(path, file)
            with np.load(file, allow_pickle=False) as arrays:
                return {name: arrays[name] for name in arrays.files}
    except EvaluationError:
        raise
    except OSError as error:
        raise EvaluationError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # zipfile, zlib and NumPy raise a dozen unrelated types on damaged files
        raise EvaluationError(f"{path} is damaged or not an .npz file; write it with numpy.savez") from error


def _check_size(path: Path, file: IO[bytes]) -> None:
    """Refuse what would fill the memory; zipfile unpacks no more of an entry than its header says."""
    with zipfile.ZipFile(file) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > _MAX_BYTES:
        raise EvaluationError(
            f"{path} unpacks to {size / (1 << 30):.1f} GiB, and at most {_MAX_BYTES >> 30} GiB are read; "
            "give fewer samples"
        )
    file.seek(0)


def _fitted(path: Path, arrays: dict[str, Array], spec: TensorSpec) -> Array:
    if spec.name not in arrays:
        raise EvaluationError(
            f"{path} has no array {spec.name!r}, which is an input; it has {', '.join(map(shown, arrays)) or 'none'}"
        )
    array = arrays[spec.name]
    fits = array.ndim == len(spec.shape) and all(
        isinstance(axis, str) or axis == size for axis, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fits:
        raise EvaluationError(
            f"{path}: {spec.name!r} has the shape {list(array.shape)}; the signature says {list(spec.shape)}"
        )
    if array.dtype != spec.numpy_dtype and not np.can_cast(array.dtype, spec.numpy_dtype, casting="same_kind"):
        raise EvaluationError(f"{path}: {spec.name!r} is {array.dtype}; the signature says {spec.dtype}")
    fitted = array.astype(spec.numpy_dtype)
    if spec.numpy_dtype.kind in "iu" and not np.array_equal(fitted, array):
        raise EvaluationError(f"{path}: {spec.name!r} has numbers that {spec.dtype} cannot hold")
    return fitted


def _class_indices(path: Path, labels: Array, signature: Signature) -> Array:
    shape = signature.outputs[0].shape
    classes = shape[-1] if len(shape) == 2 and len(signature.outputs) == 1 else None
    if not isinstance(classes, int) or not signature.outputs[0].dtype.startswith("float"):
        raise EvaluationError(
            f"{path} has {LABELS}, for which the model must have one output of the shape [batch, classes]; "
            "give the right outputs instead, under their names"
        )
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise EvaluationError(f"{path}: {LABELS} must be whole numbers, one a sample")
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise EvaluationError(
            f"{path}: {LABELS} run from {labels.min()} to {labels.max()}; there are {classes} classes"
        )
    return labels


def _listed(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
