"""int8 pt2: right at any length and in any company, of models that torchao takes; the rest gets one sentence."""

import importlib.util
import itertools
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

from export.archive import PROVENANCE_FILE, Archive, open_archive
from export.candidate import Prepared, Source, convert_and_check, prepare
from export.combinations import Combination, refusal
from export.compiler import compiling
from export.convert import convert
from export.errors import ConversionError
from export.inputs import example_batch, random_batch, random_samples
from export.pipeline import ExportOptions, export_archive
from export.pt2 import repeated
from export.pt2e import quantized_module
from handlers.backend import build_backend
from handlers.calling import NamedModule
from handlers.model import ServedModel
from handlers.signature import TENSOR, Signature
from handlers.tensors import TensorSpec
from models.convnet import build_conv_classifier
from models.signature import text_classification_signature
from models.text_encoder import build_text_classifier

INT8 = Combination(format="pt2", precision="int8")
# Of a torch that is too old for torchao, which the other tests of the export see to.
pytestmark = pytest.mark.skipif(refusal(INT8) is not None, reason=str(refusal(INT8)))

LONGEST = 12
WORDS = 40
CONFIG = {"vocab_size": WORDS, "num_classes": 2, "hidden_dim": 32, "num_layers": 1, "num_heads": 2}
CONFIG |= {"intermediate_dim": 64, "max_length": LONGEST}
VECTOR = Signature.from_document(
    {
        "format_version": 1,
        "task": "tensor",
        "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 16]}],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 16]}],
    }
)
WITHOUT_TORCHAO = """
import importlib, pathlib, sys
sys.modules["torchao"] = None
from handlers.model import ServedModel
folder = pathlib.Path(sys.argv[1])
served = ServedModel.load(folder, threads=1)
served.warm_up()
served.replay(folder)
assert not [name for name in sys.modules if name.startswith("torchao.") or name.startswith("export")]
print(served.signature.artifact.precision)
"""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An int8 archive of a small text encoder, unpacked, and the module it was made of."""

    archive: Archive
    folder: Path
    module: nn.Module
    served: ServedModel
    options: ExportOptions

    def expected(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Logits of the module, text by text: nothing is filled up."""
        with torch.inference_mode():
            return torch.cat([self.module(ids, torch.ones_like(ids)) for ids in map(row, texts)])

    def actual(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Logits of the archive, all in one batch."""
        samples = [{"input_ids": row(ids)[0].numpy(), "attention_mask": np.ones(len(ids), np.int64)} for ids in texts]
        rows = self.served.run(samples)
        return torch.stack([torch.from_numpy(outputs["logits"]) for outputs in rows if isinstance(outputs, dict)])


def row(ids: Sequence[int]) -> Tensor:
    return torch.tensor([list(ids)])


def random_texts(count: int, seed: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(2, WORDS, 1 + i % LONGEST).tolist() for i in range(count)]


def write_table(path: Path, texts: Sequence[Sequence[int]], labels: Sequence[int]) -> Path:
    rows = zip(texts, labels, strict=True)
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in ids), "label": label}) for ids, label in rows]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("int8")
    words = {word: i for i, word in enumerate(("[PAD]", "[UNK]", *(f"w{i}" for i in range(2, WORDS))))}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_truncation(LONGEST)
    torch.manual_seed(0)
    module = build_text_classifier(**CONFIG).eval()
    content = {
        "format": "torchport-checkpoint",
        "format_version": 1,
        "model": {"factory": "models.text_encoder:build_text_classifier", "config": CONFIG},
        "state_dict": dict(module.state_dict()),
        "signature": text_classification_signature(
            ("0", "1"), tokenizer="tokenizer.json", vocab_size=WORDS, max_length=LONGEST, pad_id=0
        ),
        "files": {"tokenizer.json": tokenizer.to_str()},
        "metrics": {},
    }
    torch.save(content, folder / "checkpoint.pt")
    texts = random_texts(60, seed=1)
    with torch.inference_mode():
        labels = [int(module(ids, torch.ones_like(ids)).argmax()) for ids in map(row, texts)]
    options = ExportOptions(
        source=folder / "checkpoint.pt",
        name="int8",
        format="pt2",
        precision="int8",
        evaluation=write_table(folder / "evaluation.jsonl", texts, labels),
        calibration=write_table(folder / "calibration.jsonl", random_texts(72, seed=2), [0] * 72),
        allow_slower=True,  # so small a model may be, on one machine or another
        out=folder / "store",
    )
    report = export_archive(options)
    assert report.archive is not None
    archive = open_archive(report.archive)
    archive.extract(folder / "unpacked")
    served = ServedModel.load(folder / "unpacked", threads=1)
    return Exported(archive=archive, folder=folder / "unpacked", module=module, served=served, options=options)


class TestTextEncoder:
    @pytest.mark.parametrize(("size", "length"), list(itertools.product((1, 2, 17), (1, 5, LONGEST))))
    def test_it_agrees_with_fp32_at_any_batch_and_length(self, exported: Exported, size: int, length: int) -> None:
        texts = [text * LONGEST for text in random_texts(size, seed=size)]
        texts = [text[:length] for text in texts]
        expected = exported.expected(texts)
        spread = float(exported.expected(random_texts(50, seed=3)).std())
        torch.testing.assert_close(exported.actual(texts), expected, rtol=0.0, atol=0.3 * spread)

    def test_the_first_class_is_that_of_fp32(self, exported: Exported) -> None:
        texts = random_texts(200, seed=4)
        expected, actual = exported.expected(texts), exported.actual(texts)
        clear = (expected[:, 0] - expected[:, 1]).abs() > 0.1 * float(expected.std())
        assert clear.sum() > 100
        assert torch.equal(expected.argmax(1)[clear], actual.argmax(1)[clear])

    def test_an_answer_does_not_depend_on_the_company(self, exported: Exported) -> None:
        """Ranges are fixed, so neither a neighbour nor what fills up a short text can move them."""
        texts = random_texts(24, seed=5)
        alone = torch.cat([exported.actual([ids]) for ids in texts])
        spread = float(exported.expected(texts).std())
        torch.testing.assert_close(exported.actual(texts), alone, rtol=0.0, atol=0.02 * spread)

    def test_it_says_how_it_was_made(self, exported: Exported) -> None:
        provenance = exported.archive.read_json(PROVENANCE_FILE)
        artifact = provenance["artifact"]
        assert (artifact["format"], artifact["precision"], artifact["method"]) == ("pt2", "int8", "aot-inductor")
        assert artifact["quantization"] == "static, pt2e x86-inductor"
        assert artifact["calibration"]["samples"] == 72
        assert len(artifact["calibration"]["sha256"]) == 64
        assert "avx2" in artifact["requires"]["isa"].split()
        assert set(artifact["requires"]) == {"torch", "isa"}
        assert provenance["versions"]["torchao"].startswith("0.")
        assert {gate["gate"] for gate in provenance["gates"]} >= {"padding", "top-1 agreement", "accuracy", "speed"}

    def test_nothing_of_the_exporting_machine_is_in_it(self, exported: Exported) -> None:
        content = (exported.folder / "model.pt2").read_bytes()
        for secret in (str(Path(torch.__file__).parent), "torchport-pt2-", "/tmp/", "torchinductor_"):
            assert secret.encode() not in content, secret

    def test_torchao_is_not_needed_to_serve_it(self, exported: Exported) -> None:
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_TORCHAO, str(exported.folder)],
            env={**os.environ, "PYTHONPATH": str(exported.folder)},  # the handlers that the archive holds
            cwd=exported.folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == "int8"


def test_convolutions_become_int8_too_but_for_those_of_one_channel(signature: Signature, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = build_conv_classifier(in_channels=1, num_classes=3, widths=[4, 8]).eval()
    samples = random_samples(signature, 64)
    named = NamedModule(module, ["image"], ["logits"]).eval()
    with compiling():
        example = repeated([torch.from_numpy(example_batch(signature)["image"])])
        quantized = quantized_module(named, signature, example, samples)
        convolutions = [node.args[0].op for node in layers(quantized, "aten.conv2d.default")]
        assert convolutions == ["placeholder", "call_function"]
        batches = {size: random_batch(signature, size) for size in (1, 2, 15, 16, 40)}
        expected = {size: quantized(torch.from_numpy(batch["image"]))[0] for size, batch in batches.items()}
    artifact = convert(module, signature, tmp_path, combination=INT8, calibration=samples)
    backend = build_backend(signature.with_artifact(artifact), tmp_path, threads=1)
    for size, batch in batches.items():
        actual = torch.from_numpy(backend.run(batch)["logits"])
        # One step of a range more or less where kernels round otherwise.
        torch.testing.assert_close(actual, expected[size], rtol=0.0, atol=0.02)


class Pooled(nn.Module):
    """An operator between two layers of which there is no C interface in int8."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 3, 3)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(nn.functional.max_pool2d(self.first(image), 2)).mean((2, 3))


def test_whole_numbers_that_are_added_up_stay_whole() -> None:
    signature = Signature(
        task=TENSOR,
        inputs=(TensorSpec(name="ids", dtype="int64", shape=("batch", 8), minimum=1, maximum=50),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
    )
    module = Positions().eval()
    ids = torch.from_numpy(random_batch(signature, 5)["ids"])
    with compiling():
        named = NamedModule(module, ["ids"], ["y"]).eval()
        quantized = quantized_module(named, signature, [ids], random_samples(signature, 64))
        torch.testing.assert_close(quantized(ids)[0], module(ids), rtol=0.0, atol=0.02)


def test_what_the_compiled_code_asks_torch_to_compute_is_computed(tmp_path: Path) -> None:
    signature = Signature(
        task=TENSOR,
        inputs=(TensorSpec(name="image", dtype="float32", shape=("batch", 3, 16, 16), minimum=-1, maximum=1),),
        outputs=(TensorSpec(name="logits", dtype="float32", shape=("batch", 3)),),
    )
    module = Pooled().eval()
    batch = random_batch(signature, 5)
    with torch.no_grad():
        expected = module(torch.from_numpy(batch["image"]))
    artifact = convert(module, signature, tmp_path, combination=INT8, calibration=random_samples(signature, 64))
    with zipfile.ZipFile(tmp_path / artifact.file) as package:
        (called,) = (name for name in package.namelist() if name.endswith(".wrapper.json"))
        assert b"quantized::max_pool2d" in package.read(called)
    backend = build_backend(signature.with_artifact(artifact), tmp_path, threads=1)
    torch.testing.assert_close(torch.from_numpy(backend.run(batch)["logits"]), expected, rtol=0.0, atol=0.02)


def layers(quantized: NamedModule, operator: str) -> list[torch.fx.Node]:
    """Calls of an operator in a graph."""
    assert isinstance(quantized.module, torch.fx.GraphModule)
    return [node for node in quantized.module.graph.nodes if str(node.target) == operator]


class Layers(nn.Module):
    """Linear layers as models have them: called twice, a derived class, one of PyTorch's own attention, a function."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice = nn.Linear(16, 16)
        self.own = Own(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.weight = nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(torch.relu(self.twice(x)))
        x = self.own(x).unsqueeze(1)
        x = self.attention(x, x, x)[0].squeeze(1)
        return nn.functional.linear(x, self.weight)


class Own(nn.Linear):
    pass


class OnlyTanh(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class Positions(nn.Module):
    """Whole numbers that are added up before they become anything that has a range."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.linear = nn.Embedding(64, 16), nn.Linear(16, 3)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.linear(self.embedding(ids + ids.ne(0).cumsum(1)).mean(1))
        return y


class Double(nn.Module):
    """A layer in a type that torchao has no range for."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.double()).float()


class Weighted(nn.Module):
    """A product of two activations, neither of which is a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(2, 256)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.embedding((x[:1, 0] > 0).long()).view(16, 16)
        return nn.functional.linear(x, weight)


def quantised(module: nn.Module) -> tuple[NamedModule, Tensor]:
    """A module after PTQ, before it is compiled, and what it gives for a batch."""
    named = NamedModule(module.eval(), ["x"], ["y"]).eval()
    example = [torch.from_numpy(example_batch(VECTOR)["x"])]
    with compiling():
        result = quantized_module(named, VECTOR, repeated(example), random_samples(VECTOR, 64))
        return result, result(torch.from_numpy(random_batch(VECTOR, 9)["x"]))[0]


class TestModels:
    def test_every_layer_is_quantised_with_weights_of_its_own(self) -> None:
        module, actual = quantised(Layers())
        products = layers(module, "aten.linear.default")
        assert len(products) == 6
        for node in products:
            quantized = [str(argument.target) for argument in node.args[:2]]
            assert quantized == [
                "quantized_decomposed.dequantize_per_tensor.default",
                "quantized_decomposed.dequantize_per_channel.default",
            ]
        # Inductor takes a product for int8 only if nothing else uses its weights.
        assert len(layers(module, "quantized_decomposed.dequantize_per_channel.default")) == 6
        with torch.no_grad():
            expected = Layers()(torch.from_numpy(random_batch(VECTOR, 9)["x"]))
        torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.2 * float(expected.std()))

    @pytest.mark.parametrize(
        ("module", "sentence"),
        [
            (OnlyTanh(), "the model has none; use --format onnx for int8, or --precision bf16"),
            (Weighted(), "the model has none; use --format onnx for int8, or --precision bf16"),
            (Double(), r"^torchao cannot quantise the model: .*float64; use --format torchscript or --format onnx"),
        ],
    )
    def test_what_torchao_cannot_quantise_is_refused(self, tmp_path: Path, module: nn.Module, sentence: str) -> None:
        with pytest.raises(ConversionError, match=sentence) as caught:
            convert(module.eval(), VECTOR, tmp_path, combination=INT8, calibration=random_samples(VECTOR, 4))
        assert "\n" not in str(caught.value)
        assert list(tmp_path.iterdir()) == []

    def test_a_compiler_that_makes_no_int8_of_it_is_found_out(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("export.pt2._INT8_KERNELS", (b"a kernel that no compiler makes",))
        monkeypatch.setattr("torch._inductor.aoti_compile_and_package", lambda *_, package_path, **__: package_path)
        monkeypatch.setattr("export.pt2.rewritten", lambda package, change: change("model.cpp", b"qlinear") or b"")
        with pytest.raises(ConversionError, match="would compute int8 in fp32; use --format torchscript"):
            convert(nn.Linear(16, 16).eval(), VECTOR, tmp_path, combination=INT8, calibration=random_samples(VECTOR, 4))
        assert list(tmp_path.iterdir()) == []


class TestCalibration:
    def test_without_samples_it_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match=r"^int8 pt2 needs calibration data; give --calibration"):
            convert(nn.Linear(16, 16).eval(), VECTOR, tmp_path, combination=INT8)

    def test_a_checkpoint_that_names_no_data_is_refused(self, exported: Exported, tmp_path: Path) -> None:
        prepared: Prepared = prepare(Source(path=exported.options.source))
        with pytest.raises(ConversionError, match=r"^int8 pt2 needs calibration data; give --calibration"):
            convert_and_check(prepared, INT8, tmp_path)

    @pytest.mark.parametrize("sample", [{"other": np.zeros(16, np.float32)}, {"x": np.zeros(3, np.float32)}, {}])
    def test_samples_that_do_not_fit_are_refused(self, tmp_path: Path, sample: dict[str, np.ndarray]) -> None:
        with pytest.raises(
            ConversionError, match=r"the model cannot be calibrated: .*check that the calibration samples"
        ):
            convert(nn.Linear(16, 16).eval(), VECTOR, tmp_path, combination=INT8, calibration=[sample])


def test_without_torchao_an_export_says_how_to_get_it(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torchao" else found(name))
    with pytest.raises(ConversionError, match=r"torchao, which is not installed here; run `pip install 'torchport"):
        export_archive(exported.options)
