"""Reading of checkpoints: the weights, and the module that they belong to.

Checkpoints are read with ``weights_only=True``: a file that somebody sent must not be able to run code.
"""

from __future__ import annotations

import importlib
import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from export.errors import CheckpointError
from handlers.digests import file_sha256
from handlers.errors import SignatureError
from handlers.signature import Signature

CHECKPOINT_FORMAT = "torchport-checkpoint"
CHECKPOINT_VERSION = 1
CHECKPOINT_FILE = "checkpoint.pt"

# A checkpoint is data, and ``subprocess:run`` is an import path too: it may name torchport's own functions only.
# Any other factory or data set has to be named by the user, who knows whose code it is.
_OWN_FUNCTIONS = ("models.convnet:build_conv_classifier", "models.digits:evaluation_samples")


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
    content = _read(path)
    if content.get("format") != CHECKPOINT_FORMAT:
        if factory is None or signature_file is None:
            raise CheckpointError(
                f"{path} is not a torchport checkpoint; for a plain state_dict give --model package.module:factory "
                "and --signature FILE"
            )
        content = {"state_dict": content, "model": {}}
    elif content.get("format_version") != CHECKPOINT_VERSION:
        raise CheckpointError(
            f"{path} is a checkpoint of version {content.get('format_version')!r}, and this torchport reads version "
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
        raise CheckpointError(f"the signature for {path} cannot be used: {error}") from error
    metrics = _mapping(content, "metrics", path, optional=True)
    record = {key: content.get(key) for key in ("recipe", "versions", "git_revision", "epoch")}
    _check_facts(path, config, metrics, record)
    return Checkpoint(
        sha256=file_sha256(path),
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
            f"the checkpoint asks to call {import_path!r}, and torchport calls only its own functions "
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


def _check_facts(path: Path, config: dict[str, Any], metrics: dict[str, Any], record: dict[str, Any]) -> None:
    """What the provenance copies must be JSON, and the metrics numbers."""
    for name, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise CheckpointError(f"{path}: the metric {name!r} is {value!r}, not a number; train again")
    try:
        json.dumps([config, metrics, record], allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} holds facts that JSON cannot carry ({error}); train again") from error


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
    except Exception as error:  # importing runs the user's code
        raise CheckpointError(
            f"{path} cannot be imported ({error}); install its package or run from the folder that holds it"
        ) from error
    if not callable(found):
        raise CheckpointError(f"{path} is not a function or class")
    return found  # type: ignore[no-any-return]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than weights and plain values, or is no checkpoint at all; "
            "torchport never unpickles objects: save the model's state_dict"
        ) from error
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{path} is truncated or corrupt; train again or fetch a clean copy") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a checkpoint or a state_dict")
    return dict(content)


def _read_signature(path: Path) -> object:
    """A signature document from YAML; JSON is YAML too."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"the signature {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}" if where else ""
        raise CheckpointError(f"the signature {path} is not valid YAML{line}") from error


def _build_module(factory: str, config: dict[str, Any], state: dict[str, Any], path: Path) -> torch.nn.Module:
    build = import_object(factory)
    try:
        module = build(**config)
    except Exception as error:  # the factory is the user's code
        raise CheckpointError(f"{factory} fails on the configuration {config}: {error}") from error
    if not isinstance(module, torch.nn.Module):
        raise CheckpointError(f"{factory} gives a {type(module).__name__}, not a torch.nn.Module")
    try:
        missing, unexpected = module.load_state_dict(state, strict=False)
    except RuntimeError as error:  # shapes that differ
        detail = str(error).strip().splitlines()[-1].strip()
        raise CheckpointError(f"the weights in {path} do not fit {factory}: {detail}") from error
    if missing or unexpected:
        faults = [f"{name} is missing" for name in missing] + [f"{name} is unknown" for name in unexpected]
        more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise CheckpointError(f"the weights in {path} do not fit {factory}: {', '.join(faults[:3])}{more}")
    return module.float().eval()
