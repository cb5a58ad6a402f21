"""Eager artifacts: weights that load safely, all the source that the model needs, and nothing else."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from export.combinations import Combination
from export.convert import convert, convert_in_fresh_process
from export.eager import write_source, write_weights
from export.errors import ConversionError
from export.inputs import random_batch
from handlers.artifact import ModuleSource
from handlers.backend import build_backend
from handlers.signature import Signature

SIGNATURE = {
    "format_version": 1,
    "task": "tensor",
    "inputs": [{"name": "x", "dtype": "float32", "shape": ["batch", 4]}],
    "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 2]}],
}
PACKAGE = {
    "zoo_of_a_test/__init__.py": "",
    "zoo_of_a_test/models/__init__.py": "# the package's own note\n",
    "zoo_of_a_test/models/net.py": (
        "import yaml, rich\n"
        "from torch import nn\n"
        "from ..layers import Doubled\n"
        "def build(width):\n"
        "    from zoo_of_a_test import late\n"
        "    return nn.Sequential(nn.Linear(4, width), Doubled(), nn.Linear(width, 2))\n"
    ),
    "zoo_of_a_test/layers.py": (
        "from torch import nn\n"
        "import helper_of_a_test\n"
        "class Doubled(nn.Module):\n"
        "    def forward(self, x):\n"
        "        from zoo_of_a_test import later\n"
        "        return helper_of_a_test.double(x)\n"
    ),
    "zoo_of_a_test/late.py": "",
    "zoo_of_a_test/later.py": "",
    "zoo_of_a_test/unused.py": "",
    "helper_of_a_test.py": "def double(x): return 2 * x\n",
}
FACTORY = "zoo_of_a_test.models.net:build"


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a package of the user's own, on the import path."""
    folder = tmp_path / "zoo"
    for path, text in PACKAGE.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    (folder / "signature.json").write_text(json.dumps(SIGNATURE))
    torch.manual_seed(0)
    torch.save(nn.Sequential(nn.Linear(4, 8), nn.Identity(), nn.Linear(8, 2)).state_dict(), folder / "weights.pt")
    monkeypatch.syspath_prepend(str(folder))
    return folder


def export(zoo: Path, folder: Path, precision: str = "fp32") -> Signature:
    folder.mkdir()
    artifact = convert_in_fresh_process(
        zoo / "weights.pt",
        folder,
        format="eager",
        precision=precision,
        factory=FACTORY,
        signature_file=zoo / "signature.json",
        config={"width": 8},
    )
    return Signature.from_document(SIGNATURE).with_artifact(artifact)


def test_it_holds_the_source_of_all_that_was_imported_and_the_versions_of_the_rest(zoo: Path, tmp_path: Path) -> None:
    signature = export(zoo, tmp_path / "out")
    source = tmp_path / "out" / "source"
    found = {path.relative_to(source).as_posix(): path.read_text() for path in source.rglob("*") if path.is_file()}
    assert found == {path: text for path, text in PACKAGE.items() if "unused" not in path}
    artifact = signature.artifact
    assert artifact is not None
    assert artifact.module == ModuleSource(factory=FACTORY, config={"width": 8})
    # torch and PyYAML come with every archive's handlers.
    assert list(artifact.requires) == ["rich"]


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 5e-2)])
def test_it_computes_the_same_where_the_package_is_not_installed(
    zoo: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    folder = tmp_path / "out"
    signature = export(zoo, folder, precision)
    batch = random_batch(signature, 3)
    np.savez(tmp_path / "batch.npz", **batch)
    (tmp_path / "signature.json").write_text(json.dumps(signature.to_document()))
    script = (
        "import json, sys, numpy as np; from pathlib import Path\n"
        "from handlers.backend import build_backend; from handlers.signature import Signature\n"
        "signature = Signature.from_document(json.loads(Path('signature.json').read_text()))\n"
        "outputs = build_backend(signature, Path('out'), threads=1).run(dict(np.load('batch.npz')))\n"
        "np.save('y.npy', outputs['y'])\n"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=True,
    )
    module = nn.Sequential(nn.Linear(4, 8), nn.Identity(), nn.Linear(8, 2))
    module.load_state_dict(torch.load(zoo / "weights.pt", weights_only=True))
    with torch.no_grad():
        expected = module[2](2 * module[0](torch.from_numpy(batch["x"]))).numpy()
    actual = np.load(tmp_path / "y.npy")
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance)


def test_bf16_halves_the_weights(zoo: Path, tmp_path: Path) -> None:
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        artifact = export(zoo, tmp_path / precision, precision).artifact
        assert artifact is not None
        state = torch.load(tmp_path / precision / artifact.file, weights_only=True)
        assert {value.dtype for value in state.values()} == {dtype}


def test_torchports_own_models_travel_too(checkpoint: Path, signature: Signature, tmp_path: Path) -> None:
    artifact = convert_in_fresh_process(checkpoint, tmp_path, format="eager")
    names = {path.relative_to(tmp_path / "source").as_posix() for path in (tmp_path / "source").rglob("*.py")}
    assert {"models/__init__.py", "models/convnet.py", "models/blocks.py"} <= names
    assert {name.partition("/")[0] for name in names} == {"models"}
    assert artifact.requires == {}
    assert build_backend(signature.with_artifact(artifact), tmp_path, threads=1).device == "cpu"


def test_a_factory_of_a_script_or_notebook_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"script or notebook, .*; move it into a module of its own"):
        convert_in_fresh_process(tmp_path / "w.pt", tmp_path, format="eager", factory="__main__:build")


def test_a_factory_without_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConversionError, match=r"holds the factory builtins:dict, so .*; move it into a module of its own"
    ):
        write_source("builtins:dict", tmp_path)
    assert not (tmp_path / "source").exists()


def test_a_module_called_like_one_of_the_archive_is_refused(zoo: Path, tmp_path: Path) -> None:
    (zoo / "zoo_of_a_test" / "layers.py").write_text(
        PACKAGE["zoo_of_a_test/layers.py"].replace("import helper_of_a_test", "import entry as helper_of_a_test")
    )
    (zoo / "entry.py").write_text(PACKAGE["helper_of_a_test.py"])
    with pytest.raises(ConversionError, match="imports entry, and archives have a 'entry' of their own; rename"):
        export(zoo, tmp_path / "out")
    assert not (tmp_path / "out" / "source").exists()


def test_views_are_written_without_what_they_look_at(tmp_path: Path) -> None:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(torch.zeros(1000, 2)[:2])
    write_weights(module, tmp_path / "w.pt")
    assert (tmp_path / "w.pt").stat().st_size < 4000
    assert torch.load(tmp_path / "w.pt", weights_only=True).keys() == module.state_dict().keys()


def test_state_that_is_no_tensor_is_refused(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def get_extra_state(self) -> object:
            return {"a": 1}

        def set_extra_state(self, state: object) -> None:
            del state

    with pytest.raises(ConversionError, match="'_extra_state', which is no tensor"):
        write_weights(Odd(), tmp_path / "w.pt")


def test_an_origin_must_be_named(tmp_path: Path) -> None:
    signature = Signature.from_document(SIGNATURE)
    with pytest.raises(ConversionError, match="built by its factory"):
        convert(nn.Linear(4, 2), signature, tmp_path, combination=Combination(format="eager", precision="fp32"))
