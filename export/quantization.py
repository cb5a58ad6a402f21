"""int8: dynamic for what is mostly linear layers, static with calibration for what is mostly convolutions."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from export.compiler import first_line
from export.errors import ConversionError
from handlers.tensors import Array, TensorBatch

# What holds weights that either kind of quantisation makes int8. Convolutions are left out of the dynamic kind:
# ONNX Runtime has no fast kernel for those.
_DYNAMIC_OPERATORS = ["MatMul", "Gemm", "Attention"]
_STATIC_OPERATORS = ["Conv", "MatMul", "Gemm"]


def needs_calibration(module: nn.Module, *, format: str) -> bool:
    """Whether int8 of a module is static in a format, and so needs calibration data.

    Static quantisation fixes the ranges of all activations beforehand. int8 pt2 is always static: its kernels for
    dynamic ranges are slower. int8 ONNX is if most of the module's weights are convolutions', whose fast kernels have
    fixed ranges only. int8 TorchScript never is.

    Args:
        module: What is quantised.
        format: One of :data:`handlers.artifact.FORMATS`.
    """
    if format != "onnx":
        return format == "pt2"
    convolutions = sum(_weights(module, nn.modules.conv._ConvNd))
    return convolutions > sum(_weights(module, nn.Linear))


def quantized_module(module: nn.Module) -> nn.Module:
    """A copy with int8 weights in every linear layer; activations are quantised batch by batch.

    Raises:
        ConversionError: If there is no layer that it could do that to.
    """
    # Exactly this class: PyTorch leaves out those derived from it, such as the projection of its own attention.
    if not any(type(layer) is nn.Linear for layer in module.modules()):
        inherited = any(isinstance(layer, nn.Linear) for layer in module.modules())
        what = "only linear layers that PyTorch cannot quantise (as in nn.MultiheadAttention)" if inherited else "none"
        instead = "--format onnx with --calibration" if needs_calibration(module, format="onnx") else "--format onnx"
        raise ConversionError(
            f"int8 TorchScript quantises nn.Linear layers, and the model has {what}; "
            f"use {instead} for int8, or --precision bf16"
        )
    quantized: nn.Module = torch.ao.quantization.quantize_dynamic(  # type: ignore[no-untyped-call]
        module, {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
    )
    return quantized


def require_samples(samples: Sequence[TensorBatch], *, format: str) -> None:
    """Refuse static quantisation without data.

    Raises:
        ConversionError: If there is no sample.
    """
    if not samples:
        what = "int8 ONNX of a model that is mostly convolutions" if format == "onnx" else f"int8 {format}"
        raise ConversionError(
            f"{what} needs calibration data; "
            "give --calibration with samples like those it will see, or use --precision fp32"
        )


def quantized_dynamically(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A graph with int8 weights in its matrix products; activations are quantised batch by batch.

    Args:
        graph: A graph, fused or not.

    Raises:
        ConversionError: If there is no product with weights in it.
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic  # noqa: PLC0415  # slow to import

    with tempfile.TemporaryDirectory(prefix="torchport-int8-") as temporary:
        source, target = Path(temporary) / "model.onnx", Path(temporary) / "int8.onnx"
        prepared = _prepared(graph)
        source.write_bytes(prepared.SerializeToString(deterministic=True))
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=_DYNAMIC_OPERATORS,
            per_channel=True,
            weight_type=QuantType.QInt8,
            reduce_range=_shares_weights(prepared, _DYNAMIC_OPERATORS),
            # What comes out of fused operators, whose types only ONNX Runtime could infer.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        quantized = onnx.load(target)
    _require_int8(quantized, "MatMulInteger", "DynamicQuantizeMatMul", "QAttention")
    return quantized


def quantized_statically(graph: onnx.ModelProto, samples: Sequence[TensorBatch]) -> onnx.ModelProto:
    """A graph whose weights and activations are int8, by ranges that calibration samples span.

    Args:
        graph: A graph in standard operators.
        samples: Arrays by input name, without a batch axis.

    Raises:
        ConversionError: If there is no sample, one does not fit, or there is nothing to quantise.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static  # noqa: PLC0415
    from onnxruntime.quantization.shape_inference import quant_pre_process  # noqa: PLC0415

    require_samples(samples, format="onnx")
    with tempfile.TemporaryDirectory(prefix="torchport-int8-") as temporary:
        source, ready, target = (Path(temporary) / name for name in ("model.onnx", "ready.onnx", "int8.onnx"))
        source.write_bytes(graph.SerializeToString(deterministic=True))
        # Folds normalisation into convolutions, and finds the shapes of everything between.
        quant_pre_process(source, ready, skip_symbolic_shape=True)
        try:
            quantize_static(
                ready,
                target,
                _Samples(samples),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=_STATIC_OPERATORS,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                reduce_range=_shares_weights(onnx.load(ready), _STATIC_OPERATORS),
            )
        except Exception as error:  # ONNX Runtime's exception classes share no base below Exception
            raise ConversionError(
                f"the model cannot be calibrated: {first_line(error)}; check that the calibration samples fit the "
                "signature, or use --precision fp32"
            ) from error
        quantized = onnx.load(target)
    _require_int8(quantized, "QuantizeLinear")
    return quantized


class _Samples:
    """Calibration samples as ONNX Runtime asks for them: one after the other, each a batch of one."""

    def __init__(self, samples: Sequence[TensorBatch]) -> None:
        self._left: Iterator[TensorBatch] = iter(samples)

    def get_next(self) -> dict[str, Array] | None:
        """The next batch; None at the end."""
        sample = next(self._left, None)
        return None if sample is None else {name: np.asarray(values)[np.newaxis] for name, values in sample.items()}


def _weights(module: nn.Module, kind: Any) -> Iterator[int]:
    for layer in module.modules():
        if isinstance(layer, kind):
            yield layer.weight.numel()


def _prepared(graph: onnx.ModelProto) -> onnx.ModelProto:
    """A copy that suits the dynamic quantiser.

    It turns the weights of a Gemm round where they lie. So it trips over notes on their shapes, and turns weights
    that two nodes share round twice, which nothing tells but wrong numbers.
    """
    ready = onnx.ModelProto()
    ready.CopyFrom(graph)
    weights = {tensor.name: tensor for tensor in ready.graph.initializer}
    kept = [info for info in graph.graph.value_info if info.name not in weights]
    del ready.graph.value_info[:]
    ready.graph.value_info.extend(kept)
    uses = Counter(name for node in graph.graph.node for name in node.input)
    for i, node in enumerate(ready.graph.node):
        if node.op_type == "Gemm" and node.input[1] in weights and uses[node.input[1]] > 1:
            own = onnx.TensorProto()
            own.CopyFrom(weights[node.input[1]])
            own.name = f"{own.name}.of_node_{i}"
            ready.graph.initializer.append(own)
            node.input[1] = own.name
    return ready


def _shares_weights(graph: onnx.ModelProto, operators: Sequence[str]) -> bool:
    """Whether two operators that are quantised have the same weights.

    Without VNNI, 16 bits overflow with bytes of 8 bits, and the backend lets ONNX Runtime turn weights into a type that
    has other kernels. It cannot do that twice with the same weights (1.31: "Attempt to replace the existing tensor").
    With weights of 7 bits nothing overflows, and nothing need be turned.
    """
    weights = {tensor.name for tensor in graph.graph.initializer if len(tensor.dims) > 1}
    uses = Counter(
        name for node in graph.graph.node if node.op_type in operators for name in node.input if name in weights
    )
    return any(count > 1 for count in uses.values())


def _require_int8(graph: onnx.ModelProto, *operators: str) -> None:
    if not any(node.op_type in operators for node in graph.graph.node):
        raise ConversionError(
            "int8 ONNX quantises convolutions and matrix products with weights, and the model's graph has none; "
            "use --precision fp32"
        )
