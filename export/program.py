"""The exported program: a model as ``torch.export`` sees it, with the signature's dynamic axes.

ONNX and pt2 begin with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

from export.compiler import first_line
from export.errors import ConversionError
from export.torch_release import TORCH
from handlers.calling import NamedModule
from handlers.signature import Signature
from handlers.tensors import BATCH_AXIS

# Compilers treat sizes 0 and 1 apart, and say "at least 2" of an axis that was never asked about 1.
_LEAST_PROVEN = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """A model as one graph.

    Attributes:
        exported: What ``torch.export`` gave.
        axes: Names of the dynamic axes, by the symbol that stands for their size in the graph.
    """

    exported: ExportedProgram
    axes: dict[str, str]


def export_program(module: NamedModule, signature: Signature, example: Sequence[torch.Tensor]) -> Program:
    """Export a module with dynamic axes.

    Args:
        module: The module, in eval mode.
        signature: Names and bounds of the axes.
        example: Valid inputs in the signature's order; no dynamic axis has a size of one.

    Raises:
        ConversionError: If the model turns a dynamic axis into a constant, or ties two of them to each other.
    """
    try:
        exported = _export(module, example, _named(signature))
    except (torch._dynamo.exc.UserError, ConstraintViolationError, AssertionError, ValueError) as error:
        # What the model demands of an axis may be a demand only of the exporter: let it say which sizes it can do.
        try:
            exported = _export(module, example, _automatic(signature))
        except Exception:
            raise error from None
        return Program(exported=exported, axes=_symbols(exported, signature, first_line(error)))
    return Program(exported=exported, axes=_symbols(exported, signature, "the exporter took it for a constant"))


def _export(module: NamedModule, example: Sequence[torch.Tensor], shapes: Sequence[Any]) -> ExportedProgram:
    # One entry for the one parameter of NamedModule.forward: *tensors.
    exported = torch.export.export(module, tuple(example), dynamic_shapes=(tuple(shapes),), strict=False)
    # torch 2.9 does not find the inputs of such a parameter in what the program checks of them, and cannot make
    # a module of it again. The bounds of the axes are checked elsewhere.
    guards = getattr(exported, "_guards_code", None)
    if guards is not None and TORCH < (2, 11):
        guards.clear()
    return exported


def _named(signature: Signature) -> list[dict[int, Any]]:
    """Dims by name: one that several inputs share is the same everywhere."""
    dims: dict[str, Any] = {BATCH_AXIS: Dim(BATCH_AXIS, min=1)}
    for name, axis in signature.axes.items():
        # An axis of one possible size is none that moves.
        dims[name] = Dim(name, min=axis.minimum, max=axis.maximum) if axis.minimum < axis.maximum else None
    return [
        {i: dims[axis] for i, axis in enumerate(spec.shape) if isinstance(axis, str) and dims[axis] is not None}
        for spec in signature.inputs
    ]


def _automatic(signature: Signature) -> list[dict[int, Any]]:
    shapes: list[dict[int, Any]] = []
    for named in _named(signature):
        shape: dict[int, Any] = {}
        for i, dim in named.items():
            bounds = signature.axes.get(dim.__name__)
            shape[i] = Dim.AUTO(min=bounds.minimum, max=bounds.maximum) if bounds else Dim.AUTO(min=1)
        shapes.append(shape)
    return shapes


def _symbols(exported: ExportedProgram, signature: Signature, reason: str) -> dict[str, str]:
    """The symbol of every dynamic axis; whether each may take every size that the signature allows."""
    inputs = exported.graph_signature.user_inputs
    values = {node.name: node.meta["val"] for node in exported.graph.nodes if node.op == "placeholder"}
    names: dict[str, str] = {}
    for spec, placeholder, dims in zip(signature.inputs, inputs, _named(signature), strict=True):
        shape = values[str(placeholder)].shape
        for i in dims:
            axis = str(spec.shape[i])
            where = f"the axis {axis!r} of {spec.name!r}"
            symbol: Any = shape[i].node.expr if isinstance(shape[i], torch.SymInt) else None
            if symbol is None or not symbol.is_symbol:
                is_constant = symbol is None or symbol.is_number
                size = f"a size of {shape[i]}" if is_constant else f"sizes of the form {symbol}"
                raise _refused(where, f"takes only {size}", reason)
            if names.setdefault(str(symbol), axis) != axis:
                raise ConversionError(
                    f"the model needs the axes {names[str(symbol)]!r} and {axis!r} to be equal; "
                    "give both the same name in the signature"
                )
            _check_range(exported, symbol, signature, axis, where, reason)
    _check_shared(names)
    return names


def _check_range(
    exported: ExportedProgram, symbol: Any, signature: Signature, axis: str, where: str, reason: str
) -> None:
    range = exported.range_constraints.get(symbol)
    if range is None or axis not in signature.axes:
        return
    bounds = signature.axes[axis]
    if range.lower > max(bounds.minimum, _LEAST_PROVEN) or range.upper < bounds.maximum:
        raise _refused(where, f"takes only sizes from {range.lower} to {range.upper}", reason)


def _check_shared(names: dict[str, str]) -> None:
    """Two symbols for one axis would let a caller give it two sizes."""
    for axis in set(names.values()):
        if list(names.values()).count(axis) > 1:
            raise ConversionError(
                f"the exporter does not see that the inputs share the axis {axis!r}; give each its own name in the "
                "signature, or use --format torchscript"
            )


def _refused(where: str, what: str, reason: str) -> ConversionError:
    return ConversionError(
        f"{where} cannot be dynamic, since the model {what} ({reason}); "
        "narrow its bounds or give its size as a number in the signature, or use --format torchscript or eager"
    )
