"""Checkpoints: a model's weights, and all that is known about them, in one file."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import CheckpointFormatError, CheckpointMismatchError
from models.factories import ModelFactory, find_factory
from models.tensor_file import read_tensor_file, write_tensor_file

FORMAT = "torchport-checkpoint"
FORMAT_VERSION = 1

_KEYS_SHOWN = 3


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Checkpoint:
    """What a checkpoint file holds, key by key.

    No time and no path in it, but for the training state of last.pt: the same recipe gives the same bytes.
    """

    model: dict[str, Any]
    """"factory", an import path, and "config", its keyword arguments."""

    state_dict: dict[str, Tensor]
    """The weights."""

    signature: dict[str, Any]
    """What the model takes and returns; see `models.signature`."""

    evaluation: dict[str, Any]
    """"source" and "options": where the samples behind `metrics` come from."""

    files: dict[str, str]
    """What the model cannot do without, by file name, such as its tokenizer.json; text."""

    metrics: dict[str, Any]
    """"accuracy", "loss", "macro_f1", "weighted_f1" and "samples", of these weights."""

    epoch: int
    """Epochs these weights have been trained for."""

    recipe: dict[str, Any]
    """The resolved recipe."""

    versions: dict[str, str]
    """Of Python, torch and torchport."""

    git_revision: str | None
    """Of torchport's source, "-dirty" when modified; None outside a repository."""

    training: dict[str, Any] | None = None
    """What `--resume` continues from; only in last.pt."""


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Writes a checkpoint, replacing the one at `path` in one step.

    Raises:
        CheckpointWriteError: when the file system refuses; the old file is untouched.
    """
    content: dict[str, Any] = {"format": FORMAT, "format_version": FORMAT_VERSION}
    for field in fields(checkpoint):
        content[field.name] = getattr(checkpoint, field.name)
    if checkpoint.training is None:
        del content["training"]
    write_tensor_file(content, path)


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint, its tensors to the CPU.

    Raises:
        CheckpointNotFoundError: when there is no such file.
        CheckpointCorruptError: when it is truncated or damaged.
        CheckpointFormatError: when it is something other than a torchport checkpoint.
    """
    return _parse(read_tensor_file(path), path)


def save_model_only(model: nn.Module, path: Path) -> None:
    """Writes a model's weights and nothing else.

    Raises:
        CheckpointWriteError: when the file system refuses; the old file is untouched.
    """
    write_tensor_file(model.state_dict(), path)


def load_model_for_inference(
    path: Path,
    *,
    factory: ModelFactory | None = None,
    config: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
) -> nn.Module:
    """Builds a model, loads its weights and sets it to evaluation mode.

    Args:
        path: a checkpoint, or the file of `save_model_only`.
        factory: builds the model; by default the one that the checkpoint names.
        config: the factory's keyword arguments; by default the checkpoint's.
        device: where the model goes.

    Raises:
        CheckpointNotFoundError: when there is no such file.
        CheckpointCorruptError: when it is truncated or damaged.
        CheckpointFormatError: when it does not say what model to build, and neither do the arguments.
        CheckpointMismatchError: when the weights do not fit the model.
    """
    content = read_tensor_file(path)
    if _is_weights_only(content):
        if factory is None:
            raise CheckpointFormatError(f"{path} holds weights only; pass the factory that builds their model.")
        state_dict = content
    else:
        checkpoint = _parse(content, path)
        factory = factory or find_factory(checkpoint.model["factory"])
        config = checkpoint.model["config"] if config is None else config
        state_dict = checkpoint.state_dict
    model = factory(**(config or {}))
    load_weights(model, state_dict, path)
    return model.to(device).eval()


def load_weights(model: nn.Module, state_dict: Mapping[str, Tensor], path: Path) -> None:
    """Loads weights into a model; every key and shape must match.

    Args:
        model: takes the weights.
        state_dict: the weights.
        path: where they come from, for messages.

    Raises:
        CheckpointMismatchError: naming the missing, unknown or misshapen keys; the model is untouched.
    """
    expected = model.state_dict()
    missing = [key for key in expected if key not in state_dict]
    unknown = [key for key in state_dict if key not in expected]
    misshapen = [
        f"{key} ({list(state_dict[key].shape)} instead of {list(tensor.shape)})"
        for key, tensor in expected.items()
        if key in state_dict and state_dict[key].shape != tensor.shape
    ]
    problems = [
        f"{label} {_first(keys)}"
        for label, keys in (("missing", missing), ("unknown", unknown), ("wrong shape:", misshapen))
        if keys
    ]
    if problems:
        raise CheckpointMismatchError(
            f"The weights in {path} do not fit {type(model).__name__}: {'; '.join(problems)}; "
            "load them with the model class and config they were trained with."
        )
    model.load_state_dict(state_dict)


def _parse(content: Any, path: Path) -> Checkpoint:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointFormatError(
            f"{path} is a PyTorch file but not a torchport checkpoint; give a checkpoint.pt that torchport train wrote."
        )
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointFormatError(
            f"{path} has checkpoint format {version}, and this torchport reads {FORMAT_VERSION}; "
            "use the torchport version that wrote it."
        )
    names = [field.name for field in fields(Checkpoint)]
    missing = [name for name in names if name not in content and name != "training"]
    if missing:
        raise CheckpointFormatError(f"The checkpoint {path} has no {_first(missing)}; train again.")
    values: dict[str, Any] = {name: content.get(name) for name in names}
    return Checkpoint(**values)


def _is_weights_only(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def _first(keys: list[str]) -> str:
    more = len(keys) - _KEYS_SHOWN
    return ", ".join(keys[:_KEYS_SHOWN]) + (f" and {more} more" if more > 0 else "")
