"""Conversion: from a module to an artifact file. Whether the file is right is for the gates to say.

It runs in a process of its own (``python -m export.convert``), which leaves its answer in a file: stdout is for
whatever the user's module prints. TorchScript numbers its type names from what the process
has compiled before, so only a fresh process gives the same bytes every time; and a compiler that crashes takes only
that process with it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from export.calibration import read_calibration
from export.checkpoint import load_checkpoint
from export.combinations import METHODS, TRACE, Combination, refusal
from export.compiler import compiling, conversion_error, first_line
from export.eager import SOURCE_FOLDER, write_source, write_weights
from export.errors import ConversionError, ExportError
from export.fresh_process import run_in_fresh_process
from export.inputs import example_batch
from handlers.artifact import Artifact, ModuleSource
from handlers.calling import NamedModule
from handlers.errors import BackendError
from handlers.signature import Signature
from handlers.tensors import TensorBatch, TensorSpec

__all__ = ["ANSWER_FILE", "METHODS", "convert", "convert_in_fresh_process"]

ANSWER_FILE = "conversion.json"

_SUFFIXES = {"torchscript": ".pt", "onnx": ".onnx", "pt2": ".pt2", "eager": ".weights.pt"}
_DTYPES = {"fp32": None, "int8": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def convert_in_fresh_process(
    source: Path,
    folder: Path,
    *,
    format: str,
    precision: str = "fp32",
    method: str = TRACE,
    device: str = "cpu",
    factory: str | None = None,
    signature_file: Path | None = None,
    config: Mapping[str, Any] | None = None,
    calibration: Path | None = None,
) -> Artifact:
    """Convert a checkpoint in a new process.

    Args:
        source: See :func:`export.checkpoint.load_checkpoint`.
        folder: Where to write the artifact.
        format: One of :data:`handlers.artifact.FORMATS`.
        precision: One of :data:`handlers.artifact.PRECISIONS`.
        method: ``trace`` or ``script``, for TorchScript.
        device: One of :data:`handlers.artifact.DEVICES`.
        factory: See :func:`export.checkpoint.load_checkpoint`.
        signature_file: See :func:`export.checkpoint.load_checkpoint`.
        config: See :func:`export.checkpoint.load_checkpoint`.
        calibration: A file of :func:`export.calibration.write_calibration`, for static int8.

    Raises:
        ConversionError: If the combination is not offered, the model cannot be converted, or the process dies.
    """
    combination = Combination(format=format, precision=precision, device=device)
    _require_offered(combination, method)
    if factory is not None and factory.partition(":")[0] == "__main__":
        raise ConversionError(
            f"the factory {factory} lives in a script or notebook, which other processes cannot import; "
            "move it into a module of its own and name that in --model"
        )
    folder = folder.resolve()
    request = {
        "source": str(source.resolve()),
        "folder": str(folder),
        "combination": asdict(combination),
        "method": method,
        "factory": factory,
        "signature_file": str(signature_file.resolve()) if signature_file else None,
        "config": None if config is None else dict(config),
        "calibration": str(calibration.resolve()) if calibration else None,
    }
    answer = run_in_fresh_process(
        "export.convert",
        folder,
        ANSWER_FILE,
        what=f"the conversion to {format}",
        error=ConversionError,
        stdin=json.dumps(request),
        environment={"PYTHONHASHSEED": "0"},
    )
    if "error" in answer:
        raise ConversionError(answer["error"])
    document = answer["artifact"]
    module = document.pop("module", None)
    return Artifact(**document, module=ModuleSource(**module) if module else None)


def main() -> None:
    """Answer one request of :func:`convert_in_fresh_process`: JSON on stdin, JSON in :data:`ANSWER_FILE`."""
    request = json.load(sys.stdin)
    answer: dict[str, Any]
    try:
        artifact = convert_in_this_process(
            Path(request["source"]),
            Path(request["folder"]),
            **request["combination"],
            method=request["method"],
            factory=request["factory"],
            signature_file=_path(request["signature_file"]),
            config=request["config"],
            calibration=_path(request["calibration"]),
        )
        answer = {"artifact": artifact.to_document()}
    except ExportError as error:
        answer = {"error": str(error)}
    (Path(request["folder"]) / ANSWER_FILE).write_text(json.dumps(answer), encoding="utf-8")


def convert_in_this_process(
    source: Path,
    folder: Path,
    *,
    format: str,
    precision: str = "fp32",
    method: str = TRACE,
    device: str = "cpu",
    factory: str | None = None,
    signature_file: Path | None = None,
    config: Mapping[str, Any] | None = None,
    calibration: Path | None = None,
) -> Artifact:
    """What the process of :func:`convert_in_fresh_process` does; TorchScript files then name this process's types.

    Raises:
        CheckpointError: If the checkpoint cannot be used.
        ConversionError: As :func:`convert` does.
    """
    checkpoint = load_checkpoint(source, factory=factory, signature_file=signature_file, config=config)
    return convert(
        checkpoint.module,
        checkpoint.signature,
        folder,
        combination=Combination(format=format, precision=precision, device=device),
        method=method,
        origin=ModuleSource(factory=checkpoint.factory, config=checkpoint.config),
        calibration=read_calibration(calibration) if calibration else (),
    )


def convert(
    module: torch.nn.Module,
    signature: Signature,
    folder: Path,
    *,
    combination: Combination,
    method: str = TRACE,
    origin: ModuleSource | None = None,
    calibration: Sequence[TensorBatch] = (),
) -> Artifact:
    """Convert a module and write the artifact.

    Args:
        module: In eval mode, on the CPU, in float32. It is changed: load it again for anything else.
        signature: Names, dtypes and axes of the tensors.
        folder: Where to write.
        combination: Format, precision and device.
        method: ``trace`` or ``script``, for TorchScript.
        origin: What built the module; eager only.
        calibration: Samples for static int8.

    Raises:
        ConversionError: If the combination is not offered or the model cannot be converted; the message has the
            compiler's own first line.
    """
    _require_offered(combination, method)
    path = folder / f"model{_SUFFIXES[combination.format]}"
    try:
        with compiling():
            requires = _write(module, signature, path, combination, method=method, origin=origin, samples=calibration)
    except Exception as error:  # compilers raise whatever they like about a user's model
        path.unlink(missing_ok=True)
        shutil.rmtree(folder / SOURCE_FOLDER, ignore_errors=True)
        how = {"torchscript": method, "eager": "state_dict"}.get(combination.format, "torch.export")
        raise conversion_error(error, format=combination.format, method=how, precision=combination.precision) from error
    return Artifact(
        format=combination.format,
        precision=combination.precision,
        device=combination.device,
        file=path.name,
        requires=requires,
        module=origin if combination.format == "eager" else None,
    )


def _require_offered(combination: Combination, method: str) -> None:
    reason = refusal(combination, method=method)
    if reason is not None:
        raise ConversionError(reason)


def _path(value: str | None) -> Path | None:
    return Path(value) if value else None


def _write(
    module: torch.nn.Module,
    signature: Signature,
    path: Path,
    combination: Combination,
    *,
    method: str,
    origin: ModuleSource | None,
    samples: Sequence[TensorBatch],
) -> dict[str, str]:
    """Write the artifact's file and, for eager ones, its source; returns what it requires."""
    dtype = _DTYPES[combination.precision]
    # An ONNX graph names no device, and exporting it needs none.
    device = "cpu" if combination.format == "onnx" else combination.device
    example = [torch.from_numpy(values).to(device) for values in _in_order(example_batch(signature), signature)]
    named = _named(module.to(device, dtype), signature, dtype)
    _check_outputs(_outputs(named, example, combination.precision), signature, dtype)
    # Imported when they are needed: the compilers of one format take seconds to load, and the others do without.
    if combination.format == "torchscript":
        from export.torchscript import write_torchscript  # noqa: PLC0415

        if combination.precision == "int8":
            from export.quantization import quantized_module  # noqa: PLC0415

            named = _named(quantized_module(module), signature, None)
        write_torchscript(named, signature, example, path, method=method)
        return {}
    if combination.format == "onnx":
        _write_onnx(named, signature, example, path, int8=combination.precision == "int8", samples=samples)
        return {}
    if combination.format == "pt2":
        return _write_pt2(named, signature, example, path, combination, samples)
    if origin is None:
        raise ConversionError("an eager artifact is built by its factory; say which one built the module")
    write_weights(module, path)
    return write_source(origin.factory, path.parent)


def _write_onnx(
    named: NamedModule,
    signature: Signature,
    example: Sequence[torch.Tensor],
    path: Path,
    *,
    int8: bool,
    samples: Sequence[TensorBatch],
) -> None:
    from export import onnx_graph, quantization  # noqa: PLC0415

    if not int8:
        onnx_graph.write_onnx(named, signature, example, path)
        return
    static = quantization.needs_calibration(named, format="onnx")
    if static:
        quantization.require_samples(samples, format="onnx")
    graph = onnx_graph.export_graph(named, signature, example)
    if static:
        graph = quantization.quantized_statically(graph, samples)
    else:
        graph = quantization.quantized_dynamically(onnx_graph.fused(graph, onnx_graph.feeds(signature, example)))
    onnx_graph.write_graph(graph, path)


def _write_pt2(
    named: NamedModule,
    signature: Signature,
    example: Sequence[torch.Tensor],
    path: Path,
    combination: Combination,
    samples: Sequence[TensorBatch],
) -> dict[str, str]:
    from export import pt2  # noqa: PLC0415

    int8 = combination.precision == "int8"
    if int8:
        from export.pt2e import quantized_module  # noqa: PLC0415
        from export.quantization import require_samples  # noqa: PLC0415

        require_samples(samples, format="pt2")
        named = quantized_module(named, signature, pt2.repeated(example), samples)
    return pt2.write_pt2(named, signature, example, path, device=combination.device, int8=int8)


def _named(module: torch.nn.Module, signature: Signature, dtype: torch.dtype | None) -> NamedModule:
    inputs = [spec.name for spec in signature.inputs]
    outputs = [spec.name for spec in signature.outputs]
    named = NamedModule(module, inputs, outputs, dtype=dtype)
    return named.eval()


def _in_order(batch: TensorBatch, signature: Signature) -> list[Any]:
    return [batch[spec.name] for spec in signature.inputs]


def _outputs(named: NamedModule, example: Sequence[torch.Tensor], precision: str) -> tuple[torch.Tensor, ...]:
    """What the module gives for an example, before any compiler sees it."""
    try:
        outputs: tuple[torch.Tensor, ...] = named(*example)
    except BackendError:
        raise
    except Exception as error:  # the user's code
        remedy = (
            "correct the shapes, ranges and axes of the signature's inputs"
            if precision in ("fp32", "int8")
            else "use --precision fp32"
        )
        raise ConversionError(
            f"the model fails in {precision} on an example of the signature's inputs ({first_line(error)}); {remedy}"
        ) from error
    return outputs


def _check_outputs(outputs: Sequence[torch.Tensor], signature: Signature, dtype: torch.dtype | None) -> None:
    """Compare what the model gives with what the signature says, before a compiler speaks of something else."""
    for output, spec in zip(outputs, signature.outputs, strict=True):
        found = str(output.dtype).removeprefix("torch.")
        if found != spec.dtype and dtype is not None and found.startswith("float") and spec.dtype.startswith("float"):
            raise ConversionError(
                f"outputs of lower precision come out as float32, and the signature says that {spec.name!r} is "
                f"{spec.dtype}; use --precision fp32, or give float32 in the model and in the signature"
            )
        if found != spec.dtype:
            raise ConversionError(
                f"the model's output {spec.name!r} is {found}, and the signature says {spec.dtype}; "
                "correct the signature"
            )
        if not _fits(output, spec):
            raise ConversionError(
                f"the model's output {spec.name!r} has the shape {list(output.shape)} for an example, and the "
                f"signature says {list(spec.shape)}; correct the signature"
            )


def _fits(output: torch.Tensor, spec: TensorSpec) -> bool:
    return len(output.shape) == len(spec.shape) and all(
        isinstance(declared, str) or declared == size for declared, size in zip(spec.shape, output.shape, strict=True)
    )


if __name__ == "__main__":
    main()
