"""Conversion: right numbers at any size, the same bytes everywhere, and nothing of the exporting machine."""

import getpass
import json
import os
import resource
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from export.calibration import write_calibration
from export.combinations import Combination
from export.compiler import conversion_error, first_line
from export.convert import convert, convert_in_fresh_process
from export.errors import ConversionError
from export.inputs import random_batch, random_samples
from handlers.artifact import Artifact
from handlers.backend import build_backend
from handlers.calling import NamedModule
from handlers.signature import Signature
from handlers.tensors import TensorBatch

KINDS = [("torchscript", "trace"), ("torchscript", "script"), ("onnx", "trace"), ("eager", "trace")]
USERS_MODULE = """
import atexit
from models.convnet import build_conv_classifier

def build():
    # What a user's module may do to stdout must not hide the answer.
    print("loading weights... ", end="")
    atexit.register(print, "bye")
    return build_conv_classifier(in_channels=1, num_classes=3, widths=[4])
"""


def run(signature: Signature, artifact: Artifact, folder: Path, batch: TensorBatch) -> dict[str, np.ndarray]:
    return build_backend(signature.with_artifact(artifact), folder, threads=1).run(batch)


def expected(module: nn.Module, signature: Signature, batch: TensorBatch) -> dict[str, np.ndarray]:
    """What the module itself computes."""
    names = [spec.name for spec in signature.outputs]
    named = NamedModule(module.eval(), [spec.name for spec in signature.inputs], names)
    with torch.no_grad():
        outputs = named(*(torch.from_numpy(np.array(batch[spec.name])) for spec in signature.inputs))
    return {name: output.numpy() for name, output in zip(names, outputs, strict=True)}


def assert_close(actual: dict[str, np.ndarray], wanted: dict[str, np.ndarray], tolerance: float = 1e-5) -> None:
    assert actual.keys() == wanted.keys()
    for name, values in wanted.items():
        assert actual[name].dtype == values.dtype
        np.testing.assert_allclose(actual[name], values, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="session")
def converted(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], tuple[Artifact, Path]]:
    """An artifact and its folder by format and method; each is converted once, in a process of its own."""
    made: dict[tuple[str, str], tuple[Artifact, Path]] = {}

    def conversion(format: str, method: str) -> tuple[Artifact, Path]:
        if (format, method) not in made:
            folder = tmp_path_factory.mktemp(f"{format}-{method}")
            made[format, method] = (
                convert_in_fresh_process(checkpoint, folder, format=format, method=method),
                folder,
            )
        return made[format, method]

    return conversion


def raw_bytes(path: Path) -> Iterator[bytes]:
    """A file as it is, and whatever a zip hides by compressing it."""
    yield path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield archive.read(name)


def written(folder: Path) -> dict[str, bytes]:
    """Everything that a conversion left, by path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and (path.name.startswith("model") or "source" in path.parts)
    }


@pytest.mark.parametrize(("format", "method"), KINDS)
class TestArtifacts:
    @pytest.mark.parametrize("size", [1, 2, 3, 7, 32, 65])
    def test_they_compute_what_the_module_computes(
        self,
        converted: Callable[[str, str], tuple[Artifact, Path]],
        module: nn.Module,
        signature: Signature,
        format: str,
        method: str,
        size: int,
    ) -> None:
        batch = random_batch(signature, size)
        artifact, folder = converted(format, method)
        assert_close(run(signature, artifact, folder, batch), expected(module, signature, batch))

    def test_they_hold_nothing_of_the_exporting_machine(
        self, converted: Callable[[str, str], tuple[Artifact, Path]], checkpoint: Path, format: str, method: str
    ) -> None:
        artifact, folder = converted(format, method)
        repository = Path(__file__).parents[2]
        secrets = [str(path) for path in (repository, checkpoint.parent, Path(torch.__file__).parent.parent)]
        secrets += ["/tmp/", "/home/", "site-packages", "torchport-export", socket.gethostname()]
        secrets += ["def forward(self, image: Tensor)", "# [B, widths[-1]"]  # lines of the model's source
        if getpass.getuser() != "root":  # a word of its own in any program
            secrets.append(getpass.getuser())
        for content in raw_bytes(folder / artifact.file):
            for secret in secrets:
                assert secret.encode() not in content, secret
            # TorchScript names its own records code/NAME.py; nobody else may name a source file.
            if format == "onnx":
                assert b".py" not in content


@pytest.mark.parametrize(("format", "method"), KINDS)
def test_another_folder_another_file_name_and_another_process_give_the_same_bytes(
    converted: Callable[[str, str], tuple[Artifact, Path]],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
    method: str,
) -> None:
    elsewhere = tmp_path / "another folder"
    elsewhere.mkdir()
    copy = Path(shutil.copy(checkpoint, elsewhere / "weights of mine.pt"))
    os.utime(copy, (1e9, 1e9))
    for variable, value in (("TZ", "Pacific/Auckland"), ("PYTHONHASHSEED", "77"), ("LC_ALL", "C")):
        monkeypatch.setenv(variable, value)
    artifact = convert_in_fresh_process(copy, elsewhere, format=format, method=method)
    first, folder = converted(format, method)
    assert artifact == first
    assert written(elsewhere) == written(folder)
    # One file: no weights beside it.
    assert [path.name for path in elsewhere.glob("model*")] == [artifact.file]


@pytest.mark.parametrize(("format", "precision"), [("torchscript", "bf16"), ("torchscript", "int8"), ("onnx", "int8")])
def test_reduced_precisions_give_the_same_bytes_again(
    checkpoint: Path, signature: Signature, tmp_path: Path, format: str, precision: str
) -> None:
    write_calibration(tmp_path / "calibration.npz", random_samples(signature, 8))
    contents = []
    for name in ("first", "second folder"):
        (tmp_path / name).mkdir()
        convert_in_fresh_process(
            checkpoint,
            tmp_path / name,
            format=format,
            precision=precision,
            calibration=tmp_path / "calibration.npz",
        )
        contents.append(written(tmp_path / name))
    assert contents[0] == contents[1]


class Given(nn.Module):
    """Two inputs, two outputs, in one of the forms that a module may give."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def compute(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(first) + second, torch.tanh(first - second)


class GivesTuple(Given):
    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        return self.compute(first, second)


class GivesMapping(Given):
    def forward(self, first: Tensor, second: Tensor) -> dict[str, Tensor]:
        total, difference = self.compute(first, second)
        # In another order than the signature's, and with one more.
        return {"difference": difference, "ignored": first, "total": total}


@dataclass
class Outputs:
    difference: Tensor
    total: Tensor
    hidden: Tensor | None = None


class GivesDataclass(Given):
    def forward(self, first: Tensor, second: Tensor) -> Outputs:
        total, difference = self.compute(first, second)
        return Outputs(difference, total)


class TakesOtherNames(Given):
    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.compute(a, b)


class SwapsArguments(Given):
    """By keyword its arguments are right, by position they are not."""

    def forward(self, second: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        return self.compute(first, second)


FORMS: list[type[Given]] = [GivesTuple, GivesMapping, GivesDataclass, TakesOtherNames, SwapsArguments]
PAIR = Signature.from_document(
    {
        "format_version": 1,
        "task": "tensor",
        "inputs": [
            {"name": "first", "dtype": "float32", "shape": ["batch", 4]},
            {"name": "second", "dtype": "float32", "shape": ["batch", 4]},
        ],
        "outputs": [
            {"name": "total", "dtype": "float32", "shape": ["batch", 4]},
            {"name": "difference", "dtype": "float32", "shape": ["batch", 4]},
        ],
    }
)


def combination(format: str, precision: str = "fp32") -> Combination:
    return Combination(format=format, precision=precision)


class TestForms:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(("format", "method"), [("torchscript", "trace"), ("onnx", "trace")])
    @pytest.mark.parametrize("size", [1, 5])
    def test_inputs_and_outputs_of_any_form(
        self, tmp_path: Path, form: type[Given], format: str, method: str, size: int
    ) -> None:
        artifact = convert(form().eval(), PAIR, tmp_path, combination=combination(format), method=method)
        batch = random_batch(PAIR, size)
        assert_close(run(PAIR, artifact, tmp_path, batch), expected(form(), PAIR, batch))

    @pytest.mark.parametrize("form", [GivesTuple, GivesMapping, TakesOtherNames, SwapsArguments])
    @pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
    def test_a_scripted_module_is_called_alike(self, tmp_path: Path, form: type[Given], precision: str) -> None:
        artifact = convert(
            form().eval(), PAIR, tmp_path, combination=combination("torchscript", precision), method="script"
        )
        batch = random_batch(PAIR, 3)
        tolerance = 1e-5 if precision == "fp32" else 5e-2
        assert_close(run(PAIR, artifact, tmp_path, batch), expected(form(), PAIR, batch), tolerance)

    def test_an_output_that_is_not_there_is_named_with_those_that_are(self, tmp_path: Path) -> None:
        document = PAIR.to_document()
        document["outputs"][0]["name"] = "sum"
        with pytest.raises(ConversionError, match="'sum' is not among those of the model: difference, ignored, total"):
            convert(
                GivesMapping().eval(),
                Signature.from_document(document),
                tmp_path,
                combination=combination("torchscript"),
            )

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"dtype": "int64"}, "is float32, and the signature says int64"),
            ({"shape": ["batch", 5]}, r"has the shape \[3, 4\] for an example, and the signature says \['batch', 5\]"),
            ({"shape": ["batch"]}, r"has the shape \[3, 4\]"),
        ],
    )
    def test_outputs_unlike_the_signature_are_refused(
        self, tmp_path: Path, change: dict[str, Any], message: str
    ) -> None:
        document = PAIR.to_document()
        document["outputs"][1] |= change
        with pytest.raises(
            ConversionError, match=f"the model's output 'difference' {message}.*; correct the signature"
        ):
            convert(GivesTuple(), Signature.from_document(document), tmp_path, combination=combination("onnx"))

    def test_float64_that_lower_precision_cannot_keep_is_refused_as_such(self, tmp_path: Path) -> None:
        document = PAIR.to_document()
        document["outputs"][1]["dtype"] = "float64"
        with pytest.raises(ConversionError, match=r"come out as float32, .* 'difference' is float64; use --precision"):
            convert(
                GivesTuple(),
                Signature.from_document(document),
                tmp_path,
                combination=combination("torchscript", "bf16"),
            )

    def test_no_source_to_script_is_said_without_addresses_and_with_a_remedy(self, tmp_path: Path) -> None:
        with pytest.raises(ConversionError, match=r"^[^@]*use --method trace$") as caught:
            convert(GivesDataclass(), PAIR, tmp_path, combination=combination("torchscript"), method="script")
        assert " at 0x" not in str(caught.value)

    def test_inputs_that_the_model_cannot_take_are_said_before_any_compiler_speaks(self, tmp_path: Path) -> None:
        document = PAIR.to_document()
        document["inputs"][0]["shape"] = ["batch", 3]
        with pytest.raises(
            ConversionError, match=r"^the model fails in fp32 on an example .*mat1 and mat2.*; correct the"
        ):
            convert(GivesTuple(), Signature.from_document(document), tmp_path, combination=combination("onnx"))


class Encoder(nn.Module):
    """Token ids of any length, and a mask that one may leave out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.encoder(self.embedding(input_ids), src_key_padding_mask=mask == 0)
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        hidden = hidden * weights
        return {"logits": self.head(hidden.sum(1) / weights.sum(1)), "hidden": hidden}


def encoder_signature(*, with_mask: bool) -> Signature:
    ids = {"name": "input_ids", "dtype": "int64", "shape": ["batch", "length"], "minimum": 0, "maximum": 19}
    mask = {"name": "attention_mask", "dtype": "int64", "shape": ["batch", "length"], "minimum": 1, "maximum": 1}
    return Signature.from_document(
        {
            "format_version": 1,
            "task": "tensor",
            "inputs": [{**ids, "padding": 0}, {**mask, "padding": 0}] if with_mask else [ids],
            "axes": {"length": {"maximum": 24}},
            "outputs": [
                {"name": "logits", "dtype": "float32", "shape": ["batch", 3]},
                {"name": "hidden", "dtype": "float32", "shape": ["batch", "length", 16]},
            ],
        }
    )


@pytest.mark.parametrize(
    ("format", "precision", "tolerance"),
    [
        ("torchscript", "fp32", 1e-5),
        ("torchscript", "bf16", 5e-2),
        ("torchscript", "int8", 2e-1),
        ("onnx", "fp32", 1e-5),
        ("onnx", "int8", 2e-1),
    ],
)
@pytest.mark.parametrize("with_mask", [True, False])
def test_any_batch_and_length_with_or_without_a_mask(
    tmp_path: Path, format: str, precision: str, tolerance: float, with_mask: bool
) -> None:
    signature = encoder_signature(with_mask=with_mask)
    artifact = convert(Encoder().eval(), signature, tmp_path, combination=combination(format, precision))
    assert (artifact.precision, artifact.device, artifact.requires) == (precision, "cpu", {})
    backend = build_backend(signature.with_artifact(artifact), tmp_path, threads=1)
    batches = [random_batch(signature, 7)]
    batches += [random_batch(signature, size, sizes={"length": n}) for size in (1, 2) for n in (1, 2, 24)]
    # PyTorch's short cut through its encoder layers rounds otherwise.
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for batch in batches:
            assert_close(backend.run(batch), expected(Encoder(), signature, batch), tolerance)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_the_short_cut_of_pytorchs_encoder_is_on_again_afterwards(tmp_path: Path) -> None:
    convert(GivesTuple().eval(), PAIR, tmp_path, combination=combination("torchscript"))
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_users_own_module_is_found_where_the_user_stands_and_may_print(
    module: nn.Module,
    signature: Signature,
    signature_document: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "module_of_a_user.py").write_text(USERS_MODULE)
    (tmp_path / "signature.json").write_text(json.dumps(signature_document))
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # what an interactive Python has for the current folder
    artifact = convert_in_fresh_process(
        Path("weights.pt"),
        Path("out"),
        format="torchscript",
        method="script",
        factory="module_of_a_user:build",
        signature_file=Path("signature.json"),
        config={},
    )
    batch = random_batch(signature, 3)
    actual = run(signature, artifact, tmp_path / "out", batch)
    assert_close(actual, expected(module, signature, batch))


def test_a_process_that_dies_gives_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "killer.py").write_text(
        "import os, signal\ndef build(**config): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with pytest.raises(ConversionError, match=r"^the conversion to torchscript died with exit code -9: .*$"):
            convert_in_fresh_process(checkpoint, tmp_path, format="torchscript", method="trace", factory="killer:build")


@pytest.mark.parametrize("format", ["torchscript", "onnx", "eager"])
def test_a_full_disk_gives_one_sentence(checkpoint: Path, tmp_path: Path, format: str) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(ConversionError, match=r"^the model cannot be converted to .*: .*File too large$"):
            convert_in_fresh_process(checkpoint, tmp_path, format=format, method="trace")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_the_process_refuses_is_said_as_it_says_it(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"^there is no checkpoint at .*nope\.pt; check the path$"):
        convert_in_fresh_process(tmp_path / "nope.pt", tmp_path, format="onnx", method="trace")


class BranchesOnValues(nn.Module):
    """Python that no compiler of ours takes: control flow on values."""

    def forward(self, image: Tensor) -> Tensor:
        rows = [row * 2 for row in image if float(row.sum()) > 0]
        return torch.stack(rows or [image[0]]).mean(dim=(0, 1, 2), keepdim=False)[None, :3].expand(len(image), 3) * 1.0


@pytest.mark.parametrize(
    ("format", "method", "remedy"),
    [
        ("torchscript", "script", "use --method trace"),
        ("onnx", "trace", "use --format eager"),
        ("pt2", "trace", "use --format eager"),
    ],
)
def test_a_model_that_cannot_be_converted_gives_one_sentence_with_a_remedy(
    signature: Signature, tmp_path: Path, format: str, method: str, remedy: str
) -> None:
    how = "script" if format == "torchscript" else "torch.export"
    with pytest.raises(ConversionError, match=rf"^the model cannot be converted to {format} \({how}\): \S") as caught:
        convert(BranchesOnValues().eval(), signature, tmp_path, combination=combination(format), method=method)
    assert "\n" not in str(caught.value)
    assert remedy in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("format", "precision", "remedy"),
    [
        ("pt2", "fp32", "use --format torchscript or --format eager"),
        ("pt2", "int8", "use --format torchscript or --format onnx, or --precision fp32"),
        ("onnx", "int8", "use --format torchscript, or --precision fp32"),
        ("torchscript", "int8", "use --format onnx, or --precision fp32"),
    ],
)
def test_the_remedy_is_offered_in_the_precision_asked_for(format: str, precision: str, remedy: str) -> None:
    error = conversion_error(TypeError("no kernel"), format=format, method="its compiler", precision=precision)
    assert str(error) == f"the model cannot be converted to {format} (its compiler): no kernel; {remedy}"


def test_an_error_without_words_says_where_it_was_raised() -> None:
    def fuse() -> None:
        raise AssertionError

    with pytest.raises(AssertionError) as caught:
        fuse()
    assert first_line(caught.value) == "AssertionError in fuse"
    assert first_line(AssertionError()) == "AssertionError"


def test_what_is_not_offered_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="fp16 on a CPU is not offered"):
        convert_in_fresh_process(tmp_path / "nope.pt", tmp_path, format="onnx", precision="fp16")
