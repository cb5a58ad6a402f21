"""Reading of checkpoints: the weights, and the module that they belong to.

A checkpoint is data: what it asks to call must be torchport's own.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from export.errors import CheckpointError
from export.weights import load_weights, read_weights
from export.yaml_file import read_settings
from handlers.document import shown
from handlers.errors import SignatureError
from handlers.signature import Signature

CHECKPOINT_FORMAT = "torchport-checkpoint"
CHECKPOINT_VERSION = 1
CHECKPOINT_FILE = "checkpoint.pt"

# A checkpoint is data, and ``subprocess:run`` is an import path too: it may name torchport's own functions only.
# Any other factory or data set has to be named by the user, who knows whose code it is.
_OWN_FUNCTIONS = (
    "models.convnet:build_conv_classifier",
    "models.text_encoder:build_text_classifier",
    "models.digits:evaluation_samples",
    "models.image_folder:evaluation_samples",
    "models.text:evaluation_samples",
    "models.tickets:evaluation_samples",
)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint with its module built and its weights loaded.

    Attributes:
        sha256: Digest of the file.
        module: The reference model, in eval mode, on the CPU, in float32; what is float64 in it stays so.
        signature: What the model takes and gives; no artifact yet.
        factory: Import path ``package.module:function`` that built the module.
        config: Keyword arguments of the factory.
        metrics: What training measured on the held-out split; empty when unknown.
        evaluation: Import path and options of the held-out samples; None when unknown.
        record: Facts for the provenance: recipe, versions, git revision, epoch.
        files: What the archive must hold for the signature's preprocessing, by file name: ``tokenizer.json``.
    """

    sha256: str
    module: torch.nn.Module
    signature: Signature
    factory: str
    config: dict[str, Any]
    metrics: dict[str, Any]
    evaluation: dict[str, Any] | None
    record: dict[str, Any]
    files: dict[str, bytes] = field(default_factory=dict)


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


def load_checkpoint(
    source: Path,
    *,
    factory: str | None = None,
    signature_file: Path | None = None,
    config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Read a checkpoint and build its module.

    Args:
        source: A run folder, a torchport checkpoint, or a plain ``state_dict`` in a file of ``torch.save`` or
            ``.safetensors``.
        factory: Import path of the function that builds the module; needed for a plain ``state_dict``.
        signature_file: YAML or JSON signature; needed for a plain ``state_dict``. The tokenizer that it names lies
            beside it.
        config: Keyword arguments of the factory, plain JSON values. None: those of the checkpoint, if any.

    Raises:
        CheckpointError: If anything about it cannot be used.
    """
    path = resolve_checkpoint(source)
    content, digest = read_weights(path)
    content = _whole(content, path, is_described=factory is not None and signature_file is not None)
    if signature_file is not None:
        content["signature"] = read_settings(signature_file, "the signature", CheckpointError)
    model = _mapping(content, "model", path)
    state = _mapping(content, "state_dict", path)
    arguments = _mapping(model, "config", path, optional=True) if config is None else dict(config)
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
    _check_facts(path, arguments, metrics, record)
    return Checkpoint(
        sha256=digest,
        module=_build_module(factory, arguments, state, path),
        signature=signature,
        factory=factory,
        config=arguments,
        metrics=metrics,
        evaluation=_mapping(content, "evaluation", path, optional=True) or None,
        record=record,
        files=_files(signature, _mapping(content, "files", path, optional=True), path, signature_file),
    )


def _whole(content: dict[str, Any], path: Path, *, is_described: bool) -> dict[str, Any]:
    """A torchport checkpoint of a version that is known here; a plain ``state_dict`` becomes part of one."""
    if content.get("format") != CHECKPOINT_FORMAT:
        if not is_described:
            raise CheckpointError(
                f"{path} is not a torchport checkpoint; for a plain state_dict give --model package.module:factory "
                "and --signature FILE"
            )
        return {"state_dict": content, "model": {}}
    version = content.get("format_version")
    if not _is_known_version(version):
        raise CheckpointError(
            f"{path} is a checkpoint of version {shown(version)}, and this torchport reads version "
            f"{CHECKPOINT_VERSION}; export with the torchport that trained it, or train again"
        )
    return content


def _files(signature: Signature, held: Mapping[str, Any], path: Path, signature_file: Path | None) -> dict[str, bytes]:
    """The tokenizer that a signature names, from the checkpoint or from beside the signature; nothing else travels."""
    if signature.text is None:
        return {}
    name = signature.text.tokenizer
    if name in held:
        if not isinstance(held[name], str):
            raise CheckpointError(f"{path}: the file {name!r} is not text; train again")
        return {name: held[name].encode()}
    if signature_file is None:
        raise CheckpointError(
            f"{path} holds no {name!r}, which its signature names as the tokenizer; train again, or give --signature "
            "with a file that lies beside the tokenizer"
        )
    beside = signature_file.parent / name
    try:
        return {name: beside.read_bytes()}
    except OSError as error:
        raise CheckpointError(
            f"the tokenizer {beside} cannot be read ({error.strerror}); the signature {signature_file.name} names it, "
            "so put it beside that file"
        ) from error


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


def _reason(error: BaseException) -> str:
    """The first line of an error of somebody else's code: messages here are one sentence."""
    if isinstance(error, SystemExit):
        return f"it ends Python with sys.exit({shown(error.code)})"
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
        load_weights(module, state)
    except CheckpointError as error:
        raise CheckpointError(f"the weights in {path} do not fit {factory}: {error}") from error
    _check_held(module, state, factory, path)
    _widen(module)
    return module.eval()


def _check_held(module: torch.nn.Module, state: Mapping[str, Any], factory: str, path: Path) -> None:
    """Refuse float64 weights that lost digits when they were copied into a module of fewer."""
    held = module.state_dict()
    for name, given in state.items():
        kept = held.get(name)
        if not isinstance(given, torch.Tensor) or given.dtype != torch.float64 or not isinstance(kept, torch.Tensor):
            continue
        if not torch.allclose(kept.double(), given, rtol=0, atol=0, equal_nan=True):
            kind = str(kept.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"the weights in {path} do not fit {factory}: {shown(name)} is float64, and {kind}, in which the "
                "module holds it, has too few digits for it; build the module with .double(), or convert the weights "
                "with .float() first and check that the model is as good"
            )


def _widen(module: torch.nn.Module) -> None:
    """To float32, in place, what has fewer digits than that; float64 stays what it is."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            tensor.data = tensor.data.float()
