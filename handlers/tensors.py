"""Tensors as a signature describes them: names, dtypes, shapes with named dynamic axes, value ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handlers.document import Section, is_word, shown
from handlers.errors import SignatureError

Array = NDArray[Any]
TensorBatch = Mapping[str, Array]
"""Arrays by tensor name. A batch's begin with the batch axis; a sample's do not have it."""

BATCH_AXIS = "batch"
DTYPES = ("float32", "float64", "int64", "int32", "bool")

_MAX_DIMENSION = 1 << 20
# Integers up to here are exact in float64, in which bounds are read and compared.
_MAX_INTEGER = float(1 << 53)


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """Bounds of a dynamic axis, both included.

    Attributes:
        minimum: Smallest size.
        maximum: Largest size; longer requests are refused.
    """

    minimum: int
    maximum: int

    @classmethod
    def from_section(cls, section: Section, name: str) -> Axis:
        """Read one entry of ``axes``."""
        axis = cls(
            minimum=section.integer("minimum", minimum=1, maximum=_MAX_DIMENSION) if section.has("minimum") else 1,
            maximum=section.integer("maximum", minimum=1, maximum=_MAX_DIMENSION),
        )
        section.finish()
        if axis.minimum > axis.maximum:
            raise SignatureError(
                f"axes.{name} runs from {axis.minimum} to {axis.maximum}; its minimum must not exceed its maximum"
            )
        return axis

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return {"minimum": self.minimum, "maximum": self.maximum}


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """A tensor that goes into or comes out of the model.

    Attributes:
        name: Name of the graph's input or output.
        dtype: One of ``DTYPES``.
        shape: Sizes of the axes; a string names a dynamic axis. The first axis is always ``batch``.
        minimum: Least value that a request may hold; None for no bound.
        maximum: Greatest value that a request may hold; None for no bound.
        padding: Value that fills up the dynamic axes of shorter samples in a batch. None: samples of different
            sizes never share a batch.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    minimum: float | None = None
    maximum: float | None = None
    padding: float | None = None

    @classmethod
    def from_section(cls, section: Section) -> TensorSpec:
        """Read one entry of ``inputs`` or ``outputs``."""
        name = section.string("name")
        if not is_word(name):
            raise SignatureError(
                f"the tensor name {shown(name)} must be a word of at most 80 letters, digits and underscores"
            )
        dtype = section.string("dtype", choices=DTYPES)
        axes = section.sequence("shape")
        bounds = {key: section.number(key) for key in ("minimum", "maximum", "padding") if section.has(key)}
        section.finish()
        shape: list[int | str] = []
        for axis in axes:
            fixed = isinstance(axis, int) and not isinstance(axis, bool) and 1 <= axis <= _MAX_DIMENSION
            if not fixed and not (isinstance(axis, str) and is_word(axis)):
                raise SignatureError(
                    f"the shape of {shown(name)} has the axis {shown(axis)}; "
                    "give a size of at least 1 or the name of a dynamic axis"
                )
            shape.append(axis)  # type: ignore[arg-type]  # narrowed by the two checks above
        if not shape or shape[0] != BATCH_AXIS:
            raise SignatureError(
                f"the shape of {shown(name)} must begin with the axis {BATCH_AXIS!r}, not {shown(shape)}"
            )
        if BATCH_AXIS in shape[1:]:
            raise SignatureError(
                f"the shape of {shown(name)} has the axis {BATCH_AXIS!r} twice; it must come first only"
            )
        spec = cls(name=name, dtype=dtype, shape=tuple(shape), **bounds)
        for key, value in bounds.items():
            spec._check_value(key, value)
        if spec.minimum is not None and spec.maximum is not None and spec.minimum > spec.maximum:
            raise SignatureError(
                f"{name} runs from {spec.minimum:g} to {spec.maximum:g}; its minimum must not exceed its maximum"
            )
        return spec

    def _check_value(self, key: str, value: float) -> None:
        """Refuse a bound or padding that the dtype cannot hold."""
        if self.dtype in ("float32", "float64"):
            limit = float(np.finfo(self.dtype).max)
            fits = abs(value) <= limit
        else:
            limit = {"int64": _MAX_INTEGER, "int32": float(np.iinfo(np.int32).max), "bool": 1.0}[self.dtype]
            fits = value.is_integer() and -limit * (self.dtype != "bool") <= value <= limit
        if not fits:
            raise SignatureError(f"the {key} of {self.name!r} is {value:g}, which {self.dtype} cannot hold")

    @property
    def dynamic_axes(self) -> dict[int, str]:
        """Names of the dynamic axes after the batch by their position in ``shape``."""
        return {i: axis for i, axis in enumerate(self.shape) if i and isinstance(axis, str)}

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype for NumPy."""
        return np.dtype(self.dtype)

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        document: dict[str, Any] = {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}
        for key in ("minimum", "maximum", "padding"):
            value = getattr(self, key)
            if value is not None:
                document[key] = int(value) if math.isfinite(value) and value.is_integer() else value
        return document
