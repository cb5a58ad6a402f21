"""Conversion: from a module to an artifact file. Whether the file is right is for the gates to say.

It runs in a process of its own (``python -m export.convert``), which leaves its answer in a file: stdout is for
whatever the user's module prints. TorchScript numbers its type names from what the process
has compiled before, so only a fresh process gives the same bytes every time; and a compiler that crashes takes only
that process with it.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from export.checkpoint import load_checkpoint
from export.errors import ConversionError, ExportError
from export.inputs import random_batch
from handlers.signature import BATCH_AXIS, Artifact, Signature

METHODS = ("trace", "script")
ANSWER_FILE = "conversion.json"
# 20 is what the dynamo exporter writes by default; from 23 on, attention with a broadcast mask fails at run time.
ONNX_OPSET = 20

# More than one: an exporter may take an axis of length one for a constant.
_EXAMPLE_BATCH = 3

_SUFFIXES = {"torchscript": ".pt", "onnx": ".onnx"}
# Written by PyTorch's own writer again, whatever it is told.
_WRITER_RECORDS = ("version", "byteorder", ".format_version", ".storage_alignment", ".data/serialization_id")


def convert_in_fresh_process(
    source: Path,
    folder: Path,
    *,
    format: str,
    method: str,
    factory: str | None = None,
    signature_file: Path | None = None,
) -> Artifact:
    """Convert a checkpoint in a new process.

    Args:
        source: See :func:`export.checkpoint.load_checkpoint`.
        folder: Where to write the artifact.
        format: One of :data:`handlers.signature.FORMATS`.
        method: ``trace`` or ``script``, for TorchScript.
        factory: See :func:`export.checkpoint.load_checkpoint`.
        signature_file: See :func:`export.checkpoint.load_checkpoint`.

    Raises:
        ConversionError: If the model cannot be converted, or the process dies.
    """
    folder = folder.resolve()
    answer_file = folder / ANSWER_FILE
    answer_file.unlink(missing_ok=True)
    request = {
        "source": str(source.resolve()),
        "folder": str(folder),
        "format": format,
        "method": method,
        "factory": factory,
        "signature_file": str(signature_file.resolve()) if signature_file else None,
    }
    done = subprocess.run(
        [sys.executable, "-m", "export.convert"],
        input=json.dumps(request),
        # Absolute: the child stands elsewhere, and an empty path means the current folder.
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)), "PYTHONHASHSEED": "0"},
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0 or not answer_file.is_file():
        last = (done.stderr.strip().splitlines() or ["no message"])[-1].strip()
        raise ConversionError(f"the conversion to {format} died with exit code {done.returncode}: {last}")
    answer = json.loads(answer_file.read_bytes())
    if "error" in answer:
        raise ConversionError(answer["error"])
    return Artifact(**answer["artifact"])


def main() -> None:
    """Answer one request of :func:`convert_in_fresh_process`: JSON on stdin, JSON in :data:`ANSWER_FILE`."""
    request = json.load(sys.stdin)
    signature_file = request["signature_file"]
    answer: dict[str, Any]
    try:
        checkpoint = load_checkpoint(
            Path(request["source"]),
            factory=request["factory"],
            signature_file=Path(signature_file) if signature_file else None,
        )
        artifact = convert(
            checkpoint.module,
            checkpoint.signature,
            random_batch(checkpoint.signature, _EXAMPLE_BATCH),
            Path(request["folder"]),
            method=request["method"],
            format=request["format"],
        )
        answer = {"artifact": artifact.to_document()}
    except ExportError as error:
        answer = {"error": str(error)}
    (Path(request["folder"]) / ANSWER_FILE).write_text(json.dumps(answer), encoding="utf-8")


def convert(
    module: torch.nn.Module,
    signature: Signature,
    example: NDArray[np.float32],
    folder: Path,
    *,
    method: str,
    format: str,
) -> Artifact:
    """Convert a module and write the artifact.

    Args:
        module: In eval mode, on the CPU.
        signature: Names and dynamic axes of the tensors.
        example: A valid input of at least two samples, ``[batch, ...]``.
        folder: Where to write.
        method: ``trace`` or ``script``, for TorchScript.
        format: One of :data:`handlers.signature.FORMATS`.

    Raises:
        ConversionError: If the model cannot be converted; the message has the compiler's own first line.
    """
    artifact = Artifact(format=format, precision="fp32", file=f"model{_SUFFIXES[format]}")
    path = folder / artifact.file
    example_tensor = torch.from_numpy(example)
    try:
        with warnings.catch_warnings(), _quiet_exporter():
            # torch.jit's deprecation and the exporter's remarks are for its developers, not for our users.
            warnings.simplefilter("ignore")
            if format == "torchscript":
                _write_torchscript(module, example_tensor, path, method=method)
            else:
                _write_onnx(module, example_tensor, signature, path)
    except Exception as error:  # compilers raise whatever they like about a user's model
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
        raise ConversionError(
            f"the model cannot be converted to {format} ({method if format == 'torchscript' else 'dynamo'}): {reason}"
        ) from error
    return artifact


def _write_torchscript(module: torch.nn.Module, example: torch.Tensor, path: Path, *, method: str) -> None:
    with torch.no_grad():
        compiled = _trace(module, example) if method == "trace" else torch.jit.script(module)
        frozen = torch.jit.freeze(compiled)
    buffer = io.BytesIO()
    torch.jit.save(frozen, buffer)
    buffer.seek(0)
    _without_debug_records(buffer, path)


def _trace(module: torch.nn.Module, example: torch.Tensor) -> Any:
    # The gates compare far more than the tracer's own check, which runs the same example again.
    return torch.jit.trace(module, example, check_trace=False)  # type: ignore[no-untyped-call]


def _without_debug_records(source: io.BytesIO, path: Path) -> None:
    """Copy a TorchScript file without its debug records.

    They hold the absolute paths of every source file traced through: a leak, and different bytes in each folder.
    The records go through PyTorch's own reader and writer, which keep the alignment that its loader maps.
    """
    reader = torch._C.PyTorchFileReader(source)
    # Into memory first: on a full disk PyTorch's own writing ends the process, with a stack of C++ for a reason.
    target = io.BytesIO()
    writer = torch._C.PyTorchFileWriter(target)
    for name in reader.get_all_records():
        if not name.endswith(".debug_pkl") and name not in _WRITER_RECORDS:
            record = reader.get_record(name)
            writer.write_record(name, record, len(record))
    writer.write_end_of_file()
    path.write_bytes(target.getvalue())


def _write_onnx(module: torch.nn.Module, example: torch.Tensor, signature: Signature, path: Path) -> None:
    axes = {0: torch.export.Dim(BATCH_AXIS)}
    program = torch.onnx.export(
        module,
        (example,),
        dynamo=True,
        dynamic_shapes=(axes,),
        input_names=[spec.name for spec in signature.inputs],
        output_names=[spec.name for spec in signature.outputs],
        opset_version=ONNX_OPSET,
        external_data=False,
        verbose=False,
    )
    if program is None:
        raise ConversionError("the ONNX exporter returned no program")
    graph = program.model_proto
    _strip(graph)
    onnx.checker.check_model(graph, full_check=True)
    path.write_bytes(graph.SerializeToString(deterministic=True))


def _strip(message: Any) -> None:
    """Remove metadata and doc strings everywhere: they hold paths and source lines of the exporting machine."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            # A map field iterates over its keys, which hold nothing to strip; the rest are messages.
            for item in value if not hasattr(value, "DESCRIPTOR") else [value]:
                if hasattr(item, "ListFields"):
                    _strip(item)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence the ONNX exporter's log: it warns of a missing torchvision in every run."""
    exporter = logging.getLogger("torch.onnx")
    level = exporter.level
    exporter.setLevel(logging.ERROR)
    try:
        yield
    finally:
        exporter.setLevel(level)


if __name__ == "__main__":
    main()
