"""ONNX graphs: exported, fused, with the signature's names, and without anything of the exporting machine."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch

from export.compiler import compiling
from export.errors import ConversionError
from export.program import Program, export_program
from handlers.calling import NamedModule
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch

OPSET = 20
"""What the exporter writes by default. From 23 on, attention with a broadcast mask fails at run time."""

# Protobuf holds no message beyond 2 GiB, and weights beside the graph would be one more file to lose.
_MAX_BYTES = 2**31 - 1
# What fusion may change: the order of sums, and erf for its usual approximation.
_TOLERANCES = {None: 1e-4, torch.float16: 2e-2}


def write_onnx(
    module: NamedModule, signature: Signature, example: Sequence[torch.Tensor], path: Path, *, fuse: bool = True
) -> None:
    """Export a module to an ONNX graph and write it.

    Args:
        module: The module, in eval mode.
        signature: Names and dynamic axes of the tensors.
        example: Valid inputs in the signature's order.
        path: The file to write.
        fuse: Whether to put ONNX Runtime's own operators in place of groups of standard ones, where that helps.

    Raises:
        ConversionError: If a dynamic axis cannot be kept, or the graph does not fit into one file.
        Exception: Whatever the exporter says about the module.
    """
    graph = export_graph(module, signature, example)
    if fuse:
        graph = fused(graph, feeds(signature, example), dtype=module.dtype)
    write_graph(graph, path)


def export_graph(module: NamedModule, signature: Signature, example: Sequence[torch.Tensor]) -> onnx.ModelProto:
    """The graph of a module, in standard operators only."""
    program = export_program(module, signature, example)
    exported = torch.onnx.export(
        program.exported,
        dynamo=True,
        input_names=[spec.name for spec in signature.inputs],
        output_names=[spec.name for spec in signature.outputs],
        opset_version=OPSET,
        external_data=False,
        verbose=False,
    )
    if exported is None:
        raise ConversionError("the ONNX exporter returned no program")
    weights = (value.const_value for value in exported.model.graph.initializers.values())
    _require_one_file(sum(tensor.nbytes for tensor in weights if tensor is not None))
    graph: onnx.ModelProto = exported.model_proto
    _name_axes(graph, program, signature)
    strip(graph)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def write_graph(graph: onnx.ModelProto, path: Path) -> None:
    """Write a graph, weights inside.

    Raises:
        ConversionError: If it does not fit into one file.
    """
    strip(graph)
    _require_one_file(graph.ByteSize())
    path.write_bytes(graph.SerializeToString(deterministic=True))


def feeds(signature: Signature, example: Sequence[torch.Tensor]) -> dict[str, Array]:
    """An example as ONNX Runtime takes it."""
    return {spec.name: tensor.numpy() for spec, tensor in zip(signature.inputs, example, strict=True)}


def fused(graph: onnx.ModelProto, example: TensorBatch, *, dtype: torch.dtype | None = None) -> onnx.ModelProto:
    """The graph with ONNX Runtime's own operators in it: attention, normalisation after a sum, activations.

    Fusion is pattern matching over what exporters write. A graph that it breaks is left as it is, and so is one that
    it does not make any smaller. The judge is ONNX Runtime: the checker of ONNX does not know these operators.

    Args:
        graph: A graph in standard operators.
        example: A batch of at least two samples, by input name.
        dtype: What the graph computes in; None is float32.
    """
    from onnxscript.rewriter.ort_fusions import optimize_for_ort  # noqa: PLC0415  # slow to import

    # A copy: the rules rename weights where they lie, and the graph may have to stay as it is.
    ours = onnx.ModelProto()
    ours.CopyFrom(graph)
    try:
        with compiling():
            model, _ = optimize_for_ort(onnx_ir.from_proto(ours))
        candidate: onnx.ModelProto = onnx_ir.to_proto(model)
        _keep_interface(candidate, graph)
        if len(candidate.graph.node) >= len(graph.graph.node):
            return graph
        computes_the_same = _same_answers(graph, candidate, example, _TOLERANCES[dtype])
    except Exception:  # rules of many hands, on graphs that nobody has seen: the graph without them is right
        return graph
    return candidate if computes_the_same else graph


def strip(message: Any) -> None:
    """Remove metadata and doc strings everywhere: they hold paths and source lines of the exporting machine."""
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "doc_string"):
            message.ClearField(field.name)
        elif field.message_type is not None:
            # A map field iterates over its keys, which hold nothing to strip; the rest are messages.
            for item in value if not hasattr(value, "DESCRIPTOR") else [value]:
                if hasattr(item, "ListFields"):
                    strip(item)


def session(graph: onnx.ModelProto) -> Any:
    """A session of ONNX Runtime on the CPU, one thread."""
    import onnxruntime  # noqa: PLC0415  # slow to import

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        graph.SerializeToString(deterministic=True), options, providers=["CPUExecutionProvider"]
    )


def _require_one_file(size: int) -> None:
    if size > _MAX_BYTES:
        raise ConversionError(
            f"the weights take {size / 2**30:.1f} GiB, and an ONNX file holds at most 2; "
            "use --format torchscript, pt2 or eager"
        )


def _name_axes(graph: onnx.ModelProto, program: Program, signature: Signature) -> None:
    """Give every axis its name in the signature, in place of the exporter's symbols (``s85``)."""
    names = program.axes
    infos = [*graph.graph.input, *graph.graph.output, *graph.graph.value_info]
    for function in graph.functions:
        infos += function.value_info
    for info in infos:
        for axis in info.type.tensor_type.shape.dim:
            if axis.HasField("dim_param"):
                axis.dim_param = re.sub(r"\w+", lambda match: names.get(match[0], match[0]), axis.dim_param)
    for info, spec in zip(graph.graph.output, signature.outputs, strict=True):
        for axis, declared in zip(info.type.tensor_type.shape.dim, spec.shape, strict=True):
            if isinstance(declared, str) and not axis.HasField("dim_value"):
                axis.dim_param = declared


def _keep_interface(candidate: onnx.ModelProto, graph: onnx.ModelProto) -> None:
    for new, old in ((candidate.graph.input, graph.graph.input), (candidate.graph.output, graph.graph.output)):
        if [info.name for info in new] != [info.name for info in old]:
            raise ValueError("fusion renamed an input or output")
    strip(candidate)


def _same_answers(
    graph: onnx.ModelProto, candidate: onnx.ModelProto, example: Mapping[str, Array], tolerance: float
) -> bool:
    """Whether two graphs agree on an example, and on its first sample alone."""
    before, after = session(graph), session(candidate)
    for batch in (example, {name: values[:1] for name, values in example.items()}):
        for expected, actual in zip(before.run(None, dict(batch)), after.run(None, dict(batch)), strict=True):
            if not np.allclose(actual, expected, rtol=tolerance, atol=tolerance):
                return False
    return True
