"""Nested lists of JSON as one array of a tensor's dtype and shape, with every check that this needs."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from handlers.errors import MalformedError, OutOfRangeError
from handlers.tensors import Array, Axis, TensorSpec


def tensor_from_json(value: object, spec: TensorSpec, axes: Mapping[str, Axis]) -> Array:
    """Turn nested lists into one sample's tensor.

    Args:
        value: What JSON parsing gave.
        spec: Dtype, shape and range of the tensor. The batch axis is not in ``value``.
        axes: Bounds of the dynamic axes.

    Raises:
        RequestError: If the lists are ragged, hold something else than such numbers, or are outside the
            specification. The sentence names the tensor.
    """
    # As objects first: NumPy would make numbers of booleans, and pad every string to the longest one, which lets a
    # request of a few megabytes ask for terabytes.
    array = np.asarray(value, dtype=object)
    types = set(map(type, array.ravel()))
    if list in types:
        raise MalformedError("ragged_array", f"{_the(spec)} must be rectangular, of shape {_shape_text(spec)}.")
    _check_types(types, spec)
    _check_shape(array.shape, spec, axes)
    if spec.dtype == "bool":
        values = array.astype(np.bool_)
    elif spec.dtype in ("float32", "float64"):
        values = _floats(array, spec)
    else:
        values = _integers(array, types, spec)
    _check_range(values, spec)
    result: Array = values.astype(spec.numpy_dtype)
    return result


def _check_types(types: set[type], spec: TensorSpec) -> None:
    allowed, what = ({bool}, "true and false") if spec.dtype == "bool" else ({int, float}, "numbers")
    if not types <= allowed:
        code = "not_booleans" if spec.dtype == "bool" else "not_numbers"
        raise MalformedError(code, f"{_the(spec)} must hold only {what}, in nested lists of shape {_shape_text(spec)}.")


def _check_shape(shape: tuple[int, ...], spec: TensorSpec, axes: Mapping[str, Axis]) -> None:
    expected = spec.shape[1:]
    fits = len(shape) == len(expected) and all(
        isinstance(axis, str) or size == axis for size, axis in zip(shape, expected, strict=True)
    )
    if not fits:
        raise OutOfRangeError(
            "wrong_shape", f"{_the(spec)} has the shape {list(shape)[:32]}; one sample must be {_shape_text(spec)}."
        )
    for size, name in zip(shape, expected, strict=True):
        if isinstance(name, str) and not axes[name].minimum <= size <= axes[name].maximum:
            raise OutOfRangeError(
                "wrong_size",
                f"{_the(spec)} has the size {size} along {name}; "
                f"it must lie between {axes[name].minimum} and {axes[name].maximum}.",
            )


def _floats(array: Array, spec: TensorSpec) -> Array:
    """As float64, in which the bounds are compared."""
    try:
        values = array.astype(np.float64)
    except OverflowError as error:  # an integer that no float holds
        raise _out_of_range(spec) from error
    if not np.isfinite(values).all():
        raise OutOfRangeError("not_finite", f"{_the(spec)} holds NaN or infinite values; send finite numbers.")
    if np.abs(values).max() > np.finfo(spec.dtype).max:
        raise _out_of_range(spec)
    return values


def _integers(array: Array, types: set[type], spec: TensorSpec) -> Array:
    """As int64; floats only if they are whole numbers."""
    if float in types and not all(type(item) is int or item.is_integer() for item in array.ravel()):
        raise OutOfRangeError("not_integers", f"{_the(spec)} must hold whole numbers only.")
    try:
        return array.astype(np.int64)
    except OverflowError as error:
        raise _out_of_range(spec) from error


def _check_range(values: Array, spec: TensorSpec) -> None:
    # The bounds of whole numbers are whole: as floats, int64 would be rounded before it is compared.
    whole = values.dtype.kind != "f"
    lowest = None if spec.minimum is None else int(spec.minimum) if whole else spec.minimum
    highest = None if spec.maximum is None else int(spec.maximum) if whole else spec.maximum
    if (lowest is not None and values.min() < lowest) or (highest is not None and values.max() > highest):
        raise _out_of_range(spec)


def _out_of_range(spec: TensorSpec) -> OutOfRangeError:
    bounds = (spec.minimum, spec.maximum)
    if None in bounds:
        limits = {0: "at least", 1: "at most"}
        said = [f"{limits[i]} {bound:g}" for i, bound in enumerate(bounds) if bound is not None]
        must = f"be {said[0]} and fit {spec.dtype}" if said else f"fit {spec.dtype}"
    else:
        must = f"lie between {spec.minimum:g} and {spec.maximum:g}"
    return OutOfRangeError("out_of_range", f"Values of {spec.name!r} must {must}.")


def _the(spec: TensorSpec) -> str:
    return f"The tensor {spec.name!r}"


def _shape_text(spec: TensorSpec) -> str:
    return f"[{', '.join(str(axis) for axis in spec.shape[1:])}]"
