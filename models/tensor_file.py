"""Tensors and plain values in a file: same content, same bytes; every byte checked when read."""

import io
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from models.atomic import atomic_writer
from models.errors import (
    CheckpointCorruptError,
    CheckpointFormatError,
    CheckpointNotFoundError,
    CheckpointWriteError,
)


def write_tensor_file(content: Mapping[str, Any], path: Path) -> None:
    """Writes `content`, replacing the file at `path` in one step.

    Args:
        content: str, int, float, bool, None, tensors, and lists, tuples and mappings of them.
        path: where to; its folder must exist.

    Raises:
        CheckpointWriteError: when the file system refuses; the old file is untouched.
        TypeError: for a value that `weights_only=True` would refuse to load.
    """
    # torch.save names the records after the file it is given; a buffer has no name.
    buffer = io.BytesIO()
    torch.save(_canonical(content), buffer)
    try:
        with atomic_writer(path) as file:
            file.write(buffer.getbuffer())
    except OSError as error:
        raise CheckpointWriteError(
            f"{path} cannot be written ({error.strerror}); free space or choose another folder with --out."
        ) from error


def read_tensor_file(path: Path) -> Any:
    """Reads a file that `torch.save` wrote, to the CPU, without running any code in it.

    Raises:
        CheckpointNotFoundError: when there is no such file.
        CheckpointCorruptError: when it is truncated or a byte has changed.
        CheckpointFormatError: when it holds more than tensors and plain values.
    """
    try:
        with path.open("rb") as file:
            _require_sound(path, file)
            file.seek(0)
            return _load(path, file)
    except FileNotFoundError as error:
        raise CheckpointNotFoundError(
            f"There is no checkpoint {path}; check the path, or train one with torchport train digits."
        ) from error
    except OSError as error:
        raise CheckpointNotFoundError(f"{path} cannot be read ({error.strerror}); give a checkpoint file.") from error


def _require_sound(path: Path, file: IO[bytes]) -> None:
    """Compares every record with its CRC-32, which torch.load does not."""
    try:
        with zipfile.ZipFile(file) as archive:
            sound = archive.testzip() is None
    except Exception:  # damaged headers make zipfile raise almost anything
        sound = False
    if not sound:
        raise CheckpointCorruptError(
            f"{path} is truncated, damaged or not a PyTorch file; copy it again, or train again."
        )


def _load(path: Path, file: IO[bytes]) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the bytes are sound, so whatever this trips over was written like that
        raise CheckpointFormatError(
            f"{path} is not a checkpoint of tensors and plain values; give a checkpoint.pt that torchport train "
            "wrote, or a saved state_dict."
        ) from error


def _canonical(value: Any) -> Any:
    """Rebuilds a value so that its pickle depends on content alone.

    Pickle writes an object once and refers back to it afterwards, so equal content gives other bytes when the
    objects were shared otherwise, as after a resume. Fresh containers and interned strings settle that; cloned
    tensors also leave behind whatever else their storage held.
    """
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, str):
        return sys.intern(str(value))
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True).contiguous()
    if isinstance(value, Mapping):
        return {_canonical(key): _canonical(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_canonical(item) for item in value)
    raise TypeError(f"A checkpoint cannot hold a {type(value).__name__}; store plain values and tensors.")
