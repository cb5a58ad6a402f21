"""What a client sent for one tensor, as an array of its dtype and shape, with every check that this needs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from handlers.errors import MalformedError, OutOfRangeError
from handlers.nested import flatten
from handlers.tensors import Array, Axis, TensorSpec
from handlers.words import shown_shape

# Integers up to here are exact in float64.
_EXACT = 1 << 53


class TensorReader:
    """Reads one tensor of a signature, from nested lists or from raw bytes.

    What requests have in common is worked out once, here: a usual request takes no longer than its JSON.

    Args:
        spec: Dtype, shape and range of the tensor.
        axes: Bounds of the dynamic axes.

    Attributes:
        spec: The same.
        shape_text: Its shape without the batch, for messages: ``[length, 2]``.
    """

    def __init__(self, spec: TensorSpec, axes: Mapping[str, Axis]) -> None:
        self.spec = spec
        self.shape_text = f"[{', '.join(str(axis) for axis in spec.shape[1:])}]"
        self._axes = axes
        self._sizes = [
            (axes[axis].minimum, axes[axis].maximum) if isinstance(axis, str) else (axis, axis)
            for axis in spec.shape[1:]
        ]
        self._dtype = spec.numpy_dtype
        self._item_type = bool if spec.dtype == "bool" else int if self._dtype.kind == "i" else float
        self._item_types = {bool} if self._item_type is bool else {int, float}
        self._lowest, self._highest = _bounds(spec)

    @property
    def _the(self) -> str:
        return f"The tensor {self.spec.name!r}"

    def from_json(self, value: object) -> Array:
        """Turn nested lists into one sample's tensor, without a batch axis.

        Raises:
            RequestError: If the lists are ragged, hold something else than such numbers, or are outside the
                specification. The sentence names the tensor.
        """
        items, shape, types = flatten(value)
        if list in types:
            raise MalformedError("ragged_array", f"{self._the} must be rectangular, of shape {self.shape_text}.")
        self._check_types(types)
        self.check_shape(shape)
        return self._array(items, types).reshape(shape)

    def from_items(self, items: list[Any], types: set[type], shape: tuple[int, ...]) -> Array:
        """Turn a flat list into the tensor of several samples.

        Args:
            items: What JSON parsing gave, as many as ``shape`` needs.
            types: The types among them.
            shape: Sizes of the axes, the batch first; those after it are checked already.

        Raises:
            RequestError: As :meth:`from_json` does.
        """
        self._check_types(types)
        return self._array(items, types).reshape(shape)

    def from_bytes(self, data: bytes, shape: tuple[int, ...]) -> Array:
        """Turn raw little-endian bytes into the tensor of several samples.

        Args:
            data: The numbers, row by row.
            shape: Sizes of the axes, the batch first; those after it are checked already.

        Raises:
            RequestError: If their number is another, or a value is outside of the specification.
        """
        needed = math.prod(shape) * self._dtype.itemsize
        if len(data) != needed:
            raise OutOfRangeError(
                "wrong_size",
                f"{self._the} has {len(data)} bytes; "
                f"the shape {shown_shape(shape)} of {self.spec.dtype} needs {needed}.",
            )
        return self.from_array(np.frombuffer(data, self._dtype.newbyteorder("<")).reshape(shape))

    def from_array(self, array: Array) -> Array:
        """Check the values of an array of any byte order, and give it the tensor's dtype.

        Args:
            array: ``[batch, ...]``, its shape checked already.

        Raises:
            RequestError: If its dtype is of another kind, or a value is outside of the specification.
        """
        kinds = {bool: "b", int: "iu", float: "f"}[self._item_type]
        if array.dtype.kind not in kinds or array.dtype.itemsize > 8:
            raise OutOfRangeError(
                "wrong_datatype",
                f"{self._the} is of dtype {ascii(array.dtype.name)[1:-1][:40]}; send {self.spec.dtype}.",
            )
        if self._item_type is bool:
            if array.view(np.uint8).max() > 1:
                raise MalformedError("not_booleans", f"{self._the} must hold only the bytes 0 and 1.")
            return array.astype(np.bool_)
        lowest, highest = array.min(), array.max()
        if self._item_type is float:
            self._check_finite(float(lowest), float(highest))
            # Bounds as this dtype has them: 0.1 as a float32 is a little more than 0.1.
            with np.errstate(over="ignore"):
                low, high = array.dtype.type(self._lowest), array.dtype.type(self._highest)
            inside = bool(lowest >= low and highest <= high)
        else:
            inside = int(lowest) >= self._lowest and int(highest) <= self._highest
        if not inside:
            raise self._out_of_range()
        result: Array = array.astype(self._dtype)
        return result

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse a shape, without the batch, that is not the tensor's.

        Raises:
            OutOfRangeError: If it has another number of axes, or a size is out of bounds.
        """
        if len(shape) == len(self._sizes):
            for size, (smallest, largest) in zip(shape, self._sizes, strict=True):
                if not smallest <= size <= largest:
                    break
            else:
                return
        self._refuse_shape(shape)

    def _refuse_shape(self, shape: tuple[int, ...]) -> None:
        expected = self.spec.shape[1:]
        fits = len(shape) == len(expected) and all(
            isinstance(axis, str) or size == axis for size, axis in zip(shape, expected, strict=True)
        )
        if not fits:
            raise OutOfRangeError(
                "wrong_shape",
                f"{self._the} has the shape {shown_shape(shape)}; one sample must be {self.shape_text}.",
            )
        for size, name in zip(shape, expected, strict=True):
            if isinstance(name, str) and not self._axes[name].minimum <= size <= self._axes[name].maximum:
                raise OutOfRangeError(
                    "wrong_size",
                    f"{self._the} has the size {size} along {name}; "
                    f"it must lie between {self._axes[name].minimum} and {self._axes[name].maximum}.",
                )

    def _check_types(self, types: set[type]) -> None:
        if not types <= self._item_types:
            boolean = self._item_type is bool
            code, what = ("not_booleans", "true and false") if boolean else ("not_numbers", "numbers")
            lists = f"in nested lists of shape {self.shape_text}"
            raise MalformedError(code, f"{self._the} must hold only {what}, {lists}.")

    def _array(self, items: list[Any], types: set[type]) -> Array:
        """A flat list of at least one item, each of a type that was checked."""
        if self._item_type is bool:
            return np.array(items, np.bool_)
        if self._item_type is int:
            return self._integers(items, types)
        return self._floats(items, types)

    def _floats(self, items: list[Any], types: set[type]) -> Array:
        """By way of float64, in which the bounds are compared."""
        try:
            values = np.array(items, np.float64)
        except OverflowError as error:  # an integer that no float holds
            raise self._out_of_range() from error
        lowest, highest = float(values.min()), float(values.max())  # NaN if there is one
        self._check_finite(lowest, highest)
        if lowest < self._lowest or highest > self._highest:
            raise self._out_of_range()
        if int in types and (highest >= _EXACT or lowest <= -_EXACT):  # 2^53 + 1 has become 2^53
            inexact = next((item for item in items if type(item) is int and int(float(item)) != item), None)
            if inexact is not None:
                raise OutOfRangeError(
                    "not_exact",
                    f"{self._the} holds a whole number beyond 2^53 that no float can hold; send it rounded.",
                )
        return values.astype(self._dtype, copy=False)

    def _integers(self, items: list[Any], types: set[type]) -> Array:
        if float in types:
            # Not by way of a float array, in which large integers lose their last digits.
            if not all(type(item) is int or item.is_integer() for item in items):
                raise OutOfRangeError("not_integers", f"{self._the} must hold whole numbers only.")
            items = [int(item) for item in items]
        if min(items) < self._lowest or max(items) > self._highest:
            raise self._out_of_range()
        return np.array(items, self._dtype)

    def _check_finite(self, lowest: float, highest: float) -> None:
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise OutOfRangeError("not_finite", f"{self._the} holds NaN or infinite values; send finite numbers.")

    def _out_of_range(self) -> OutOfRangeError:
        spec = self.spec
        bounds = (spec.minimum, spec.maximum)
        if None in bounds:
            limits = {0: "at least", 1: "at most"}
            said = [f"{limits[i]} {bound:g}" for i, bound in enumerate(bounds) if bound is not None]
            must = f"be {said[0]} and fit {spec.dtype}" if said else f"fit {spec.dtype}"
        else:
            must = f"lie between {spec.minimum:g} and {spec.maximum:g}"
        return OutOfRangeError("out_of_range", f"Values of {spec.name!r} must {must}.")


def check_axes(tensors: Mapping[str, Array], specs: Sequence[TensorSpec], *, batched: bool) -> None:
    """Refuse an axis that has two sizes.

    Args:
        tensors: The inputs of one sample, or of several.
        specs: The inputs of the model.
        batched: Whether the batch is their first axis.

    Raises:
        OutOfRangeError: With the names of both.
    """
    sizes: dict[str, tuple[int, str]] = {}
    for spec in specs:
        for axis, name in spec.dynamic_axes.items():
            size = tensors[spec.name].shape[axis if batched else axis - 1]
            first, where = sizes.setdefault(name, (size, spec.name))
            if first != size:
                raise OutOfRangeError(
                    "wrong_size",
                    f"The axis {name} has the size {first} in {where!r} and {size} in {spec.name!r}; "
                    "it must be the same.",
                )


def _bounds(spec: TensorSpec) -> tuple[float, float]:
    """The least and the greatest value; whole numbers for whole numbers, which floats would round."""
    if spec.dtype in ("float32", "float64"):
        largest = float(np.finfo(spec.dtype).max)
        return (
            -largest if spec.minimum is None else spec.minimum,
            largest if spec.maximum is None else spec.maximum,
        )
    limits = np.iinfo(np.int32 if spec.dtype == "int32" else np.int64)
    return (
        int(limits.min) if spec.minimum is None else int(spec.minimum),
        int(limits.max) if spec.maximum is None else int(spec.maximum),
    )
