"""ONNX graphs: the signature's names and axes, fused where that is right, and nothing of the exporting machine."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from export import onnx_graph
from export.combinations import Combination
from export.convert import convert
from export.errors import ConversionError
from export.inputs import random_batch
from handlers.backend import build_backend
from handlers.signature import Signature

ONNX = Combination(format="onnx", precision="fp32")


def signature_of(
    shapes: dict[str, list[Any]], output: list[Any], bounds: dict[str, dict[str, int]] | None = None
) -> Signature:
    document: dict[str, Any] = {
        "format_version": 1,
        "task": "tensor",
        "inputs": [{"name": name, "dtype": "float32", "shape": shape} for name, shape in shapes.items()],
        "outputs": [{"name": "y", "dtype": "float32", "shape": output}],
    }
    return Signature.from_document({**document, "axes": bounds} if bounds else document)


class Attention(nn.Module):
    """What fusion looks for: attention under a mask for each key, a sum before a normalisation, GELU after a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.norm1, self.norm2 = nn.LayerNorm(32), nn.LayerNorm(32)

    def forward(self, x: Tensor, visible: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query, key, value = (part.view(batch, length, 4, 8).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mask = (visible > 0)[:, None, None, :]
        attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = self.norm1(x + self.out(attended.transpose(1, 2).reshape(batch, length, 32)))
        return self.norm2(x + self.down(functional.gelu(self.up(x))))


ATTENTION = signature_of(
    {"x": ["batch", "length", 32], "visible": ["batch", "length"]}, ["batch", "length", 32], {"length": {"maximum": 20}}
)


def axes_of(info: onnx.ValueInfoProto) -> list[str | int]:
    return [axis.dim_param or axis.dim_value for axis in info.type.tensor_type.shape.dim]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("attention")
    convert(Attention().eval(), ATTENTION, path, combination=ONNX)
    return path


@pytest.fixture(scope="module")
def graph(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx", load_external_data=False)


class TestGraph:
    def test_names_and_axes_are_those_of_the_signature(self, graph: onnx.ModelProto) -> None:
        assert {info.name: axes_of(info) for info in graph.graph.input} == {
            "x": ["batch", "length", 32],
            "visible": ["batch", "length"],
        }
        assert {info.name: axes_of(info) for info in graph.graph.output} == {"y": ["batch", "length", 32]}

    def test_the_weights_are_inside_and_the_opset_is_fixed(self, graph: onnx.ModelProto, folder: Path) -> None:
        assert graph.graph.initializer
        assert not any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.graph.initializer)
        assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [onnx_graph.OPSET]
        assert onnx_graph.OPSET < 23
        assert [path.name for path in folder.iterdir()] == ["model.onnx"]

    def test_nothing_is_told_of_the_nodes_origin(self, graph: onnx.ModelProto) -> None:
        assert not graph.metadata_props
        assert not [node for node in graph.graph.node if node.metadata_props or node.doc_string]
        assert b".py" not in graph.SerializeToString()

    def test_it_is_fused(self, graph: onnx.ModelProto) -> None:
        operators = {node.op_type for node in graph.graph.node}
        assert {"MultiHeadAttention", "SkipLayerNormalization", "BiasGelu"} <= operators

    @pytest.mark.parametrize("size", [1, 2, 5])
    @pytest.mark.parametrize("length", [1, 2, 20])
    def test_the_mask_keeps_its_effect_at_any_batch_and_length(self, folder: Path, size: int, length: int) -> None:
        batch = dict(random_batch(ATTENTION, size, sizes={"length": length}))
        batch["visible"] = (np.arange(length) % 2 == 0).astype(np.float32)[None].repeat(size, axis=0)
        from handlers.artifact import Artifact

        artifact = Artifact(format="onnx", precision="fp32", file="model.onnx")
        actual = build_backend(ATTENTION.with_artifact(artifact), folder, threads=1).run(batch)["y"]
        with torch.no_grad():
            expected = Attention()(torch.from_numpy(batch["x"]), torch.from_numpy(batch["visible"])).numpy()
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


class TestFusion:
    @pytest.mark.parametrize("fault", ["raises", "does not load", "computes something else", "renames", "leaves"])
    def test_a_graph_that_fusion_breaks_is_written_as_it_was(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
    ) -> None:
        from onnxscript.rewriter import ort_fusions

        fuse = ort_fusions.optimize_for_ort

        def broken(model: Any) -> Any:
            if fault == "raises":
                raise RuntimeError("a rule of somebody's")
            if fault == "leaves":
                for value in model.graph.initializers.values():
                    value.const_value.name = f"{value.name}_of_mine"
                raise RuntimeError("a rule of somebody's, half done")
            model, counts = fuse(model)
            if fault == "does not load":
                next(node for node in model.graph if node.op_type == "BiasGelu").op_type = "NoSuchOperator"
            elif fault == "renames":
                model.graph.outputs[0].name = "z"
            else:
                weights = next(value for value in model.graph.initializers.values() if len(value.shape) == 2)
                import onnx_ir

                weights.const_value = onnx_ir.tensor(weights.const_value.numpy() * 1.01)
            return model, counts

        monkeypatch.setattr(ort_fusions, "optimize_for_ort", broken)
        convert(Attention().eval(), ATTENTION, tmp_path, combination=ONNX)
        written = onnx.load(tmp_path / "model.onnx")
        assert {entry.domain for entry in written.opset_import if entry.domain} <= {"pkg.onnxscript.torch_lib.common"}
        assert not {"MultiHeadAttention", "BiasGelu"} & {node.op_type for node in written.graph.node}
        onnx_graph.session(written)

    def test_a_graph_without_anything_to_fuse_has_standard_operators_only(
        self, module: nn.Module, signature: Signature, tmp_path: Path
    ) -> None:
        convert(module, signature, tmp_path, combination=ONNX)
        written = onnx.load(tmp_path / "model.onnx")
        assert {node.domain for node in written.graph.node} == {""}


class Unrolled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x[:, 0])
        for i in range(x.shape[1]):
            total = total * 0.5 + x[:, i]
        return total


class Added(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a + b).sum(1, keepdim=True)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 2, x.shape[1] // 2).sum(2)


class TestAxes:
    @pytest.mark.parametrize("combination", [ONNX, Combination(format="pt2", precision="fp32")])
    def test_an_axis_that_the_model_unrolls_is_refused(self, tmp_path: Path, combination: Combination) -> None:
        signature = signature_of({"x": ["batch", "n", 4]}, ["batch", 4], {"n": {"maximum": 30}})
        with pytest.raises(
            ConversionError,
            match=r"^the axis 'n' of 'x' cannot be dynamic, since the model takes only a size of 11 \(.*; narrow its",
        ):
            convert(Unrolled().eval(), signature, tmp_path, combination=combination)

    def test_two_axes_that_must_be_equal_are_refused(self, tmp_path: Path) -> None:
        signature = signature_of(
            {"a": ["batch", "n"], "b": ["batch", "m"]}, ["batch", 1], {"n": {"maximum": 30}, "m": {"maximum": 30}}
        )
        with pytest.raises(
            ConversionError, match=r"^the model fails in fp32 on an example .*size of tensor a \(10\) must match"
        ):
            convert(Added().eval(), signature, tmp_path, combination=ONNX)

    def test_an_axis_that_must_be_even_is_refused(self, tmp_path: Path) -> None:
        signature = signature_of({"x": ["batch", "n"]}, ["batch", 2], {"n": {"minimum": 10, "maximum": 10_000}})
        with pytest.raises(
            ConversionError, match=r"^the model fails in fp32 on an example .*shape '\[3, 2, 5\]' is invalid"
        ):
            convert(Halved().eval(), signature, tmp_path, combination=ONNX)

    def test_an_axis_of_one_possible_size_is_not_dynamic(self, tmp_path: Path) -> None:
        signature = signature_of({"x": ["batch", "n", 4]}, ["batch", 4], {"n": {"minimum": 5, "maximum": 5}})
        convert(Unrolled().eval(), signature, tmp_path, combination=ONNX)
        (info,) = onnx.load(tmp_path / "model.onnx").graph.input
        assert axes_of(info) == ["batch", 5, 4]


def test_weights_beyond_one_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "_MAX_BYTES", 1000)
    with pytest.raises(ConversionError, match="an ONNX file holds at most 2; use --format torchscript, pt2 or eager"):
        convert(Attention().eval(), ATTENTION, tmp_path, combination=ONNX)
    assert list(tmp_path.iterdir()) == []
