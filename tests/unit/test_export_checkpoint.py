"""Reading of checkpoints: what is right loads exactly, and everything else gets one plain sentence."""

import json
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from export.checkpoint import import_object, load_checkpoint, resolve_checkpoint
from export.errors import CheckpointError
from handlers.digests import file_sha256
from models.checkpoint import FORMAT, FORMAT_VERSION

Content = dict[str, Any]
FACTORY = "brightness_of_a_test:build"


@pytest.fixture
def save(tmp_path: Path) -> Callable[[object], Path]:
    def save(content: object, name: str = "checkpoint.pt", **options: Any) -> Path:
        torch.save(content, tmp_path / name, **options)
        return tmp_path / name

    return save


@pytest.fixture
def signature_file(tmp_path: Path, signature_document: Content) -> Path:
    path = tmp_path / "signature.json"
    path.write_text(json.dumps(signature_document))
    return path


@pytest.fixture
def user_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own, whose factory takes no arguments."""
    (tmp_path / "brightness_of_a_test.py").write_text(
        "from models.convnet import build_conv_classifier\n"
        "def build():\n"
        "    return build_conv_classifier(in_channels=1, num_classes=3, widths=[4])\n"
        "def fails(): raise ValueError('first line\\nsecond line')\n"
        "def leaves(): raise SystemExit(0)\n"
        "def gives_nothing(): pass\n"
        "constant = 3\n"
    )
    (tmp_path / "leaves_when_imported.py").write_text("raise SystemExit(0)")
    monkeypatch.syspath_prepend(str(tmp_path))
    return FACTORY


def refusal(source: Path, **options: Any) -> str:
    """The sentence that refuses a checkpoint."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(source, **options)
    message = str(caught.value)
    assert message
    assert "\n" not in message
    assert len(message) < 600
    return message


class TestWhatLoads:
    def test_a_checkpoint_of_torchport_loads_whole(self, checkpoint: Path, module: torch.nn.Module) -> None:
        loaded = load_checkpoint(checkpoint)
        batch = torch.randn(3, 1, 8, 8)
        with torch.inference_mode():
            torch.testing.assert_close(loaded.module(batch), module(batch), rtol=0, atol=0)
        assert not loaded.module.training
        assert loaded.sha256 == file_sha256(checkpoint)
        assert loaded.factory == "models.convnet:build_conv_classifier"
        assert loaded.config == {"in_channels": 1, "num_classes": 3, "widths": [4]}
        assert loaded.metrics["accuracy"] == 1.0
        assert loaded.evaluation is None
        assert loaded.signature.labels == ("dark", "mid", "bright")
        assert loaded.signature.artifact is None
        assert loaded.record["recipe"] == {"name": "brightness"}

    def test_training_and_export_agree_on_the_format(self, checkpoint_content: Content) -> None:
        assert (checkpoint_content["format"], checkpoint_content["format_version"]) == (FORMAT, FORMAT_VERSION)

    def test_a_run_folder_stands_for_its_checkpoint(self, checkpoint: Path) -> None:
        assert resolve_checkpoint(checkpoint.parent) == checkpoint
        assert load_checkpoint(checkpoint.parent).sha256 == load_checkpoint(checkpoint).sha256

    def test_weights_of_another_precision_become_float32(
        self, checkpoint_content: Content, save: Callable[..., Path]
    ) -> None:
        state = checkpoint_content["state_dict"]
        checkpoint_content["state_dict"] = {name: value.double() for name, value in state.items()}
        loaded = load_checkpoint(save(checkpoint_content)).module
        assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}

    @pytest.mark.parametrize("kind", [dict, OrderedDict])
    def test_a_plain_state_dict_needs_a_factory_and_a_signature(
        self,
        kind: type,
        module: torch.nn.Module,
        save: Callable[..., Path],
        signature_file: Path,
        user_package: str,
    ) -> None:
        path = save(kind(module.state_dict()), "weights.pt")
        needs = "not a torchport checkpoint; for a plain state_dict give --model package.module:factory and --signature"
        assert needs in refusal(path)
        assert needs in refusal(path, factory=user_package)
        assert needs in refusal(path, signature_file=signature_file)

        loaded = load_checkpoint(path, factory=user_package, signature_file=signature_file)
        batch = torch.randn(2, 1, 8, 8)
        with torch.inference_mode():
            torch.testing.assert_close(loaded.module(batch), module(batch), rtol=0, atol=0)
        assert (loaded.metrics, loaded.evaluation, loaded.factory) == ({}, None, user_package)

    def test_a_signature_file_wins_over_the_checkpoint(
        self, checkpoint: Path, signature_document: Content, tmp_path: Path
    ) -> None:
        signature_document["labels"] = ["a", "b", "c"]
        path = tmp_path / "signature.json"
        path.write_text(json.dumps(signature_document))
        assert load_checkpoint(checkpoint, signature_file=path).signature.labels == ("a", "b", "c")


class TestSafetensors:
    @pytest.fixture
    def weights(self, module: torch.nn.Module, tmp_path: Path) -> Path:
        from safetensors.torch import save_file

        save_file(module.state_dict(), tmp_path / "weights.safetensors")
        return tmp_path / "weights.safetensors"

    def test_they_are_the_weights_of_the_module(
        self, weights: Path, module: torch.nn.Module, signature_file: Path, user_package: str
    ) -> None:
        loaded = load_checkpoint(weights, factory=user_package, signature_file=signature_file)
        for name, value in module.state_dict().items():
            assert torch.equal(loaded.module.state_dict()[name], value)
        assert loaded.sha256 == file_sha256(weights)

    def test_they_need_a_factory_and_a_signature(self, weights: Path) -> None:
        assert "not a torchport checkpoint; for a plain state_dict give --model" in refusal(weights)

    def test_damage_is_refused(self, weights: Path, signature_file: Path, user_package: str) -> None:
        content = weights.read_bytes()
        for damaged in (b"", b"text", content[:4], content[:60], content[:-1], b"\xff" * 100):
            weights.write_bytes(damaged)
            message = refusal(weights, factory=user_package, signature_file=signature_file)
            assert "truncated, corrupt or not a safetensors file; fetch a clean copy" in message

    def test_half_precision_becomes_float32(
        self, module: torch.nn.Module, signature_file: Path, user_package: str, tmp_path: Path
    ) -> None:
        from safetensors.torch import save_file

        state = {
            name: value.bfloat16() if value.is_floating_point() else value
            for name, value in module.state_dict().items()
        }
        save_file(state, tmp_path / "half.safetensors")
        loaded = load_checkpoint(tmp_path / "half.safetensors", factory=user_package, signature_file=signature_file)
        assert {parameter.dtype for parameter in loaded.module.parameters()} == {torch.float32}


class TestDoublePrecision:
    """What a module holds in float64 stays so; nothing is cut in silence."""

    @pytest.fixture
    def factory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        (tmp_path / "double_of_a_test.py").write_text(
            "import torch\n"
            "from torch import nn\n"
            "class Shifted(nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.weight = nn.Parameter(torch.ones(3))\n"
            "        self.register_buffer('shift', torch.zeros(3))\n"
            "        self.register_buffer('count', torch.tensor(0))\n"
            "    def forward(self, image): return image.mean() * self.weight + self.shift\n"
            "def single(): return Shifted()\n"
            "def double(): return Shifted().double()\n"
            "def half(): return Shifted().half()\n"
            "def mixed():\n"
            "    module = Shifted()\n"
            "    module.shift = module.shift.double()\n"
            "    return module\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        return "double_of_a_test"

    @pytest.fixture
    def state(self) -> Content:
        # 1 + 1e-12 is 1 in float32, and 16777217 is 16777216.
        third = torch.tensor([1 / 3, 1 + 1e-12, 16777217], dtype=torch.float64)
        return {"weight": third, "shift": third * 2, "count": torch.tensor(7)}

    def test_a_module_in_float64_stays_in_float64(
        self, factory: str, state: Content, save: Callable[..., Path], signature_file: Path
    ) -> None:
        loaded = load_checkpoint(save(state), factory=f"{factory}:double", signature_file=signature_file).module
        for name, value in loaded.state_dict().items():
            assert value.dtype == state[name].dtype
            assert torch.equal(value, state[name])

    def test_a_single_buffer_in_float64_stays_so(
        self, factory: str, state: Content, save: Callable[..., Path], signature_file: Path
    ) -> None:
        path = save({**state, "weight": torch.ones(3)})
        loaded = load_checkpoint(path, factory=f"{factory}:mixed", signature_file=signature_file).module
        assert loaded.weight.dtype == torch.float32
        assert torch.equal(loaded.shift, state["shift"])  # type: ignore[arg-type]

    def test_a_module_in_half_precision_becomes_float32(
        self, factory: str, save: Callable[..., Path], signature_file: Path
    ) -> None:
        state = {"weight": torch.ones(3).half(), "shift": torch.full((3,), 0.5).half(), "count": torch.tensor(7)}
        loaded = load_checkpoint(save(state), factory=f"{factory}:half", signature_file=signature_file).module
        assert {name: value.dtype for name, value in loaded.state_dict().items()} == {
            "weight": torch.float32,
            "shift": torch.float32,
            "count": torch.int64,
        }

    def test_float64_weights_for_a_module_in_float32_must_fit_it(
        self, factory: str, state: Content, save: Callable[..., Path], signature_file: Path
    ) -> None:
        message = refusal(save(state), factory=f"{factory}:single", signature_file=signature_file)
        assert "'weight' is float64, and float32, in which the module holds it, has too few digits for it" in message
        assert "build the module with .double(), or convert the weights with .float() first" in message
        fit = {"weight": torch.tensor([1.0, torch.nan, 0.5], dtype=torch.float64), "shift": torch.zeros(3)}
        load_checkpoint(
            save({**fit, "count": torch.tensor(7)}), factory=f"{factory}:single", signature_file=signature_file
        )


class TestTiedWeights:
    @pytest.fixture
    def tied(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
        (tmp_path / "tied_of_a_test.py").write_text(
            "from torch import nn\n"
            "class Tied(nn.Module):\n"
            "    def __init__(self, tie):\n"
            "        super().__init__()\n"
            "        self.one, self.other = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)\n"
            "        if tie: self.other.weight = self.one.weight\n"
            "    def forward(self, x): return self.other(self.one(x))\n"
        )
        monkeypatch.syspath_prepend(str(tmp_path))
        return "tied_of_a_test:Tied"

    @pytest.mark.parametrize("present", ["one.weight", "other.weight"])
    def test_one_name_of_a_tied_weight_is_enough(
        self, tied: str, save: Callable[..., Path], signature_file: Path, present: str
    ) -> None:
        path = save({present: torch.eye(4)})
        loaded = load_checkpoint(path, factory=tied, signature_file=signature_file, config={"tie": True})
        assert loaded.config == {"tie": True}
        assert torch.equal(loaded.module.one.weight, torch.eye(4))
        assert loaded.module.other.weight is loaded.module.one.weight

    def test_without_the_tie_the_other_is_missing(
        self, tied: str, save: Callable[..., Path], signature_file: Path
    ) -> None:
        path = save({"one.weight": torch.eye(4)})
        said = refusal(path, factory=tied, signature_file=signature_file, config={"tie": False})
        assert "do not fit tied_of_a_test:Tied: other.weight is missing" in said


class TestFiles:
    @pytest.fixture
    def text_content(self, checkpoint_content: Content) -> Content:
        from models.text_encoder import build_text_classifier

        config = {
            **{"vocab_size": 20, "num_classes": 2, "hidden_dim": 8, "num_layers": 1, "num_heads": 2},
            **{"intermediate_dim": 16, "max_length": 12},
        }
        ids = {"name": "input_ids", "dtype": "int64", "shape": ["batch", "length"], "maximum": 19}
        checkpoint_content["model"] = {"factory": "models.text_encoder:build_text_classifier", "config": config}
        checkpoint_content["state_dict"] = build_text_classifier(**config).state_dict()
        checkpoint_content["signature"] = {
            "format_version": 1,
            "task": "text-classification",
            "inputs": [ids],
            "outputs": [{"name": "logits", "dtype": "float32", "shape": ["batch", 2]}],
            "labels": ["no", "yes"],
            "preprocessing": {"text": {"tokenizer": "tokenizer.json", "max_length": 12, "pad_id": 0}},
        }
        checkpoint_content["files"] = {"tokenizer.json": '{"é": 1}', "signature.json": "not for the archive"}
        return checkpoint_content

    def test_the_tokenizer_comes_along_and_nothing_else(self, text_content: Content, save: Callable[..., Path]) -> None:
        assert load_checkpoint(save(text_content)).files == {"tokenizer.json": '{"é": 1}'.encode()}

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ({}, "holds no 'tokenizer.json', which its signature names as the tokenizer; train again"),
            ({"tokenizer.json": 3}, "'tokenizer.json' is not text"),
            ([1], "'files' is not a mapping"),
        ],
    )
    def test_a_checkpoint_without_it_is_refused(
        self, text_content: Content, save: Callable[..., Path], files: object, message: str
    ) -> None:
        text_content["files"] = files
        assert message in refusal(save(text_content))

    def test_that_of_a_plain_state_dict_lies_beside_the_signature(
        self, text_content: Content, save: Callable[..., Path], tmp_path: Path
    ) -> None:
        path = save(text_content["state_dict"])
        (tmp_path / "elsewhere").mkdir()
        signature_file = tmp_path / "elsewhere" / "signature.json"
        signature_file.write_text(json.dumps(text_content["signature"]))
        options: Content = {
            "factory": text_content["model"]["factory"],
            "config": text_content["model"]["config"],
            "signature_file": signature_file,
        }
        assert "cannot be read (No such file or directory)" in refusal(path, **options)
        (tmp_path / "elsewhere" / "tokenizer.json").write_bytes(b"{}")
        assert load_checkpoint(path, **options).files == {"tokenizer.json": b"{}"}

    def test_models_without_texts_have_none(self, checkpoint: Path) -> None:
        assert load_checkpoint(checkpoint).files == {}


class TestSignatureFile:
    def load(self, checkpoint: Path, path: Path, text: str | bytes) -> Any:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_checkpoint(checkpoint, signature_file=path).signature

    def test_yaml_and_json_say_the_same(self, checkpoint: Path, signature_document: Content, tmp_path: Path) -> None:
        import yaml

        forms = [yaml.safe_dump(signature_document), json.dumps(signature_document)]
        first, second = (self.load(checkpoint, tmp_path / "s", text) for text in forms)
        assert first == second

    def test_json_may_hold_tabs_and_exponents(
        self, checkpoint: Path, signature_document: Content, tmp_path: Path
    ) -> None:
        text = json.dumps(signature_document, indent="\t").replace("0.25", "25e-2")
        assert self.load(checkpoint, tmp_path / "s", text).image.std == (0.25,)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("a: [", r"is not valid YAML at line 1"),
            ("a: 2026-13-01", r"is not valid YAML"),
            ("[" * 100_000, r"is not valid YAML"),
            (b"\xff", r"is not UTF-8 text"),
            ("", r"signature.format_version is missing"),
            ("task: x", r"cannot be used: signature\.format_version is missing"),
        ],
    )
    def test_a_bad_one_is_refused(self, checkpoint: Path, tmp_path: Path, text: str | bytes, message: str) -> None:
        with pytest.raises(CheckpointError, match=message) as caught:
            self.load(checkpoint, tmp_path / "s", text)
        assert "\n" not in str(caught.value)

    def test_a_missing_one_is_named(self, checkpoint: Path, tmp_path: Path) -> None:
        assert "nope.yaml cannot be read: No such file" in refusal(checkpoint, signature_file=tmp_path / "nope.yaml")


class TestDamage:
    def test_a_missing_file_is_named(self, tmp_path: Path) -> None:
        assert refusal(tmp_path / "nope.pt") == f"there is no checkpoint at {tmp_path / 'nope.pt'}; check the path"

    def test_a_run_folder_without_a_checkpoint_says_what_to_do(self, tmp_path: Path) -> None:
        assert "holds no finished training; run `torchport train` first" in refusal(tmp_path)

    def test_truncation_is_refused_at_any_length(self, checkpoint: Path, tmp_path: Path) -> None:
        content = checkpoint.read_bytes()
        path = tmp_path / "cut.pt"
        for length in [*range(0, len(content), 61), *range(len(content) - 70, len(content))]:
            path.write_bytes(content[:length])
            assert "is truncated, corrupt or not a PyTorch file; train again or fetch a clean copy" in refusal(path)

    def test_a_flipped_byte_is_refused_or_changes_nothing(self, checkpoint: Path, tmp_path: Path) -> None:
        content = checkpoint.read_bytes()
        expected = load_checkpoint(checkpoint)
        path = tmp_path / "flipped.pt"
        generator = random.Random(0)
        refused = 0
        for position in generator.sample(range(len(content)), 250):
            damaged = bytearray(content)
            damaged[position] ^= 1 << generator.randrange(8)
            path.write_bytes(damaged)
            try:
                loaded = load_checkpoint(path)
            except CheckpointError:
                refused += 1
            else:  # padding between the records
                for name, value in expected.module.state_dict().items():
                    assert torch.equal(loaded.module.state_dict()[name], value)
                assert (loaded.metrics, loaded.signature) == (expected.metrics, expected.signature)
        assert refused > 100

    def test_every_flipped_byte_of_a_weight_is_refused(
        self, checkpoint: Path, checkpoint_content: Content, tmp_path: Path
    ) -> None:
        weight = checkpoint_content["state_dict"]["features.0.conv.weight"].numpy().tobytes()
        content = checkpoint.read_bytes()
        start = content.index(weight)
        path = tmp_path / "flipped.pt"
        for position in range(start, start + len(weight)):
            damaged = bytearray(content)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            assert "truncated, corrupt" in refusal(path)

    def test_a_folder_in_place_of_the_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoint.pt").mkdir()
        assert "there is no checkpoint" in refusal(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"PK", b"text\n", b"\0" * 100])
    def test_another_file_is_refused(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "other.pt"
        path.write_bytes(content)
        assert "not a PyTorch file" in refusal(path)

    def test_another_zip_is_refused(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "other.pt", "w") as target:
            target.writestr("hello.txt", "hello")
        assert "no checkpoint at all" in refusal(tmp_path / "other.pt")

    @pytest.mark.parametrize("content", [[1, 2], torch.zeros(2), 3, None])
    def test_another_content_is_refused(self, save: Callable[..., Path], content: object) -> None:
        assert "not a checkpoint or a state_dict" in refusal(save(content))

    def test_a_file_without_checksums_is_refused_with_the_remedy(
        self, checkpoint_content: Content, save: Callable[..., Path]
    ) -> None:
        path = save(checkpoint_content, _use_new_zipfile_serialization=False)
        assert "save its state_dict again with torch.save" in refusal(path)


class Canary:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


class TestCode:
    def test_code_in_a_checkpoint_never_runs(
        self, tmp_path: Path, checkpoint_content: Content, save: Callable[..., Path]
    ) -> None:
        canary = tmp_path / "canary"
        checkpoint_content["recipe"] = Canary(canary)
        path = save(checkpoint_content)
        assert "torchport never unpickles objects: save the model's state_dict" in refusal(path)
        assert not canary.exists()
        torch.load(path, weights_only=False)
        assert canary.exists(), "the canary must sing when it is let out"

    def test_code_in_a_bare_pickle_never_runs(self, tmp_path: Path) -> None:
        path = tmp_path / "model.pt"
        path.write_bytes(pickle.dumps(Canary(tmp_path / "canary")))
        assert "bare pickle" in refusal(path)
        assert not (tmp_path / "canary").exists()

    def test_a_whole_module_is_refused(self, save: Callable[..., Path], module: torch.nn.Module) -> None:
        assert "save the model's state_dict" in refusal(save(module))

    @pytest.mark.parametrize("factory", ["os:system", "models.digits:evaluation_samples ", "export.cli:export", None])
    def test_a_checkpoint_cannot_choose_what_is_called(
        self, checkpoint_content: Content, save: Callable[..., Path], factory: str | None
    ) -> None:
        checkpoint_content["model"]["factory"] = factory
        message = refusal(save(checkpoint_content))
        assert f"asks to call {str(factory)!r}" in message
        assert "give --model with the factory of your own module" in message

    def test_a_factory_that_the_user_names_is_called(
        self, checkpoint_content: Content, save: Callable[..., Path], user_package: str
    ) -> None:
        checkpoint_content["model"] = {"factory": "os:system", "config": {}}
        assert load_checkpoint(save(checkpoint_content), factory=user_package).factory == user_package


class TestContent:
    @pytest.mark.parametrize("version", [0, 2, None, "1", torch.zeros(2), [1]])
    def test_another_version_is_named(
        self, checkpoint_content: Content, save: Callable[..., Path], version: object
    ) -> None:
        checkpoint_content["format_version"] = version
        assert "this torchport reads version 1; export with the torchport that trained it" in refusal(
            save(checkpoint_content)
        )

    @pytest.mark.parametrize("key", ["model", "state_dict"])
    @pytest.mark.parametrize("value", [None, [1], {1: 2}])
    def test_a_missing_part_is_named(
        self, checkpoint_content: Content, save: Callable[..., Path], key: str, value: object
    ) -> None:
        checkpoint_content[key] = value
        assert f"'{key}' is {'missing' if value is None else 'not a mapping'}" in refusal(save(checkpoint_content))

    def test_a_missing_signature_is_named(self, checkpoint_content: Content, save: Callable[..., Path]) -> None:
        del checkpoint_content["signature"]
        assert "signature must be a mapping" in refusal(save(checkpoint_content))

    @pytest.mark.parametrize(
        "value", [float("nan"), float("inf"), 10**400, "0.9", True, None, torch.zeros(50, 50), [0.9]]
    )
    def test_a_metric_that_is_no_finite_number_is_refused(
        self, checkpoint_content: Content, save: Callable[..., Path], value: object
    ) -> None:
        checkpoint_content["metrics"]["accuracy"] = value
        assert "the metric 'accuracy' is" in refusal(save(checkpoint_content))

    @pytest.mark.parametrize("value", [-0.1, 1.01, 98.5])
    def test_an_accuracy_that_is_no_share_is_refused(
        self, checkpoint_content: Content, save: Callable[..., Path], value: float
    ) -> None:
        checkpoint_content["metrics"]["accuracy"] = value
        assert "must lie from 0 to 1" in refusal(save(checkpoint_content))

    @pytest.mark.parametrize("value", [float("nan"), {"a": 1, 2: 3}, torch.zeros(2), {"a": {"b": float("inf")}}])
    def test_facts_that_json_cannot_carry_are_refused(
        self, checkpoint_content: Content, save: Callable[..., Path], value: object
    ) -> None:
        checkpoint_content["recipe"] = value
        assert "facts that JSON cannot carry" in refusal(save(checkpoint_content))

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("classifier.bias"), "classifier.bias is missing"),
            (lambda state: state.update(other=torch.zeros(1)), "'other' is unknown"),
            (
                lambda state: state.update({"classifier.weight": torch.zeros(5, 4)}),
                "size mismatch for classifier.weight",
            ),
            (lambda state: state.update({"classifier.bias": 3}), "classifier.bias"),
            (lambda state: state.clear(), "and 4 more"),
        ],
    )
    def test_weights_that_do_not_fit_are_named(
        self,
        checkpoint_content: Content,
        save: Callable[..., Path],
        change: Callable[[Content], object],
        message: str,
    ) -> None:
        change(checkpoint_content["state_dict"])
        said = refusal(save(checkpoint_content))
        assert "do not fit models.convnet:build_conv_classifier" in said
        assert message in said

    @pytest.mark.parametrize("config", [{}, {"in_channels": 0}, {"depth": 3}])
    def test_a_configuration_that_the_factory_refuses_is_shown(
        self, checkpoint_content: Content, save: Callable[..., Path], config: Content
    ) -> None:
        checkpoint_content["model"]["config"] = config
        assert "models.convnet:build_conv_classifier fails on the configuration {" in refusal(save(checkpoint_content))

    @pytest.mark.parametrize(
        ("factory", "message"),
        [
            ("brightness_of_a_test", "is not an import path; write package.module:function"),
            (":build", "is not an import path"),
            ("brightness_of_a_test:", "is not an import path"),
            ("no_such_module:build", "cannot be imported (No module named 'no_such_module')"),
            ("brightness_of_a_test:nothing", "has no attribute 'nothing'"),
            ("brightness_of_a_test:constant", "is not a function or class"),
            ("brightness_of_a_test:fails", "fails on the configuration {}: first line"),
            ("brightness_of_a_test:gives_nothing", "gives a NoneType, not a torch.nn.Module"),
            # An exit with code 0 would look like an export that went well.
            ("brightness_of_a_test:leaves", "fails on the configuration {}: it ends Python with sys.exit(0)"),
            ("leaves_when_imported:build", "cannot be imported (it ends Python with sys.exit(0))"),
        ],
    )
    @pytest.mark.usefixtures("user_package")
    def test_a_factory_of_the_user_that_fails_is_named(
        self,
        save: Callable[..., Path],
        module: torch.nn.Module,
        signature_file: Path,
        factory: str,
        message: str,
    ) -> None:
        path = save(module.state_dict())
        assert message in refusal(path, factory=factory, signature_file=signature_file)

    def test_an_import_path_is_imported(self) -> None:
        assert import_object("export.checkpoint:load_checkpoint") is load_checkpoint


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(torch.zeros(2)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    key=st.sampled_from(
        ["format", "format_version", "model", "state_dict", "signature", "evaluation", "metrics", "recipe", "epoch"]
    ),
    value=VALUES,
)
def test_whatever_a_checkpoint_holds_it_loads_or_is_refused(
    checkpoint: Path, tmp_path: Path, key: str, value: object
) -> None:
    content = torch.load(checkpoint, weights_only=True)
    content[key] = value
    torch.save(content, tmp_path / "any.pt")
    try:
        loaded = load_checkpoint(tmp_path / "any.pt")
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017  # most values load: an error is not expected
    else:
        json.dumps([loaded.config, loaded.metrics, loaded.record], allow_nan=False, sort_keys=True)
