"""Reading of checkpoints: the weights, and the module that they belong to.

Checkpoints are read with ``weights_only=True``: a file that somebody sent must not be able to run code.
"""

from __future__ import annotations

import importlib
import json
import math
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
import yaml

from export.errors import CheckpointError
from handlers.digests import sha256
from handlers.document import shown
from handlers.errors import SignatureError
from handlers.signature import Signature

CHECKPOINT_FORMAT = "torchport-checkpoint"
CHECKPOINT_VERSION = 1
CHECKPOINT_FILE = "checkpoint.pt"

_CHUNK_BYTES = 1 << 20
# The first byte of every pickle; a zip begins with "PK".
_PICKLE_MARK = b"\x80"

# A checkpoint is data, and ``subprocess:run`` is an import path too: it may name torchport's own functions only.
# Any other factory or data set has to be named by the user, who knows whose code it is.
_OWN_FUNCTIONS = (
    "models.convnet:build_conv_classifier",
    "models.text_encoder:build_text_classifier",
    "models.digits:evaluation_samples",
    "models.image_folder:evaluation_samples",
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint with its module built and its weights loaded.

    Attributes:
        sha256: Digest of the file.
        module: The reference model, in eval mode, on the CPU, in float32.
        signature: What the model takes and gives; no artifact yet.
        factory: Import path ``package.module:function`` that built the module.
        config: Keyword arguments of the factory.
        metrics: What training measured on the held-out split; empty when unknown.
        evaluation: Import path and options of the held-out samples; None when unknown.
        record: Facts for the provenance: recipe, versions, git revision, epoch.
    """

    sha256: str
    module: torch.nn.Module
    signature: Signature
    factory: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    evaluation: dict[str, Any] | None
    record: dict[str, Any]


def resolve_checkpoint(source: Path) -> Path:
    """The checkpoint file of a run folder, or the file itself.

    Raises:
        CheckpointError: If there is none.
    """
    path = source / CHECKPOINT_FILE if source.is_dir() else source
    if not path.is_file():
        hint = "it holds no finished training; run `torchport train` first" if source.is_dir() else "check the path"
        raise CheckpointError(f"there is no checkpoint at {path}; {hint}")
    return path


def load_checkpoint(source: Path, *, factory: str | None = None, signature_file: Path | None = None) -> Checkpoint:
    """Read a checkpoint and build its module.

    Args:
        source: A run folder, a torchport checkpoint, or a file that holds a plain ``state_dict``.
        factory: Import path of the function that builds the module; needed for a plain ``state_dict``.
        signature_file: YAML or JSON signature; needed for a plain ``state_dict``.

    Raises:
        CheckpointError: If anything about it cannot be used.
    """
    path = resolve_checkpoint(source)
    content, digest = _read(path)
    if content.get("format") != CHECKPOINT_FORMAT:
        if factory is None or signature_file is None:
            raise CheckpointError(
                f"{path} is not a torchport checkpoint; for a plain state_dict give --model package.module:factory "
                "and --signature FILE"
            )
        content = {"state_dict": content, "model": {}}
    elif not _is_known_version(version := content.get("format_version")):
        raise CheckpointError(
            f"{path} is a checkpoint of version {shown(version)}, and this torchport reads version "
            f"{CHECKPOINT_VERSION}; export with the torchport that trained it, or train again"
        )
    if signature_file is not None:
        content["signature"] = _read_signature(signature_file)
    model = _mapping(content, "model", path)
    state = _mapping(content, "state_dict", path)
    config = _mapping(model, "config", path, optional=True)
    if factory is None:
        factory = str(model.get("factory"))
        check_own(factory, "give --model with the factory of your own module")
    try:
        signature = Signature.from_document(content.get("signature"))
    except SignatureError as error:
        where = f"the signature {signature_file}" if signature_file else f"the signature in {path}"
        raise CheckpointError(f"{where} cannot be used: {error}") from error
    metrics = _mapping(content, "metrics", path, optional=True)
    record = {key: content.get(key) for key in ("recipe", "versions", "git_revision", "epoch")}
    _check_facts(path, config, metrics, record)
    return Checkpoint(
        sha256=digest,
        module=_build_module(factory, config, state, path),
        signature=signature,
        factory=factory,
        config=config,
        metrics=metrics,
        evaluation=_mapping(content, "evaluation", path, optional=True) or None,
        record=record,
    )


def check_own(import_path: str, remedy: str) -> None:
    """Refuse an import path out of a checkpoint unless it is one of torchport's own.

    Raises:
        CheckpointError: If it is not.
    """
    if import_path not in _OWN_FUNCTIONS:
        raise CheckpointError(
            f"the checkpoint asks to call {shown(import_path)}, and torchport calls only its own functions "
            f"({', '.join(_OWN_FUNCTIONS)}) for a checkpoint; {remedy}"
        )


def _mapping(content: Mapping[str, Any], key: str, path: Path, *, optional: bool = False) -> dict[str, Any]:
    value = content.get(key)
    if value is None and optional:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        raise CheckpointError(
            f"{path}: {key!r} is {'missing' if value is None else 'not a mapping of names to values'}; "
            "train again with this version of torchport"
        )
    return dict(value)


def _is_known_version(version: object) -> bool:
    return isinstance(version, int) and version == CHECKPOINT_VERSION


def _check_facts(path: Path, config: dict[str, Any], metrics: dict[str, Any], record: dict[str, Any]) -> None:
    """What the provenance copies must be JSON, and the metrics numbers."""
    for name, value in metrics.items():
        if not _is_finite(value):
            raise CheckpointError(
                f"{path}: the metric {shown(name)} is {shown(value)}, not a finite number; train again"
            )
    accuracy = metrics.get("accuracy")
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise CheckpointError(f"{path}: the metric 'accuracy' is {accuracy:g}; it must lie from 0 to 1")
    try:
        json.dumps([config, metrics, record], allow_nan=False, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} holds facts that JSON cannot carry ({error}); train again") from error


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def import_object(path: str) -> Callable[..., Any]:
    """Import ``package.module:name``.

    Raises:
        CheckpointError: If it is not of that form, or does not import.
    """
    module_name, separator, name = path.partition(":")
    if not separator or not module_name or not name:
        raise CheckpointError(f"{path!r} is not an import path; write package.module:function")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (Exception, SystemExit) as error:  # importing runs the user's code, which may end with sys.exit(0)
        raise CheckpointError(
            f"{path} cannot be imported ({_reason(error)}); install its package or run from the folder that holds it"
        ) from error
    if not callable(found):
        raise CheckpointError(f"{path} is not a function or class")
    return found  # type: ignore[no-any-return]


def _read(path: Path) -> tuple[dict[str, Any], str]:
    """The content of a checkpoint and the SHA-256 of its file, both from the same open file."""
    try:
        with path.open("rb") as file:
            digest = sha256(iter(lambda: file.read(_CHUNK_BYTES), b""))
            _require_sound(file, path)
            file.seek(0)
            content = _load(file, path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint or a state_dict")
    return dict(content), digest


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


def _read_signature(path: Path) -> object:
    """A signature document from JSON or YAML."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"the signature {path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CheckpointError(f"the signature {path} is not UTF-8 text") from error
    try:
        # Not left to YAML, which refuses JSON's tabs and takes its 1e-3 for a string.
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-13-01
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise CheckpointError(f"the signature {path} is neither valid JSON nor valid YAML{line}") from error


def _reason(error: BaseException) -> str:
    """The first line of an error of somebody else's code: messages here are one sentence."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def _build_module(factory: str, config: dict[str, Any], state: dict[str, Any], path: Path) -> torch.nn.Module:
    build = import_object(factory)
    try:
        module = build(**config)
    except (Exception, SystemExit) as error:  # the factory is the user's code
        raise CheckpointError(f"{factory} fails on the configuration {shown(config)}: {_reason(error)}") from error
    if not isinstance(module, torch.nn.Module):
        raise CheckpointError(f"{factory} gives a {type(module).__name__}, not a torch.nn.Module")
    try:
        # Not strict, which would end at the first kind of misfit. PyTorch's hooks may rename what old versions wrote.
        missing, unexpected = module.load_state_dict(state, strict=False)
    except Exception as error:  # shapes that differ, or the user's own hooks
        detail = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise CheckpointError(f"the weights in {path} do not fit {factory}: {detail[0].strip()}") from error
    faults = [f"{name} is missing" for name in missing] + [f"{shown(name)} is unknown" for name in unexpected]
    if faults:
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"the weights in {path} do not fit {factory}: {', '.join(faults[:3])}{more}")
    return module.float().eval()
