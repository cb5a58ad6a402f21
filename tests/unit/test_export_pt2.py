"""pt2 packages: machine code that says what it needs, at any batch and length, and nothing of the exporting machine."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.combinations import Combination, refusal
from export.convert import convert
from export.errors import ConversionError
from export.inputs import random_batch
from handlers.backend import build_backend
from handlers.isa import cpu_isa
from handlers.signature import Signature

PT2 = Combination(format="pt2", precision="bf16")
SIGNATURE = Signature.from_document(
    {
        "format_version": 1,
        "task": "tensor",
        "inputs": [
            {"name": "x", "dtype": "float32", "shape": ["batch", "n", 4]},
            {"name": "scale", "dtype": "float32", "shape": ["batch", 1]},
        ],
        "axes": {"n": {"maximum": 12}},
        "outputs": [
            {"name": "mean", "dtype": "float32", "shape": ["batch", 4]},
            {"name": "count", "dtype": "int64", "shape": ["batch"]},
        ],
    }
)

# Of a torch that is too old, which the tests of combinations see to.
FP32 = Combination(format="pt2", precision="fp32")
pytestmark = pytest.mark.skipif(refusal(FP32) is not None, reason=str(refusal(FP32)))


class Pooled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"mean": self.linear(x).mean(1) * scale, "count": (x > 0).sum((1, 2))}


def test_a_package_computes_the_model_says_what_it_needs_and_leaks_nothing(tmp_path: Path) -> None:
    artifact = convert(Pooled().eval(), SIGNATURE, tmp_path, combination=PT2)
    assert artifact.file == "model.pt2"
    assert artifact.requires == {"torch": str(torch.__version__), "isa": cpu_isa()}
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt2"]

    content = (tmp_path / "model.pt2").read_bytes()
    for secret in (str(Path(torch.__file__).parent), str(tmp_path), "torchport-pt2-", "/tmp/", "torchinductor_"):
        assert secret.encode() not in content, secret

    backend = build_backend(SIGNATURE.with_artifact(artifact), tmp_path, threads=1)
    for size in (1, 2, 5):
        for n in (1, 2, 12):
            batch = random_batch(SIGNATURE, size, sizes={"n": n})
            actual = backend.run(batch)
            with torch.no_grad():
                expected = Pooled()(*(torch.from_numpy(batch[name]) for name in ("x", "scale")))
            assert actual["mean"].dtype == np.float32
            np.testing.assert_allclose(actual["mean"], expected["mean"], rtol=5e-2, atol=2e-2)
            np.testing.assert_array_equal(actual["count"], expected["count"])


def test_without_a_compiler_it_is_refused_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(ConversionError, match="'no-such-compiler' is not on the PATH of this machine; install one"):
        convert(Pooled().eval(), SIGNATURE, tmp_path, combination=PT2)
    assert list(tmp_path.iterdir()) == []


def test_a_temporary_folder_with_a_space_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a b"))
    with pytest.raises(ConversionError, match="set TMPDIR to one without"):
        convert(Pooled().eval(), SIGNATURE, tmp_path, combination=PT2)


def test_a_convolution_takes_batches_on_both_sides_of_where_pytorch_changes_its_kernel(tmp_path: Path) -> None:
    signature = Signature.from_document(
        {
            "format_version": 1,
            "task": "tensor",
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 1, 4, 4]}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 2, 4, 4]}],
        }
    )
    module = nn.Conv2d(1, 2, 3, padding=1).eval()
    artifact = convert(module, signature, tmp_path, combination=Combination(format="pt2", precision="fp32"))
    backend = build_backend(signature.with_artifact(artifact), tmp_path, threads=1)
    for size in (1, 2, 15, 16, 17, 40):
        batch = random_batch(signature, size)
        expected = module(torch.from_numpy(batch["x"])).detach().numpy()
        np.testing.assert_allclose(backend.run(batch)["y"], expected, rtol=1e-4, atol=1e-5)
