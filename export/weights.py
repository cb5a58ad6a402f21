"""Reading of weight files: PyTorch's, and safetensors. Nothing in them can run.

PyTorch files are read with ``weights_only=True``: a file that somebody sent must not be able to run code.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from export.errors import CheckpointError
from handlers.digests import sha256
from handlers.document import shown

_SAFETENSORS = ".safetensors"
_CHUNK_BYTES = 1 << 20
# The first byte of every pickle; a zip begins with "PK".
_PICKLE_MARK = b"\x80"


def read_weights(path: Path) -> tuple[dict[str, Any], str]:
    """The content of a file and its SHA-256, both from the same open file.

    Args:
        path: A file of ``torch.save``, or one called ``*.safetensors``.

    Raises:
        CheckpointError: If it is damaged, or holds more than tensors and plain values.
    """
    read = _read_safetensors if path.suffix == _SAFETENSORS else _read_torch
    try:
        with path.open("rb") as file:
            content, digest = read(file, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint or a state_dict")
    return dict(content), digest


def load_weights(module: torch.nn.Module, state: Mapping[str, Any]) -> None:
    """Copy weights into a module; every name and shape must fit.

    Names of one tensor need to be there once only: files of safetensors, such as those of transformers, leave out the
    others of a tied weight.

    Raises:
        CheckpointError: If they do not fit; the message says in which way, and no more.
    """
    aliases = _aliases(module)
    try:
        # Not strict, which would end at the first kind of misfit. PyTorch's hooks may rename what old versions wrote.
        missing, unexpected = module.load_state_dict(state, strict=False)
    except Exception as error:  # shapes that differ, or the user's own hooks
        detail = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise CheckpointError(detail[0].strip()) from error
    faults = [f"{name} is missing" for name in missing if not aliases.get(name, set()) & state.keys()]
    faults += [f"{shown(name)} is unknown" for name in unexpected]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"{', '.join(faults[:3])}{more}")


def _aliases(module: torch.nn.Module) -> dict[str, set[str]]:
    """Names that stand for the same tensor, by each of them."""
    names: dict[int, set[str]] = {}
    for kind in (module.named_parameters, module.named_buffers):
        for name, tensor in kind(remove_duplicate=False):
            names.setdefault(id(tensor), set()).add(name)
    return {name: group for group in names.values() for name in group}


def _read_safetensors(file: IO[bytes], path: Path) -> tuple[object, str]:
    from safetensors import SafetensorError  # noqa: PLC0415  # only these files need it
    from safetensors.torch import load  # noqa: PLC0415

    data = file.read()
    try:
        return load(data), hashlib.sha256(data).hexdigest()
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} is truncated, corrupt or not a safetensors file; fetch a clean copy") from error


def _read_torch(file: IO[bytes], path: Path) -> tuple[object, str]:
    digest = sha256(iter(lambda: file.read(_CHUNK_BYTES), b""))
    _require_sound(file, path)
    file.seek(0)
    return _load(file, path), digest


def _require_sound(file: IO[bytes], path: Path) -> None:
    """Compare every record with its CRC-32: torch.load does not, and takes a flipped bit for a weight."""
    file.seek(0)
    if file.read(1) == _PICKLE_MARK:
        raise CheckpointError(
            f"{path} is a bare pickle, as PyTorch wrote before version 1.6, without the checksums that torchport "
            "verifies; load it where you trust it and save its state_dict again with torch.save"
        )
    try:
        with zipfile.ZipFile(file) as archive:
            for record in archive.infolist():
                with archive.open(record) as content:
                    while content.read(_CHUNK_BYTES):
                        pass
    except Exception as error:  # zipfile raises a dozen unrelated types on damaged files
        raise CheckpointError(
            f"{path} is truncated, corrupt or not a PyTorch file; train again or fetch a clean copy"
        ) from error


def _load(file: IO[bytes], path: Path) -> Any:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # the bytes are sound, so whatever this trips over was written like that
        raise CheckpointError(
            f"{path} holds more than weights and plain values, or is no checkpoint at all; "
            "torchport never unpickles objects: save the model's state_dict"
        ) from error
