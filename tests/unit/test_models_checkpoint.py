"""Checkpoints: whole or absent, the same bytes for the same content, and a clear error for every damage."""

import io
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from models.checkpoint import (
    Checkpoint,
    load_checkpoint,
    load_model_for_inference,
    save_checkpoint,
    save_model_only,
)
from models.convnet import build_conv_classifier
from models.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointFormatError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    CheckpointWriteError,
)

CONFIG = {"in_channels": 1, "num_classes": 3, "widths": [4], "blocks_per_stage": 1, "dropout": 0.5}


def make_checkpoint(seed: int = 0) -> Checkpoint:
    torch.manual_seed(seed)
    return Checkpoint(
        model={"factory": "models.convnet:build_conv_classifier", "config": CONFIG},
        state_dict=build_conv_classifier(**CONFIG).state_dict(),
        signature={"task": "image-classification"},
        files={"tokenizer.json": "{}"},
        evaluation={"source": "models.digits:evaluation_samples", "options": {"seed": seed}},
        metrics={"accuracy": 0.5, "loss": 1.0, "samples": 4},
        epoch=2,
        recipe={"name": "digits", "model": {"widths": [4]}},
        versions={"torch": "2"},
        git_revision=None,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(make_checkpoint(), path)
    return path


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    """Lets every longer write of this process fail, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_checkpoint_comes_back_as_it_was(path: Path) -> None:
    saved, loaded = make_checkpoint(), load_checkpoint(path)

    for key, tensor in saved.state_dict.items():
        torch.testing.assert_close(loaded.state_dict[key], tensor, rtol=0, atol=0)
    assert replace(loaded, state_dict={}).recipe == saved.recipe
    assert (loaded.metrics, loaded.epoch, loaded.training) == (saved.metrics, 2, None)


def test_the_file_holds_the_agreed_keys_for_weights_only(path: Path) -> None:
    content = torch.load(path, weights_only=True)

    assert list(content) == [
        "format",
        "format_version",
        "model",
        "state_dict",
        "signature",
        "evaluation",
        "files",
        "metrics",
        "epoch",
        "recipe",
        "versions",
        "git_revision",
    ]
    assert (content["format"], content["format_version"]) == ("torchport-checkpoint", 1)
    assert type(content["state_dict"]) is dict


def test_the_bytes_depend_on_the_content_alone(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / "another_name.bin"
    other.parent.mkdir()
    # Equal content in other objects: strings that are not interned, and a tensor that is a view.
    checkpoint = make_checkpoint()
    weights = {"".join(key): torch.stack([tensor, tensor])[0] for key, tensor in checkpoint.state_dict.items()}
    recipe = {"name": "".join(["dig", "its"]), "model": {"".join(["wid", "ths"]): [4]}}
    save_checkpoint(replace(checkpoint, state_dict=weights, recipe=recipe), other)

    assert other.read_bytes() == path.read_bytes()
    save_checkpoint(load_checkpoint(path), other)
    assert other.read_bytes() == path.read_bytes()
    save_checkpoint(make_checkpoint(seed=1), other)
    assert other.read_bytes() != path.read_bytes()


def test_a_value_that_would_not_load_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot hold a PosixPath"):
        save_checkpoint(replace(make_checkpoint(), recipe={"path": tmp_path}), tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size_bytes", [0, 100, 3000])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(path: Path, size_bytes: int) -> None:
    before = path.read_bytes()

    with largest_file(size_bytes), pytest.raises(CheckpointWriteError, match=r"checkpoint\.pt cannot be written"):
        save_checkpoint(make_checkpoint(seed=1), path)

    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    before = path.read_bytes()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patched.setattr("os.fsync", interrupt)
        save_checkpoint(make_checkpoint(seed=1), path)

    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointWriteError, match=r"nowhere/x\.pt cannot be written \(No such file"):
        save_checkpoint(make_checkpoint(), tmp_path / "nowhere" / "x.pt")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"There is no checkpoint .*/nope\.pt"):
        load_checkpoint(tmp_path / "nope.pt")


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="Is a directory"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(path: Path, kept: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])

    with pytest.raises(CheckpointCorruptError, match="truncated, damaged or not a PyTorch file"):
        load_checkpoint(path)


def test_a_flipped_byte_is_refused_or_harmless(path: Path) -> None:
    content, expected = path.read_bytes(), load_checkpoint(path)
    refused = 0
    for position in range(0, len(content), 37):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path.write_bytes(damaged)
        try:
            loaded = load_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:  # padding between records
            for key, tensor in expected.state_dict.items():
                assert torch.equal(loaded.state_dict[key], tensor)

    assert refused > 50


def test_a_flipped_weight_is_refused(path: Path) -> None:
    content = path.read_bytes()
    weight = make_checkpoint().state_dict["classifier.weight"].numpy().tobytes()
    path.write_bytes(content.replace(weight, bytes([weight[0] ^ 1]) + weight[1:]))

    with pytest.raises(CheckpointCorruptError):
        load_checkpoint(path)


def test_a_file_with_code_in_it_is_refused(tmp_path: Path) -> None:
    torch.save({"format": "torchport-checkpoint", "model": nn.Linear(1, 1)}, tmp_path / "model.pt")

    with pytest.raises(CheckpointFormatError, match="not a checkpoint of tensors and plain values"):
        load_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [{"w": torch.zeros(2)}, [1, 2], {"format": "other"}, {}])
def test_another_pytorch_file_is_no_checkpoint(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pt")

    with pytest.raises(CheckpointFormatError, match="not a torchport checkpoint"):
        load_checkpoint(tmp_path / "other.pt")


def edit(path: Path, change: Callable[[dict[str, object]], object]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.write_bytes(buffer.getvalue())


def test_another_format_version_is_named(path: Path) -> None:
    edit(path, lambda content: content.update(format_version=2))

    with pytest.raises(CheckpointFormatError, match="has checkpoint format 2, and this torchport reads 1"):
        load_checkpoint(path)


def test_a_missing_key_of_the_checkpoint_is_named(path: Path) -> None:
    edit(path, lambda content: content.pop("signature"))

    with pytest.raises(CheckpointFormatError, match="has no signature"):
        load_checkpoint(path)


def test_a_model_for_inference_is_the_saved_one(path: Path, tmp_path: Path) -> None:
    expected = build_conv_classifier(**CONFIG)
    expected.load_state_dict(make_checkpoint().state_dict)
    expected.eval()
    image = torch.randn(2, 1, 8, 8)
    weights_only = tmp_path / "weights.pt"
    save_model_only(expected, weights_only)

    from_checkpoint = load_model_for_inference(path)
    from_weights = load_model_for_inference(weights_only, factory=build_conv_classifier, config=CONFIG)

    assert set(torch.load(weights_only, weights_only=True)) == set(expected.state_dict())
    for model in (from_checkpoint, from_weights):
        assert not model.training
        torch.testing.assert_close(model(image), expected(image), rtol=0, atol=0)


def test_weights_alone_need_a_factory(tmp_path: Path) -> None:
    save_model_only(nn.Linear(2, 2), tmp_path / "weights.pt")

    with pytest.raises(CheckpointFormatError, match="holds weights only; pass the factory"):
        load_model_for_inference(tmp_path / "weights.pt")


def test_the_wrong_class_is_named_with_its_keys(path: Path) -> None:
    with pytest.raises(
        CheckpointMismatchError,
        match=r"do not fit Linear: missing weight, bias; unknown features.*and \d more; load them with",
    ):
        load_model_for_inference(path, factory=nn.Linear, config={"in_features": 2, "out_features": 2})


def test_a_wrong_size_is_named(path: Path) -> None:
    with pytest.raises(
        CheckpointMismatchError, match=r"wrong shape: classifier\.weight \(\[3, 4\] instead of \[5, 4\]\)"
    ):
        load_model_for_inference(path, config={**CONFIG, "num_classes": 5})


def test_missing_weights_are_named(path: Path) -> None:
    edit(path, lambda content: content["state_dict"].pop("classifier.bias"))

    with pytest.raises(CheckpointMismatchError, match=r"missing classifier\.bias;"):
        load_model_for_inference(path)


def test_a_checkpoint_cannot_choose_what_code_runs(path: Path) -> None:
    edit(path, lambda content: content.update(model={"factory": "os:system", "config": {"command": "false"}}))

    with pytest.raises(CheckpointFormatError, match="'os:system', which is not one of torchport's"):
        load_model_for_inference(path)
