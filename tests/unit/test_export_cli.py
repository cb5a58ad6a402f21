"""The commands ``export`` and ``inspect``, in process, behind the boundary of all commands."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from typer.testing import CliRunner

import torchport
from export.archive import open_archive


def run(*arguments: object) -> Result:
    return CliRunner().invoke(torchport.build_app(), [str(argument) for argument in arguments])


def last_json(result: Result) -> dict[str, Any]:
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    return document


def sentence(result: Result) -> str:
    """The one line on stderr of a command that failed because of its input."""
    assert result.exit_code == 1, (result.stdout, result.stderr)
    assert "Traceback" not in result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


@pytest.fixture
def run_folder(checkpoint: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "brightness"
    folder.mkdir()
    shutil.copy(checkpoint, folder)
    return folder


def test_a_run_folder_becomes_an_archive_named_after_it_with_the_same_bytes_as_elsewhere(
    run_folder: Path, evaluation_folder: Path, archive: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    document = last_json(run("export", run_folder, "--eval", evaluation_folder, "--out", store, "--json"))
    assert document["ok"] is True
    assert document["archive"] == str(store / "brightness.mar")
    assert [gate["passed"] for gate in document["gates"]] == [True] * 13
    assert document["evaluated"] == 12
    assert (store / "brightness.mar").read_bytes() == archive.read_bytes()
    assert [path.name for path in store.iterdir()] == ["brightness.mar"]


def test_a_state_dict_needs_its_factory_and_signature_and_says_that_data_is_missing(
    module: torch.nn.Module, signature_document: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "module_of_a_stranger.py").write_text(
        "from models.convnet import build_conv_classifier\n"
        "def build(): return build_conv_classifier(in_channels=1, num_classes=3, widths=[4])\n"
    )
    # Labels that Rich would take for markup, and fail on.
    signature_document["labels"] = ["[/INST]", "[red]", "c"]
    (tmp_path / "signature.json").write_text(json.dumps(signature_document))
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command adds the current folder to it
    assert "give --model package.module:factory" in sentence(run("export", "weights.pt", "--out", "store"))

    arguments = ["--model", "module_of_a_stranger:build", "--signature", "signature.json", "--out", "store"]
    result = run("export", "weights.pt", *arguments, "--version", "7")
    assert result.exit_code == 0, result.stderr
    assert "only random inputs were compared" in result.stdout
    archive = open_archive(tmp_path / "store" / "weights.mar")
    assert (archive.name, archive.version) == ("weights", "7")

    described = run("inspect", "store/weights.mar")
    assert described.exit_code == 0, described.stderr
    assert "[/INST], [red], c" in described.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "pt3"], "the format 'pt3' is not known; choose one of: torchscript, onnx, pt2, eager"),
        (["--precision", "fp8"], "the precision 'fp8' is not known; choose one of: fp32, bf16, fp16, int8"),
        (["--method", "guess"], "the method 'guess' is not known; choose one of: trace, script"),
        (["--device", "tpu"], "the device 'tpu' is not known; choose one of: cpu, cuda"),
        (["--format", "onnx", "--precision", "bf16"], "bf16 ONNX is not offered"),
        (["--columns", "a,b,c"], "the columns 'a,b,c' are not usable; write TEXT,LABEL"),
        (["--thresholds", "nowhere.yaml"], "the thresholds nowhere.yaml cannot be read: No such file"),
        (["--config", "nowhere.yaml"], "the configuration nowhere.yaml cannot be read: No such file"),
        (["--licence", "nowhere"], "nowhere cannot be read: No such file"),
        (["--staging-only", "--sign", "key"], "a staged folder is no archive yet"),
        (["--name", "a/b"], "the model name 'a/b' is not usable"),
        (["--eval", "nowhere"], "there is no folder nowhere"),
        (["--signature", "nowhere.yaml"], "the signature nowhere.yaml cannot be read: No such file"),
        (["--model", "no_such_module:build"], "no_such_module:build cannot be imported"),
    ],
)
def test_a_bad_option_gives_one_sentence(run_folder: Path, tmp_path: Path, arguments: list[str], message: str) -> None:
    result = run("export", run_folder, "--out", tmp_path / "store", *arguments)
    assert sentence(result).startswith(f"Error: {message}")
    assert not (tmp_path / "store").exists()


def test_gates_that_fail_are_shown_with_those_that_passed(
    run_folder: Path, evaluation_folder: Path, tmp_path: Path
) -> None:
    strict = tmp_path / "strict.yaml"
    strict.write_text("noise: 0\nrandom_noise: 0\n")
    arguments = ["--eval", evaluation_folder, "--out", tmp_path / "store", "--thresholds", strict]
    result = run("export", run_folder, "--format", "onnx", *arguments, "--json")
    assert sentence(result).startswith("Error: the onnx fp32 on cpu artifact fails ")
    assert "failed" in result.stderr
    assert "passed" in result.stderr
    document = json.loads(result.stdout.strip().splitlines()[-1])
    assert document["ok"] is False
    assert document["error"]["type"] == "GateError"
    assert {gate["gate"] for gate in document["gates"] if not gate["passed"]} <= {"noise", "noise on evaluation data"}
    assert len(document["gates"]) == 13
    assert not (tmp_path / "store").exists()


def test_a_staged_folder_names_the_command_that_packs_it(
    run_folder: Path, evaluation_folder: Path, tmp_path: Path
) -> None:
    arguments = ["--eval", evaluation_folder, "--out", tmp_path / "store", "--staging-only"]
    result = run("export", run_folder, *arguments, "--json")
    document = last_json(result)
    assert document["archive"] is None
    assert "torch-model-archiver --model-name brightness" in result.stdout
    assert document["staged"]["command"] in result.stdout


def test_arguments_of_the_factory_come_from_a_file(
    module: torch.nn.Module, signature_document: dict[str, Any], tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text("in_channels: 1\nnum_classes: 3\nwidths: [4]\n")
    (tmp_path / "signature.json").write_text(json.dumps(signature_document))
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    document = last_json(
        run(
            *("export", tmp_path / "weights.pt", "--model", "models.convnet:build_conv_classifier"),
            *("--config", tmp_path / "config.yaml", "--signature", tmp_path / "signature.json"),
            *("--out", tmp_path / "store", "--json"),
        )
    )
    provenance = open_archive(Path(document["archive"])).read_json("provenance.json")
    assert provenance["model"]["config"] == {"in_channels": 1, "num_classes": 3, "widths": [4]}


def test_a_missing_and_a_corrupt_checkpoint_give_one_sentence(run_folder: Path, tmp_path: Path) -> None:
    assert "there is no checkpoint at" in sentence(run("export", tmp_path / "nope"))
    path = run_folder / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-100])
    assert "is truncated, corrupt" in sentence(run("export", run_folder, "--out", tmp_path / "store"))
    assert not (tmp_path / "store").exists()


def test_inspect_shows_an_archive_and_gives_it_as_json(archive: Path) -> None:
    result = run("inspect", archive, "--json")
    document = last_json(result)
    assert (document["ok"], document["name"], document["golden_difference"]) == (True, "brightness", None)
    assert "not replayed (use --verify)" in result.stdout


def test_inspect_verify_replays_the_golden_samples(archive: Path) -> None:
    result = run("inspect", archive, "--verify", "--json")
    assert last_json(result)["golden_difference"] < 1e-4
    assert "replayed: largest difference" in result.stdout


def test_inspect_refuses_a_changed_archive_in_one_sentence(
    archive: Path, tmp_path: Path, picture: Callable[[str], bytes]
) -> None:
    content = archive.read_bytes()
    place = content.index(picture("dark")) + 20
    (tmp_path / "changed.mar").write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert "is damaged or not an archive" in sentence(run("inspect", tmp_path / "changed.mar"))
    assert "there is no archive at" in sentence(run("inspect", tmp_path / "nope.mar"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--matrix", "--staging-only"], "--matrix alone packs nothing, so there is no use for --staging-only"),
        (["--matrix", "--sign", "key"], "--matrix alone packs nothing, so there is no use for --sign"),
        (["--matrix", "--licence", "x"], "--matrix alone packs nothing, so there is no use for --licence"),
        (["--matrix", "--format", "pt3"], "the format 'pt3' is not known"),
        (["--matrix", "--format", "onnx", "--precision", "bf16"], "bf16 ONNX is not offered"),
        (["--matrix", "--device", "tpu"], "the device 'tpu' is not known"),
        (["--matrix", "--thresholds", "nowhere.yaml"], "the thresholds nowhere.yaml cannot be read"),
        (["--best", "--licence", "nowhere"], "nowhere cannot be read: No such file"),
        (["--best", "--staging-only", "--sign", "key"], "a staged folder is no archive yet"),
        (["--report", "r"], "--report is where --matrix and --best put their page"),
    ],
)
def test_a_bad_mix_with_the_matrix_gives_one_sentence(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("export", run_folder, "--out", tmp_path / "store", *arguments)
    assert sentence(result).startswith(f"Error: {message}")
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "reports").exists()


def test_the_matrix_says_what_it_found_and_packs_nothing(
    run_folder: Path, evaluation_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("export", run_folder, "--eval", evaluation_folder, "--matrix", "--format", "eager", "--json")
    document = last_json(result)
    assert [(one["format"], one["precision"]) for one in document["combinations"]] == [
        ("eager", "fp32"),
        ("eager", "bf16"),
    ]
    assert document["best"]["combination"] in result.stdout
    assert document["packed"] is None
    assert document["report"] == "reports/brightness-matrix/matrix.html"
    found = json.loads(Path(document["results"]).read_bytes())
    assert found["combinations"] == document["combinations"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["brightness", "reports"]


def test_the_best_is_packed_with_the_bytes_of_a_plain_export(
    run_folder: Path, evaluation_folder: Path, archive: Path, tmp_path: Path
) -> None:
    arguments = ["--format", "torchscript", "--precision", "fp32", "--report", tmp_path / "report"]
    result = run(
        *("export", run_folder, "--eval", evaluation_folder, "--out", tmp_path / "store"),
        *("--best", *arguments, "--json"),
    )
    document = last_json(result)
    assert document["packed"]["archive"] == str(tmp_path / "store" / "brightness.mar")
    assert "wrote " in result.stdout
    assert Path(document["packed"]["archive"]).read_bytes() == archive.read_bytes()
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["matrix.html", "matrix.json"]


def test_a_matrix_in_which_nothing_passes_exits_with_1(
    run_folder: Path, evaluation_folder: Path, tmp_path: Path
) -> None:
    strict = tmp_path / "strict.yaml"
    strict.write_text("noise: 0\nrandom_noise: 0\n")
    result = run(
        *("export", run_folder, "--eval", evaluation_folder, "--out", tmp_path / "store", "--thresholds", strict),
        *("--format", "onnx", "--precision", "fp32", "--best", "--report", tmp_path / "report", "--json"),
    )
    assert result.exit_code == 1, result.output
    document = json.loads(result.stdout.strip().splitlines()[-1])
    assert (document["ok"], document["best"], document["packed"]) == (False, None, None)
    assert document["combinations"][0]["status"] == "failed"
    assert "nothing passed every gate" in result.stdout
    assert not (tmp_path / "store").exists()
    assert (tmp_path / "report" / "matrix.html").exists()
