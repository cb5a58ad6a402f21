"""Checks of tensors and of arguments, with messages that say what to do."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import DeviceMismatchError, ModelConfigError, NonFiniteError, ShapeError


def require_shape(tensor: Tensor, expected: Sequence[int | str | None], *, name: str) -> None:
    """Checks the number of axes and their sizes.

    Args:
        tensor: any tensor.
        expected: for each axis its size, or a name such as "batch" for any size, or None for the same without a
            name; axes with the same name have the same size.
        name: what messages call the tensor.

    Raises:
        ShapeError: naming both shapes and the first axis that differs.
    """
    actual = list(tensor.shape)
    sizes: dict[str, int] = {}
    remedy = ""
    if len(actual) == len(expected) - 1 and expected[0] == "batch":
        remedy = f"add the batch axis with {name}.unsqueeze(0)"
    elif len(actual) != len(expected):
        remedy = f"give it {len(expected)} axes instead of {len(actual)}"
    else:
        for axis, (size, wanted) in enumerate(zip(actual, expected, strict=True)):
            if isinstance(wanted, str):
                wanted = sizes.setdefault(wanted, size)  # noqa: PLW2901
            if wanted is not None and size != wanted:
                remedy = f"make axis {axis} {wanted} long instead of {size}"
                break
    if remedy:
        axes = ", ".join("any" if axis is None else str(axis) for axis in expected)
        raise ShapeError(f"{name} has shape {actual} where [{axes}] is expected; {remedy}.")


def require_same_device(model: nn.Module, **tensors: Tensor | None) -> None:
    """Checks that the tensors are where the model's weights are, and those all in one place.

    Args:
        model: one without weights and buffers fits any device.
        **tensors: by the names that messages call them; None is skipped.

    Raises:
        DeviceMismatchError: naming the first tensor elsewhere, and both devices.
    """
    device: torch.device | None = None
    weights = [*model.parameters(), *model.buffers()]
    for weight in weights:
        device = device or weight.device
        if weight.device != device:
            raise DeviceMismatchError(
                f"{type(model).__name__} is partly on {device} and partly on {weight.device}; "
                f'move all of it with model.to("{device}").'
            )
    for name, tensor in tensors.items():
        if tensor is not None and device is not None and tensor.device != device:
            raise DeviceMismatchError(
                f"{name} is on {tensor.device} and {type(model).__name__} on {device}; "
                f'move it with {name}.to("{device}").'
            )


def require_finite(name: str, tensor: Tensor) -> Tensor:
    """Checks that a tensor holds neither NaN nor infinity; on a GPU this waits for all that was queued before.

    Args:
        name: what messages call the tensor.
        tensor: any tensor.

    Returns:
        The same tensor, so that it can be checked where it is used.

    Raises:
        NonFiniteError: with the number of bad values and the place of the first.
    """
    finite = tensor.isfinite()
    if bool(finite.all()):
        return tensor
    nans = int(tensor.isnan().sum())
    infinities = int((~finite).sum()) - nans
    first = tuple((~finite).nonzero()[0].tolist())
    place = f", the first at {list(first)}" if first else ""
    raise NonFiniteError(
        f"{name} holds {nans} NaN and {infinities} infinite among {tensor.numel()} values{place}; "
        "check what it was computed from."
    )


def require_arguments(owner: str, config_type: type[Any], config: Mapping[str, object]) -> None:
    """Checks the names of a factory's keyword arguments.

    Args:
        owner: what messages call the thing built, "ConvClassifier".
        config_type: a dataclass; its fields are the arguments, those without default the necessary ones.
        config: the arguments.

    Raises:
        ModelConfigError: naming the unknown or missing arguments.
    """
    names = [field.name for field in fields(config_type)]
    for name in config:
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it takes {', '.join(names)}."
            raise ModelConfigError(f"A {owner} takes no argument {name!r}; {hint}")
    required = [field.name for field in fields(config_type) if field.default is MISSING]
    missing = [name for name in required if name not in config]
    if missing:
        raise ModelConfigError(f"A {owner} needs {' and '.join(missing)}; add it to the model's config.")


def require_integer(name: str, value: object, *, minimum: int) -> None:
    """Checks a count.

    Raises:
        ModelConfigError: naming the argument, its value and the minimum.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ModelConfigError(f"{name} is {value!r}; it must be an integer of at least {minimum}.")


def require_dropout(value: object, *, name: str = "dropout") -> None:
    """Checks a probability of dropout.

    Raises:
        ModelConfigError: naming the argument, its value and the range.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0.0 <= value < 1.0:
        raise ModelConfigError(f"{name} is {value!r}; it must be at least 0 and below 1.")
