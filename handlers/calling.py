"""How any module is called: named tensors in, named tensors out, whatever its ``forward`` looks like."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from handlers.document import shown
from handlers.errors import BackendError


class NamedModule(nn.Module):
    """A module that takes its tensors in the signature's order and gives a tuple in the signature's order.

    The module within is called by keyword if every input's name is a parameter of its ``forward``, else by position.
    It may give one tensor, a tuple or list (taken by position), or a mapping, dataclass or named tuple (taken by
    name). ``torch.jit.trace``, ``torch.export`` and ``torch.onnx.export`` all accept this class.

    Args:
        module: The module to call.
        input_names: Names of the tensors that ``forward`` takes, in order.
        output_names: Names of the tensors that ``forward`` gives, in order.
        dtype: What floating inputs are cast to; floating outputs are then cast back to float32. None casts nothing.
            The module itself is not cast.
    """

    def __init__(
        self,
        module: nn.Module,
        input_names: Sequence[str],
        output_names: Sequence[str],
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.input_names = tuple(input_names)
        self.output_names = tuple(output_names)
        self.dtype = dtype
        self._by_keyword = set(self.input_names) <= _keywords(module)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the module.

        Args:
            tensors: The inputs, in the order of ``input_names``.

        Returns:
            The outputs, in the order of ``output_names``.

        Raises:
            BackendError: If the module gives something else than ``output_names``.
        """
        if len(tensors) != len(self.input_names):
            raise BackendError(f"the model takes {len(self.input_names)} tensors, not {len(tensors)}")
        if self.dtype is not None:
            tensors = tuple(tensor.to(self.dtype) if tensor.is_floating_point() else tensor for tensor in tensors)
        if self._by_keyword:
            result = self.module(**dict(zip(self.input_names, tensors, strict=True)))
        else:
            result = self.module(*tensors)
        outputs = self._picked(result)
        if self.dtype is not None:
            outputs = tuple(output.float() if output.is_floating_point() else output for output in outputs)
        return outputs

    def _picked(self, result: object) -> tuple[Tensor, ...]:
        """The outputs of the signature among what the module gave."""
        if isinstance(result, Tensor):
            result = (result,)
        named = self._named(result)
        if named is not None:
            absent = next((name for name in self.output_names if named.get(name) is None), None)
            if absent is not None:
                present = ", ".join(str(name) for name, value in named.items() if value is not None) or "none"
                raise BackendError(
                    f"the output {absent!r} is not among those of the model: {present}; "
                    "name one of these in the signature"
                )
            values = [named[name] for name in self.output_names]
        elif isinstance(result, tuple | list):
            if len(result) < len(self.output_names):
                raise BackendError(
                    f"the model gives {_count(len(result))}, and the signature names {len(self.output_names)} "
                    f"({', '.join(self.output_names)}); correct the signature"
                )
            values = list(result[: len(self.output_names)])
        else:
            raise BackendError(
                f"the model gives {shown(type(result).__name__)}; it must give a tensor, or a tuple, mapping or "
                "dataclass of tensors"
            )
        return tuple(_checked(name, value) for name, value in zip(self.output_names, values, strict=True))

    def _named(self, result: object) -> Mapping[str, object] | None:
        """What the module gave, by name; None if it has no names."""
        if isinstance(result, Mapping):
            return result
        if dataclasses.is_dataclass(result) and not isinstance(result, type):
            return {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
        # The fields of a named tuple count only if they are the signature's: else it is a tuple like any other.
        fields = getattr(result, "_fields", ())
        if fields and set(self.output_names) <= set(fields):
            return {name: getattr(result, name) for name in fields}
        return None


def _checked(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise BackendError(
            f"the model's output {name!r} is {shown(type(value).__name__)}, not a tensor; "
            "name another one in the signature"
        )
    return value


def _count(tensors: int) -> str:
    return f"{tensors} tensor" if tensors == 1 else f"{tensors} tensors"


def _keywords(module: nn.Module) -> set[str]:
    """Parameters of a module's ``forward`` that may be given by name."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):  # compiled callables have no signature
        return set()
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {parameter.name for parameter in parameters if parameter.kind in by_name}
