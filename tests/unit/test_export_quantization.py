"""int8: which kind suits a model, what it needs, and numbers that stay near."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from export.combinations import Combination
from export.convert import convert
from export.errors import ConversionError
from export.inputs import random_batch, random_samples
from export.quantization import needs_calibration, quantized_module
from handlers.backend import build_backend
from handlers.signature import Signature
from handlers.tensors import TensorBatch

INT8_ONNX = Combination(format="onnx", precision="int8")
VECTOR = Signature.from_document(
    {
        "format_version": 1,
        "task": "tensor",
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 16]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 16]}],
    }
)


class Twice(nn.Module):
    """One weight in two products of the kind that is turned round to be quantised."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.linear(x)))


class Layers(nn.Module):
    """Products of three-dimensional values, with weights of their own or with the same."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(16, 16)
        self.second = self.first if shared else nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.relu(self.first(x.unsqueeze(1)))).squeeze(1)
        return y


class NoLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class OnlyAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def outputs(folder: Path, signature: Signature, module: nn.Module, samples: list[TensorBatch], size: int) -> Tensor:
    """Converted to int8 ONNX, what a module gives for a batch."""
    artifact = convert(module, signature, folder, combination=INT8_ONNX, calibration=samples)
    backend = build_backend(signature.with_artifact(artifact), folder, threads=1)
    (values,) = backend.run(random_batch(signature, size)).values()
    return torch.from_numpy(values)


def operators(folder: Path) -> set[str]:
    return {node.op_type for node in onnx.load(folder / "model.onnx").graph.node}


class TestChoice:
    def test_convolutions_need_calibration_and_linear_layers_do_not(self, module: nn.Module) -> None:
        assert needs_calibration(module, format="onnx")
        assert not needs_calibration(Twice(), format="onnx")
        assert not needs_calibration(NoLayer(), format="onnx")
        assert not needs_calibration(nn.Sequential(nn.Conv1d(2, 2, 1), nn.Linear(16, 16)), format="onnx")

    def test_pt2_always_needs_it_and_torchscript_never(self, module: nn.Module) -> None:
        for each in (module, Twice(), NoLayer()):
            assert needs_calibration(each, format="pt2")
            assert not needs_calibration(each, format="torchscript")

    def test_without_calibration_data_it_is_refused(
        self, module: nn.Module, signature: Signature, tmp_path: Path
    ) -> None:
        with pytest.raises(ConversionError, match="needs calibration data; give --calibration"):
            convert(module, signature, tmp_path, combination=INT8_ONNX)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("combination", [INT8_ONNX, Combination(format="torchscript", precision="int8")])
    def test_a_model_without_weights_is_refused(self, tmp_path: Path, combination: Combination) -> None:
        with pytest.raises(ConversionError, match=r"^int8 .*; use --"):
            convert(NoLayer(), VECTOR, tmp_path, combination=combination)

    def test_layers_that_pytorch_leaves_out_are_said(self) -> None:
        with pytest.raises(ConversionError, match="only linear layers that PyTorch cannot quantise"):
            quantized_module(OnlyAttention())
        with pytest.raises(ConversionError, match="the model has none; use --format onnx for int8"):
            quantized_module(NoLayer())

    def test_a_model_of_convolutions_only_is_told_what_to_use(self) -> None:
        with pytest.raises(ConversionError, match="use --format onnx with --calibration for int8"):
            quantized_module(nn.Sequential(nn.Conv2d(1, 2, 3)))


class TestNumbers:
    def test_static_quantisation_stays_near(self, module: nn.Module, signature: Signature, tmp_path: Path) -> None:
        with torch.no_grad():
            expected = module(torch.from_numpy(random_batch(signature, 5)["image"]))
        actual = outputs(tmp_path, signature, module, random_samples(signature, 32), 5)
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
        assert "QuantizeLinear" in operators(tmp_path)
        assert "MatMulInteger" not in operators(tmp_path)

    def test_shared_weights_are_not_turned_round_twice(self, tmp_path: Path) -> None:
        with torch.no_grad():
            expected = Twice()(torch.from_numpy(random_batch(VECTOR, 5)["x"]))
        actual = outputs(tmp_path, VECTOR, Twice().eval(), [], 5)
        torch.testing.assert_close(actual, expected, rtol=0.03, atol=0.03)
        assert "MatMulInteger" in operators(tmp_path)

    @pytest.mark.parametrize(("shared", "largest"), [(True, 64), (False, 127)])
    def test_weights_of_several_products_have_7_bits_which_overflow_nowhere(
        self, tmp_path: Path, shared: bool, largest: int
    ) -> None:
        module = Layers(shared=shared).eval()
        with torch.no_grad():
            expected = module(torch.from_numpy(random_batch(VECTOR, 5)["x"]))
        torch.testing.assert_close(outputs(tmp_path, VECTOR, module, [], 5), expected, rtol=0.03, atol=0.03)
        tensors = map(onnx.numpy_helper.to_array, onnx.load(tmp_path / "model.onnx").graph.initializer)
        weights = [values for values in tensors if values.shape == (16, 16)]
        assert len(weights) == (1 if shared else 2)
        assert {int(np.abs(values.astype(int)).max()) for values in weights} == {largest}

    def test_the_weights_are_bytes_with_a_scale_for_each_channel(self, tmp_path: Path) -> None:
        convert(Twice().eval(), VECTOR, tmp_path, combination=INT8_ONNX)
        tensors = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in onnx.load(tmp_path / "model.onnx").graph.initializer
        }
        weights = [values for values in tensors.values() if values.shape == (16, 16)]
        assert weights
        assert {values.dtype for values in weights} == {np.dtype(np.int8)}
        assert any(values.shape == (16,) and "scale" in name for name, values in tensors.items())


class TestCalibrationData:
    @pytest.mark.parametrize(
        "sample",
        [{"other": np.zeros((1, 8, 8), np.float32)}, {"image": np.zeros((8, 8), np.float32)}, {}],
    )
    def test_samples_that_do_not_fit_are_refused(
        self, module: nn.Module, signature: Signature, tmp_path: Path, sample: TensorBatch
    ) -> None:
        with pytest.raises(
            ConversionError, match=r"the model cannot be calibrated: .*check that the calibration samples"
        ):
            convert(module, signature, tmp_path, combination=INT8_ONNX, calibration=[sample])
