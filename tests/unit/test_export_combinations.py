"""Combinations: what is offered, and a sentence with a remedy for everything else."""

import itertools

import pytest
import torch

from export import combinations
from export.combinations import METHODS, Combination, allowed, refusal
from handlers.artifact import DEVICES, FORMATS, PRECISIONS

EVERYTHING = [
    Combination(format=format, precision=precision, device=device)
    for format, precision, device in itertools.product(FORMATS, PRECISIONS, DEVICES)
]


@pytest.fixture(autouse=True)
def _new_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """One with which everything can be done."""
    monkeypatch.setattr(combinations, "TORCH", (2, 13))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU and the libraries for it."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(combinations, "_has_cuda_provider", lambda: True)


def test_the_table_is_that_of_the_documentation() -> None:
    offered = {device: [f"{each.format} {each.precision}" for each in allowed(device)] for device in DEVICES}
    assert offered == {
        "cpu": [
            *("torchscript fp32", "torchscript bf16", "torchscript int8"),
            *("onnx fp32", "onnx int8"),
            *("pt2 fp32", "pt2 bf16", "pt2 int8"),
            *("eager fp32", "eager bf16"),
        ],
        "cuda": [
            *("torchscript fp32", "torchscript fp16", "torchscript bf16"),
            *("onnx fp32", "onnx fp16"),
            *("pt2 fp32", "pt2 fp16", "pt2 bf16"),
            *("eager fp32", "eager fp16", "eager bf16"),
        ],
    }


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("asked", EVERYTHING, ids=str)
def test_what_is_allowed_is_not_refused_and_the_rest_is_with_a_remedy(asked: Combination) -> None:
    sentence = refusal(asked)
    if asked in allowed(asked.device):
        assert sentence is None
    else:
        assert sentence is not None
        assert "; use --" in sentence
        assert "\n" not in sentence


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("asked", EVERYTHING, ids=str)
def test_a_remedy_is_itself_offered(asked: Combination) -> None:
    """Following the advice for a precision must not lead to the next refusal."""
    sentence = refusal(asked) or ""
    for precision in PRECISIONS:
        if f"--precision {precision}" in sentence.partition(";")[2] and "--format" not in sentence:
            assert Combination(format=asked.format, precision=precision, device=asked.device) in allowed(asked.device)


@pytest.mark.parametrize("asked", allowed("cuda"), ids=str)
def test_cuda_without_a_gpu_is_refused(asked: Combination, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "finds none on this machine; use --device cpu" in str(refusal(asked))


def test_onnx_on_cuda_needs_the_provider(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    asked = Combination(format="onnx", precision="fp32", device="cuda")
    assert "no CUDA provider; install onnxruntime-gpu" in str(refusal(asked))
    assert refusal(Combination(format="pt2", precision="fp32", device="cuda")) is None


@pytest.mark.parametrize(
    ("release", "refused"),
    [((2, 9), ["fp32", "bf16", "int8"]), ((2, 11), ["int8"]), ((2, 12), ["int8"]), ((2, 13), []), ((3, 0), [])],
)
def test_pt2_is_for_releases_of_torch_that_can_do_it(
    monkeypatch: pytest.MonkeyPatch, release: tuple[int, int], refused: list[str]
) -> None:
    monkeypatch.setattr(combinations, "TORCH", release)
    asked = {
        precision: refusal(Combination(format="pt2", precision=precision)) for precision in ("fp32", "bf16", "int8")
    }
    assert [precision for precision, sentence in asked.items() if sentence is not None] == refused
    for sentence in filter(None, asked.values()):
        assert f" or newer, and this is {torch.__version__}; use --format torchscript or --format onnx" in sentence
    assert refusal(Combination(format="onnx", precision="int8")) is None


def test_int8_pt2_needs_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Combination(format="pt2", precision="int8")
    assert refusal(asked) is None
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "torchao, which is not installed here; run `pip install 'torchport[pt2e]'`" in str(refusal(asked))
    assert refusal(Combination(format="pt2", precision="bf16")) is None
    assert "torchao" not in str(refusal(Combination(format="pt2", precision="int8", device="cuda")))


def test_int8_pt2_is_made_for_x86_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    sentence = str(refusal(Combination(format="pt2", precision="int8")))
    assert "kernels for x86 processors, and this machine's is aarch64; use --format torchscript" in sentence
    assert refusal(Combination(format="torchscript", precision="int8")) is None


@pytest.mark.parametrize("format", FORMATS)
def test_only_torchscript_is_scripted(format: str) -> None:
    sentence = refusal(Combination(format=format, precision="fp32"), method="script")
    if format == "torchscript":
        assert sentence is None
    else:
        assert "--method script is a way to make TorchScript" in str(sentence)


@pytest.mark.parametrize(
    ("fields", "method", "what"),
    [
        ({"format": "tflite"}, "trace", "format 'tflite' is not known; choose one of: torchscript, onnx, pt2, eager"),
        ({"precision": "int4"}, "trace", "precision 'int4' is not known"),
        ({"device": "tpu"}, "trace", "device 'tpu' is not known"),
        ({}, "guess", f"method 'guess' is not known; choose one of: {', '.join(METHODS)}"),
    ],
)
def test_an_unknown_word_is_answered_with_the_known_ones(fields: dict[str, str], method: str, what: str) -> None:
    asked = Combination(**{"format": "onnx", "precision": "fp32", **fields})
    assert what in str(refusal(asked, method=method))
