"""int8 before AOTInductor: the graph is quantised by PT2E (torchao), and the compiler fuses that into int8 kernels.

Static: the ranges of all activations are fixed beforehand, by calibration samples. torchao is needed here only; the
package that comes of it runs without.
"""

from __future__ import annotations

import importlib
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from export.compiler import first_line
from export.errors import ConversionError
from export.program import export_program
from handlers.calling import NamedModule
from handlers.signature import Signature
from handlers.tensors import TensorBatch

# What int8 kernels exist for.
_LAYERS: dict[Any, type[nn.Module]] = {
    torch.ops.aten.linear.default: nn.Linear,
    torch.ops.aten.conv1d.default: nn.Conv1d,
    torch.ops.aten.conv2d.default: nn.Conv2d,
}
_INSTEAD = "use --format torchscript or --format onnx for int8"
_QUANTIZE = "quantized_decomposed.quantize_per_tensor.default"


def quantized_module(
    module: NamedModule, signature: Signature, example: Sequence[torch.Tensor], samples: Sequence[TensorBatch]
) -> NamedModule:
    """A module whose graph quantises what goes into every linear layer and convolution, and dequantises what comes out.

    Args:
        module: The module, in eval mode, on the CPU, in float32.
        signature: Names and dynamic axes of the tensors.
        example: Valid inputs in the signature's order; no dynamic axis has a size of one.
        samples: Arrays by input name, without a batch axis, that span the ranges.

    Raises:
        ConversionError: If there is nothing to quantise, or the samples do not fit.
        Exception: Whatever the exporter says about the module.
    """
    quantize, quantizer = _torchao("quantize_pt2e"), _torchao("quantizer.x86_inductor_quantizer")
    # Without VNNI, products of bytes are added up in 16 bits, and overflow unless one of the two is of 7 bits.
    ranges = quantizer.get_default_x86_inductor_quantization_config(reduce_range=not torch.cpu._is_vnni_supported())
    graph = export_program(module, signature, example).exported.module(check_guards=False)
    kinds = _of_floats(quantizer.X86InductorQuantizer).set_global(ranges)
    for name in _show_layers(graph):
        kinds.set_module_name_qconfig(name, None)
    try:
        observed = quantize.prepare_pt2e(graph, kinds)
        _calibrate(observed, signature, samples)
        quantized = quantize.convert_pt2e(observed)
    except ConversionError:
        raise
    except Exception as error:  # what torchao asserts about a model it cannot take apart
        raise ConversionError(
            f"torchao cannot quantise the model: {first_line(error)}; {_INSTEAD}, or --precision bf16"
        ) from error
    _require_quantized(quantized)
    # A graph of torch.export is in eval mode for good: asked for it, torchao raises.
    return NamedModule(quantized, module.input_names, module.output_names)


def _show_layers(graph: torch.fx.GraphModule) -> list[str]:
    """Let the quantiser see every product with weights, each with weights of its own.

    It knows layers by the class of the module that they stand in, and takes neither derived classes nor functions,
    and so nothing of PyTorch's own attention. Inductor computes layers that share their weights in fp32.

    Returns:
        Names of those that must stay in fp32: int8 convolutions of one channel. For a batch of any size Inductor 2.13
        expects what they give in another memory layout than it is (``_prepare_convolution_fusion_create``).
    """
    seen: set[int] = set()
    exact: list[str] = []
    for node in graph.graph.nodes:
        layer = _LAYERS.get(node.target)
        if layer is None or node.args[1].op != "get_attr":
            continue
        stack = node.meta.get("nn_module_stack", {})
        node.meta["nn_module_stack"] = {**stack, node.name: (node.name, f"{layer.__module__}.{layer.__qualname__}")}
        weight = node.args[1]
        tensor = operator.attrgetter(weight.target)(graph)
        if len(weight.users) > 1 or tensor.data_ptr() in seen:
            name = f"weight_of_{node.name}"
            graph.register_buffer(name, tensor.detach().clone())
            with graph.graph.inserting_before(node):
                own = graph.graph.get_attr(name)
            own.meta.update(weight.meta)
            node.update_arg(1, own)
        seen.add(tensor.data_ptr())
        if layer is not nn.Linear and tensor.shape[1] == 1 and node.args[0].meta["val"].shape[1] == 1:
            exact.append(node.name)
    graph.recompile()
    return exact


def _of_floats(quantizer: Any) -> Any:
    """A quantiser that leaves whole numbers alone: this one asks for the ranges of position ids that are added up.

    Args:
        quantizer: The class ``X86InductorQuantizer``.
    """
    key = _torchao("quantizer.quantizer").Q_ANNOTATION_KEY

    class OfFloats(quantizer):  # type: ignore[misc]
        def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
            annotated: torch.fx.GraphModule = super().annotate(model)
            for node in annotated.graph.nodes:
                annotation = node.meta.get(key)
                if annotation is not None and not all(map(_is_float, (node, *annotation.input_qspec_map))):
                    del node.meta[key]
            return annotated

    return OfFloats()


def _is_float(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    return not isinstance(value, torch.Tensor) or value.is_floating_point()


def _torchao(name: str) -> Any:
    return importlib.import_module(f"torchao.quantization.pt2e.{name}")


def _calibrate(observed: nn.Module, signature: Signature, samples: Sequence[TensorBatch]) -> None:
    """Let observers see the samples, one by one: what would fill up the shorter ones of a batch is in no range."""
    try:
        for sample in samples:
            observed(*(torch.from_numpy(np.asarray(sample[spec.name])[np.newaxis]) for spec in signature.inputs))
    except Exception as error:  # a model raises whatever it likes about samples that do not fit
        raise ConversionError(
            f"the model cannot be calibrated: {first_line(error)}; check that the calibration samples fit the "
            "signature, or use --precision fp32"
        ) from error


def _require_quantized(graph: torch.fx.GraphModule) -> None:
    if not any(str(node.target) == _QUANTIZE for node in graph.graph.nodes):
        raise ConversionError(
            "int8 pt2 quantises linear layers and convolutions in one or two dimensions, and the model has none; "
            "use --format onnx for int8, or --precision bf16"
        )
