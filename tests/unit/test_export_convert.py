"""Conversion: right numbers at any batch size, the same bytes everywhere, and nothing of the exporting machine."""

import getpass
import os
import resource
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from export.archive import open_archive
from export.convert import ONNX_OPSET, convert, convert_in_fresh_process
from export.errors import ConversionError
from export.gates import Reference
from export.inputs import random_batch
from export.pipeline import ExportReport
from handlers.backend import build_backend
from handlers.signature import Artifact, Signature

KINDS = [("torchscript", "trace"), ("torchscript", "script"), ("onnx", "trace")]
USERS_MODULE = """
import atexit
from models.convnet import build_conv_classifier

def build():
    # What a user's module may do to stdout must not hide the answer.
    print("loading weights... ", end="")
    atexit.register(print, "bye")
    return build_conv_classifier(in_channels=1, num_classes=3, widths=[4])
"""


@pytest.fixture(scope="session")
def converted(
    checkpoint: Path, exported: Callable[[str], ExportReport], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """The artifact of a real conversion by format and method; each is made once."""
    made: dict[tuple[str, str], Path] = {}

    def artifact(format: str, method: str) -> Path:
        if (format, method) not in made:
            folder = tmp_path_factory.mktemp(f"{format}-{method}")
            if method == "script":
                made[format, method] = (
                    folder / convert_in_fresh_process(checkpoint, folder, format=format, method=method).file
                )
            else:
                open_archive(exported(format).archive).extract(folder)
                made[format, method] = folder / f"model.{'pt' if format == 'torchscript' else 'onnx'}"
        return made[format, method]

    return artifact


def run(path: Path, signature: Signature, format: str, batch: np.ndarray) -> np.ndarray:
    artifact = Artifact(format=format, precision="fp32", file=path.name)
    return build_backend(signature.with_artifact(artifact), path.parent, threads=1).run(batch)


def raw_bytes(path: Path) -> Iterator[bytes]:
    """A file as it is, and whatever a zip hides by compressing it."""
    yield path.read_bytes()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield archive.read(name)


@pytest.mark.parametrize(("format", "method"), KINDS)
class TestArtifacts:
    @pytest.mark.parametrize("size", [1, 2, 3, 7, 32, 65])
    def test_they_compute_what_the_module_computes(
        self,
        converted: Callable[[str, str], Path],
        module: torch.nn.Module,
        signature: Signature,
        format: str,
        method: str,
        size: int,
    ) -> None:
        batch = random_batch(signature, size)
        actual = run(converted(format, method), signature, format, batch)
        np.testing.assert_allclose(actual, Reference(module).run(batch), rtol=1e-4, atol=1e-5)

    def test_they_hold_nothing_of_the_exporting_machine(
        self, converted: Callable[[str, str], Path], checkpoint: Path, format: str, method: str
    ) -> None:
        path = converted(format, method)
        repository = Path(__file__).parents[2]
        secrets = [str(path) for path in (repository, checkpoint.parent, Path(torch.__file__).parent.parent)]
        secrets += ["/tmp/", "/home/", "site-packages", "torchport-export", socket.gethostname()]
        secrets += ["def forward(self, image: Tensor)", "# [B, widths[-1]"]  # lines of the model's source
        if getpass.getuser() != "root":  # a word of its own in any program
            secrets.append(getpass.getuser())
        for content in raw_bytes(path):
            for secret in secrets:
                assert secret.encode() not in content, secret
            # TorchScript names its own records code/NAME.py; nobody else may name a source file.
            if format == "onnx":
                assert b".py" not in content

    def test_torchscript_has_no_debug_records(
        self, converted: Callable[[str, str], Path], format: str, method: str
    ) -> None:
        path = converted(format, method)
        if format == "onnx":
            assert not zipfile.is_zipfile(path)
        else:
            with zipfile.ZipFile(path) as archive:
                assert not [name for name in archive.namelist() if "debug" in name]


@pytest.fixture(scope="module")
def graph(converted: Callable[[str, str], Path]) -> onnx.ModelProto:
    return onnx.load(converted("onnx", "trace"), load_external_data=False)


class TestOnnx:
    def test_names_and_axes_are_those_of_the_signature(self, graph: onnx.ModelProto) -> None:
        (given,), (gives,) = graph.graph.input, graph.graph.output
        assert (given.name, gives.name) == ("image", "logits")
        axes = given.type.tensor_type.shape.dim
        assert [axis.dim_param or axis.dim_value for axis in axes] == ["batch", 1, 8, 8]
        assert gives.type.tensor_type.shape.dim[0].dim_param == "batch"

    def test_the_weights_are_inside_and_the_opset_is_fixed(self, graph: onnx.ModelProto) -> None:
        assert graph.graph.initializer
        assert not any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in graph.graph.initializer)
        assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [ONNX_OPSET]

    def test_nothing_is_told_of_the_nodes_origin(self, graph: onnx.ModelProto) -> None:
        assert not graph.metadata_props
        assert not [node for node in graph.graph.node if node.metadata_props or node.doc_string]


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
def test_another_folder_another_file_name_and_another_process_give_the_same_bytes(
    converted: Callable[[str, str], Path],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    format: str,
) -> None:
    elsewhere = tmp_path / "another folder"
    elsewhere.mkdir()
    copy = Path(shutil.copy(checkpoint, elsewhere / "weights of mine.pt"))
    os.utime(copy, (1e9, 1e9))
    for variable, value in (("TZ", "Pacific/Auckland"), ("PYTHONHASHSEED", "77"), ("LC_ALL", "C")):
        monkeypatch.setenv(variable, value)
    artifact = convert_in_fresh_process(copy, elsewhere, format=format, method="trace")
    assert (elsewhere / artifact.file).read_bytes() == converted(format, "trace").read_bytes()
    # One file: no weights beside it.
    assert [path.name for path in elsewhere.glob("model*")] == [artifact.file]


def test_a_users_own_module_is_found_where_the_user_stands_and_may_print(
    module: torch.nn.Module,
    signature: Signature,
    signature_document: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import json

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
    )
    batch = random_batch(signature, 3)
    actual = run(tmp_path / "out" / artifact.file, signature, "torchscript", batch)
    np.testing.assert_allclose(actual, Reference(module).run(batch), rtol=1e-4, atol=1e-5)


def test_a_process_that_dies_gives_one_sentence(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "killer.py").write_text(
        "import os, signal\ndef build(**config): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        with pytest.raises(ConversionError, match=r"^the conversion to torchscript died with exit code -9: .*$"):
            convert_in_fresh_process(checkpoint, tmp_path, format="torchscript", method="trace", factory="killer:build")


@pytest.mark.parametrize("format", ["torchscript", "onnx"])
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


class NotScriptable(torch.nn.Module):
    """Python that no compiler of ours takes: a generator, and control flow on values."""

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        if float(batch.sum()) > 0:
            return sum(row for row in (yield from batch))  # type: ignore[return-value]
        return batch


@pytest.mark.parametrize(("format", "method"), KINDS)
def test_a_model_that_cannot_be_converted_gives_one_sentence(
    signature: Signature, tmp_path: Path, format: str, method: str
) -> None:
    with pytest.raises(ConversionError, match=rf"^the model cannot be converted to {format} \(") as caught:
        convert(NotScriptable(), signature, random_batch(signature, 3), tmp_path, method=method, format=format)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
