"""TorchScript: traced or scripted, frozen, and without the debug records of the exporting machine."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from export.combinations import SCRIPT
from export.errors import ConversionError
from handlers.calling import NamedModule
from handlers.signature import Signature

# Written by PyTorch's own writer again, whatever it is told.
WRITER_RECORDS = ("version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id")


def write_torchscript(
    module: NamedModule, signature: Signature, example: Sequence[torch.Tensor], path: Path, *, method: str
) -> None:
    """Compile a module and write it.

    The compiled module takes its inputs by position, in the signature's order, and gives a tuple.

    Args:
        module: The module, in eval mode.
        signature: Dtypes of the tensors.
        example: Valid inputs, for tracing.
        path: The file to write.
        method: ``trace`` or ``script``.

    Raises:
        ConversionError: If the module gives something that has no tensors in it.
        Exception: Whatever the compiler says about the module.
    """
    compiled = _script(module, signature) if method == SCRIPT else _trace(module, example)
    frozen = torch.jit.freeze(compiled)
    buffer = io.BytesIO()
    torch.jit.save(frozen, buffer)
    buffer.seek(0)
    # Debug records hold the absolute paths of every source file compiled: a leak, and different bytes in each folder.
    path.write_bytes(rewritten(buffer, lambda name, data: None if name.endswith(".debug_pkl") else data))


def rewritten(source: io.BytesIO | str, change: Callable[[str, bytes], bytes | None]) -> bytes:
    """A file of PyTorch's, record by record through its own reader and writer, which keep the alignment it maps.

    Args:
        source: The file or its path.
        change: Gives the new content of a record by its name and content; None leaves it out.
    """
    reader = torch._C.PyTorchFileReader(source)
    # Into memory: on a full disk PyTorch's own writing ends the process, with a stack of C++ for a reason.
    target = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(target)
    for name in reader.get_all_records():
        if name not in WRITER_RECORDS:
            record = change(name, reader.get_record(name))
            if record is not None:
                writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    return target.getvalue()


def _trace(module: NamedModule, example: Sequence[torch.Tensor]) -> Any:
    # The gates compare far more than the tracer's own check, which runs the same example again.
    return torch.jit.trace(module, tuple(example), check_trace=False)  # type: ignore[no-untyped-call]


def _script(module: NamedModule, signature: Signature) -> Any:
    """Script the module within, and call it as :class:`NamedModule` does: its ``*tensors`` cannot be scripted."""
    scripted: Any = torch.jit.script(module.module)
    type = scripted.forward.schema.returns[0].type
    if type.kind() == "TupleType" and str(type).startswith("__torch__."):
        # A named tuple, whose names nothing tells: they count if they are the signature's.
        with contextlib.suppress(RuntimeError):
            items = [f"result.{name}" for name in module.output_names]
            return _defined(scripted, _source(scripted, module, signature, items))
    return _defined(scripted, _source(scripted, module, signature, _picked(type, module.output_names)))


def _defined(scripted: Any, source: str) -> Any:
    """A module around a scripted one, with a ``forward`` of that source."""

    # A class of its own each time: compiled classes are shared, and a method is defined once only.
    class Scripted(torch.jit.ScriptModule):
        def __init__(self) -> None:
            super().__init__()
            self.module = scripted

    wrapper = Scripted()
    wrapper.define(source)
    return wrapper.eval()


def _source(scripted: Any, module: NamedModule, signature: Signature, items: Sequence[str]) -> str:
    names = [f"input_{i}" for i in range(len(module.input_names))]
    lines = [f"def forward(self, {', '.join(f'{name}: Tensor' for name in names)}):"]
    if module.dtype is not None:
        lines += [
            f"    {name} = {name}.to({module.dtype})"
            for name, spec in zip(names, signature.inputs, strict=True)
            if spec.dtype.startswith("float")
        ]
    by_name = set(module.input_names) <= {argument.name for argument in scripted.forward.schema.arguments[1:]}
    arguments = [f"{key}={name}" if by_name else name for key, name in zip(module.input_names, names, strict=True)]
    lines.append(f"    result = self.module({', '.join(arguments)})")
    if module.dtype is not None:
        items = [f"({item}.float() if {item}.is_floating_point() else {item})" for item in items]
    lines.append(f"    return ({', '.join(items)},)")
    return "\n".join(lines) + "\n"


def _picked(type: Any, names: Sequence[str]) -> list[str]:
    """The expressions that take each output out of ``result``."""
    kind = type.kind()
    if kind == "DictType":
        return [f"result[{name!r}]" for name in names]
    if kind == "ClassType":
        return [f"result.{name}" for name in names]
    if kind == "ListType":
        return [f"result[{i}]" for i in range(len(names))]
    if kind not in ("TensorType", "TupleType"):
        raise ConversionError(
            f"the scripted model gives {type}; it must give a tensor, or a tuple, mapping or dataclass of tensors: "
            "annotate its forward, or use --method trace"
        )
    items = ["result"] if kind == "TensorType" else [f"result[{i}]" for i in range(len(type.elements()))]
    if len(items) < len(names):
        raise ConversionError(
            f"the model gives {len(items)} tensor{'' if len(items) == 1 else 's'}, and the signature names "
            f"{len(names)} ({', '.join(names)}); correct the signature"
        )
    return items[: len(names)]
