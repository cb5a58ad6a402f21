"""Bad input to any command: one plain sentence, an exit code that is not 0, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import torchport as command_line
from deploy.ports import Ports
from deploy.state import STATE_VARIABLE


@pytest.fixture(scope="module")
def app_runner() -> Callable[[list[str]], tuple[int, str, str]]:
    app, runner = command_line.build_app(), CliRunner()

    def run(arguments: list[str]) -> tuple[int, str, str]:
        result = runner.invoke(app, arguments)
        return result.exit_code, result.stdout, result.stderr

    return run


@pytest.fixture
def workplace(tmp_path: Path, run_folder: Path, archives: dict[str, Path]) -> Path:
    """A folder with one good and many broken inputs, made the current one by the test."""
    folder = tmp_path / "workplace"
    (folder / "store").mkdir(parents=True)
    shutil.copytree(run_folder, folder / "run")
    shutil.copyfile(archives["torchscript"], folder / "store" / "good.mar")
    damaged = bytearray(archives["torchscript"].read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (folder / "store" / "flipped.mar").write_bytes(damaged)
    (folder / "store" / "truncated.mar").write_bytes(damaged[: len(damaged) // 2])
    (folder / "store" / "empty.mar").write_bytes(b"")
    checkpoint = (run_folder / "checkpoint.pt").read_bytes()
    (folder / "truncated.pt").write_bytes(checkpoint[: len(checkpoint) // 2])
    flipped = bytearray(checkpoint)
    flipped[len(flipped) // 3] ^= 1
    (folder / "flipped.pt").write_bytes(flipped)
    (folder / "text.pt").write_text("not a checkpoint")
    torch.save({"weight": torch.zeros(3)}, folder / "plain.pt")
    torch.save(torch.nn.Linear(2, 2), folder / "pickled.pt")
    (folder / "wrong_key.yaml").write_text("name: mine\ntrainer:\n  epoch: 3\n")
    (folder / "not_yaml.yaml").write_text("name: [")
    (folder / "binary.yaml").write_bytes(bytes(range(256)))
    (folder / "empty_folder").mkdir()
    (folder / "a_file").write_text("in the way")
    (folder / "huge.yaml").write_text("widths: " + "1" * (2 << 20))
    (folder / "bomb.yaml").write_text("a: &a [x, x]\n" + "".join(f"{n}: &a [*a, *a, *a, *a]\n" for n in range(40)))
    (folder / "list.yaml").write_text("- 1\n")
    (folder / "texts.csv").write_text("text,label\nhello,0\n")
    (folder / "images" / "eleven").mkdir(parents=True)
    (folder / "broken" / "0").mkdir(parents=True)
    (folder / "broken" / "0" / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    add_tensor_model(folder)
    return folder


class Intruder:
    """Unpickling it leaves a trace."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, ("unpickled",)


def add_tensor_model(folder: Path) -> None:
    """A model of two tensors, signatures of it, and evaluation data with one fault each."""
    torch.save({}, folder / "nothing.pt")
    (folder / "empty.safetensors").write_bytes(b"")
    signature = {
        "format_version": 1,
        "task": "tensor",
        "inputs": [
            {"name": "x", "dtype": "float32", "shape": ["batch", 2], "minimum": -1, "maximum": 1},
            {"name": "i", "dtype": "int64", "shape": ["batch"], "minimum": 0, "maximum": 9},
        ],
        "outputs": [{"name": "y", "dtype": "float32", "shape": ["batch", 2]}],
    }
    (folder / "tensors.json").write_text(json.dumps(signature))
    first, second = signature["inputs"]
    for name, inputs in {
        "twice": [first, first],
        "slash": [{**first, "name": "a/b"}, second],
        "unbounded": [first, {**second, "maximum": None}],
        "nameless": [{"dtype": "float32", "shape": ["batch", 2]}],
    }.items():
        (folder / f"{name}.json").write_text(json.dumps({**signature, "inputs": inputs}))
    good = {"x": np.zeros((3, 2), np.float32), "i": np.zeros(3, np.int64)}
    for name, change in {
        "missing": {"i": None},
        "unknown": {"z": np.zeros(3)},
        "lengths": {"i": np.zeros(4, np.int64)},
        "labels": {"labels": np.array([0, 1, 2])},
        "not_finite": {"x": np.full((3, 2), np.nan, np.float32)},
        "outside": {"i": np.full(3, 10)},
        "pickled": {"x": np.array([Intruder()] * 3, dtype=object)},
    }.items():
        arrays = {key: array for key, array in {**good, **change}.items() if array is not None}
        np.savez(folder / f"{name}.npz", **arrays)
    (folder / "pickle.npz").write_bytes(pickle.dumps(Intruder()))
    (folder / "empty.npz").write_bytes(b"")


EXPORT_TENSORS = ["export", "nothing.pt", "--model", "torch.nn:Identity", "--signature"]


# What is wrong, the command, and a part of the sentence that must say so.
BAD_COMMANDS = {
    "recipe that is missing": (["train", "nowhere.yaml"], "nowhere.yaml"),
    "recipe of an unknown name": (["train", "digit"], "digits"),
    "recipe with a wrong key": (["train", "wrong_key.yaml"], "epoch"),
    "recipe that is not YAML": (["train", "not_yaml.yaml"], "not_yaml.yaml"),
    "recipe that is binary": (["train", "binary.yaml"], "binary.yaml"),
    "recipe that is a folder": (["train", "empty_folder"], "empty_folder"),
    "override of a wrong key": (["train", "digits", "-s", "trainer.epoch=3"], "trainer.epochs"),
    "override without a value": (["train", "digits", "-s", "trainer.epochs"], "trainer.epochs"),
    "override of a wrong type": (["train", "digits", "-s", "trainer.epochs=many"], "many"),
    "override out of range": (["train", "digits", "-s", "trainer.epochs=0"], "trainer.epochs"),
    "run folder that is a file": (["train", "digits", "--out", "a_file"], "a_file"),
    "checkpoint that is missing": (["export", "nowhere.pt"], "nowhere.pt"),
    "checkpoint that is truncated": (["export", "truncated.pt"], "truncated.pt"),
    "checkpoint with one flipped byte": (["export", "flipped.pt"], "flipped.pt"),
    "checkpoint that is text": (["export", "text.pt"], "text.pt"),
    "checkpoint that is a whole pickled module": (["export", "pickled.pt"], "state_dict"),
    "plain weights without a model": (["export", "plain.pt"], "--model"),
    "run folder without a checkpoint": (["export", "empty_folder"], "torchport train"),
    "unknown format": (["export", "run", "--format", "torchscrip"], "torchscript, onnx"),
    "unknown precision": (["export", "run", "--precision", "fp8"], "fp32"),
    "unknown method": (["export", "run", "--method", "guess"], "trace, script"),
    "name with a slash": (["export", "run", "--name", "a/b"], "a/b"),
    "version with a space": (["export", "run", "--version", "1 0"], "1 0"),
    "model store that is a file": (["export", "run", "--out", "a_file"], "choose another --out"),
    "model store below a file": (["export", "run", "--out", "a_file/store"], "choose another --out"),
    "evaluation data that is missing": (["export", "run", "--eval", "nowhere"], "nowhere"),
    "evaluation data that is empty": (["export", "run", "--eval", "empty_folder"], "empty_folder"),
    "evaluation data of texts for images": (["export", "run", "--eval", "texts.csv"], "texts.csv"),
    "evaluation data of an unknown class": (["export", "run", "--eval", "images"], "eleven"),
    "evaluation data that is no image": (["export", "run", "--eval", "broken"], "a.png"),
    "columns of images": (["export", "run", "--eval", "images", "--columns", "a,b"], "--columns"),
    "columns of no data": (["export", "run", "--columns", "a,b"], "--columns"),
    "columns that are three": (["export", "run", "--eval", "texts.csv", "--columns", "a,b,c"], "TEXT,LABEL"),
    "calibration of fp32": (["export", "run", "--calibration", "images"], "--precision"),
    "calibration data that is missing": (
        ["export", "run", "--format", "onnx", "--precision", "int8", "--calibration", "nowhere"],
        "nowhere",
    ),
    "thresholds that are a folder": (["export", "run", "--thresholds", "empty_folder"], "empty_folder"),
    "thresholds that are binary": (["export", "run", "--thresholds", "binary.yaml"], "binary.yaml"),
    "thresholds of an unknown name": (["export", "run", "--thresholds", "wrong_key.yaml"], "wrong_key.yaml"),
    "model card that is missing": (["export", "run", "--model-card", "nowhere.md"], "nowhere.md"),
    "licence that is a folder": (["export", "run", "--licence", "empty_folder"], "empty_folder"),
    "key that is none": (["export", "run", "--sign", "a_file"], "a_file"),
    "signing what is staged": (["export", "run", "--sign", "a_file", "--staging-only"], "sign"),
    "report of no matrix": (["export", "run", "--report", "report"], "--matrix"),
    "empty name": (["export", "run", "--name", ""], "model name"),
    "unknown device": (["export", "run", "--device", "tpu"], "cpu, cuda"),
    "precision that the format lacks": (["export", "run", "--format", "onnx", "--precision", "bf16"], "bf16 ONNX"),
    "scripting to ONNX": (["export", "run", "--format", "onnx", "--method", "script"], "--method"),
    "configuration that is too long": ([*EXPORT_TENSORS, "tensors.json", "--config", "huge.yaml"], "huge.yaml"),
    "configuration that is a bomb": ([*EXPORT_TENSORS, "tensors.json", "--config", "bomb.yaml"], "bomb.yaml"),
    "configuration that is a list": ([*EXPORT_TENSORS, "tensors.json", "--config", "list.yaml"], "list.yaml"),
    "configuration that is a folder": ([*EXPORT_TENSORS, "tensors.json", "--config", "store"], "store"),
    "arguments that a factory does not take": (
        [
            "export",
            "nothing.pt",
            "--model",
            "torch.nn:ReLU",
            "--signature",
            "tensors.json",
            "--config",
            "wrong_key.yaml",
        ],
        "torch.nn:ReLU",
    ),
    "factory without a colon": (
        ["export", "nothing.pt", "--model", "torch", "--signature", "tensors.json"],
        "function",
    ),
    "factory that is none": (
        ["export", "nothing.pt", "--model", "torch:pi", "--signature", "tensors.json"],
        "torch:pi",
    ),
    "weights of another module": (
        ["export", "plain.pt", "--model", "torch.nn:ReLU", "--signature", "tensors.json"],
        "'weight' is unknown",
    ),
    "safetensors that are empty": (
        ["export", "empty.safetensors", "--model", "torch.nn:ReLU", "--signature", "tensors.json"],
        "empty.safetensors",
    ),
    "signature that is a bomb": ([*EXPORT_TENSORS, "bomb.yaml"], "bomb.yaml"),
    "signature that is a folder": ([*EXPORT_TENSORS, "store"], "store"),
    "signature with a name twice": ([*EXPORT_TENSORS, "twice.json"], "'x' twice"),
    "signature with a slash in a name": ([*EXPORT_TENSORS, "slash.json"], "'a/b'"),
    "signature without bounds of an index": ([*EXPORT_TENSORS, "unbounded.json"], "minimum and maximum"),
    "signature with a field missing": ([*EXPORT_TENSORS, "nameless.json"], "inputs[0].name is missing"),
    **{
        f"tensors with {fault}": ([*EXPORT_TENSORS, "tensors.json", "--eval", file], part)
        for fault, file, part in (
            ("an array missing", "missing.npz", "no array 'i'"),
            ("an unknown array", "unknown.npz", "'z'"),
            ("different lengths", "lengths.npz", "x 3, i 4"),
            ("labels out of range", "labels.npz", "there are 2 classes"),
            ("NaN", "not_finite.npz", "NaN"),
            ("values outside the signature's", "outside.npz", "between 0 and 9"),
            ("a pickled array", "pickled.npz", "pickled.npz"),
            ("a pickle in place of the file", "pickle.npz", "pickle.npz"),
            ("an empty file", "empty.npz", "empty.npz"),
            ("a table", "texts.csv", "texts.csv"),
            ("a folder", "images", "images"),
        )
    },
    "factory that does not import": (["export", "plain.pt", "--model", "nowhere:f", "--signature", "a_file"], "a_file"),
    "archive that is missing": (["inspect", "store/nowhere.mar"], "nowhere.mar"),
    "archive with one flipped byte": (["inspect", "store/flipped.mar"], "flipped.mar"),
    "archive that is truncated": (["inspect", "store/truncated.mar"], "truncated.mar"),
    "archive that is empty": (["inspect", "store/empty.mar"], "empty.mar"),
    "archive that is no archive": (["inspect", "nothing.pt"], "nothing.pt"),
    "public key that is none": (["inspect", "store/good.mar", "--public-key", "a_file"], "a_file"),
    "archive that is a folder": (["inspect", "store"], "store"),
    "serving what is missing": (["serve", "store/nowhere.mar"], "nowhere.mar"),
    "serving one flipped byte": (["serve", "store/good.mar", "store/flipped.mar"], "flipped.mar"),
    "serving a truncated archive": (["serve", "store/truncated.mar"], "truncated.mar"),
    "serving one archive twice": (["serve", "store/good.mar", "store/good.mar"], "--name"),
    "serving on a port out of range": (["serve", "store/good.mar", "--port", "65535"], "65535"),
    "serving on a port below 0": (["serve", "store/good.mar", "--port", "-1"], "-1"),
    "predicting without a server": (["predict", "digits", "{}", "--url", "http://127.0.0.1:1"], "torchport serve"),
    "predicting with a missing file": (["predict", "digits", "nowhere.png"], "nowhere.png"),
    "predicting with malformed JSON": (["predict", "digits", '{"inputs": [1'], "JSON"),
    "predicting at what is no URL": (["predict", "digits", "{}", "--url", "localhost"], "http"),
    "loading without a server": (
        ["loadtest", "digits", "--users", "1", "--archive", "store/good.mar", "--url", "http://127.0.0.1:1"],
        "torchport serve",
    ),
    "loading without an archive": (["loadtest", "digits", "--users", "1"], "--archive"),
    "loading with a damaged archive": (
        ["loadtest", "digits", "--users", "1", "--archive", "store/truncated.mar"],
        "truncated.mar",
    ),
    "loading with a report that is a file": (
        ["loadtest", "digits", "--users", "1", "--archive", "store/good.mar", "--out", "a_file"],
        "--out",
    ),
    "loading in both loops": (["loadtest", "digits", "--users", "1", "--rate", "1"], "--rate"),
    "loading in neither loop": (["loadtest", "digits"], "--users"),
    "loading at a rate of nothing": (["loadtest", "digits", "--rate", "0"], "--rate"),
    "loading at a rate that is no number": (["loadtest", "digits", "--rate", "nan"], "--rate"),
    "loading for no time": (["loadtest", "digits", "--rate", "5", "--duration", "0"], "--duration"),
}


def content(folder: Path) -> dict[str, bytes | None]:
    """Every file with its bytes, every folder with None."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.mark.parametrize("fault", BAD_COMMANDS)
def test_bad_input_is_one_sentence_and_leaves_nothing(
    fault: str,
    app_runner: Callable[[list[str]], tuple[int, str, str]],
    workplace: Path,
    traceless: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments, expected = BAD_COMMANDS[fault]
    monkeypatch.chdir(workplace)
    before = content(workplace)
    code, _, stderr = app_runner(arguments)
    assert code == 1, stderr
    (sentence,) = stderr.strip().splitlines()
    assert sentence.startswith("Error: ")
    assert expected in sentence
    assert "a defect of torchport" not in sentence
    assert content(workplace) == before
    assert content(traceless) == {}


@pytest.fixture
def traceless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Temporary files and server states go into a folder of the test's own, which must stay empty."""
    folder = tmp_path / "traceless"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.setenv(STATE_VARIABLE, str(folder))
    return folder


def test_a_port_in_use_is_named(
    app_runner: Callable[[list[str]], tuple[int, str, str]], workplace: Path, traceless: Path
) -> None:
    first = Ports.first_of_free_range()
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", first + 1))
        occupant.listen()
        code, _, stderr = app_runner(["serve", str(workplace / "store" / "good.mar"), "--port", str(first)])
    assert code == 1
    assert f"port {first + 1} is in use" in stderr
    assert "--port" in stderr
    assert len(stderr.strip().splitlines()) == 1
    assert content(traceless) == {}
