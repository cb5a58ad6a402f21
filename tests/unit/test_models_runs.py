"""Listing and comparing run folders, whatever is in them."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from models.errors import RunFolderError
from models.run_folder import RunFolder
from models.runs import RunState, compare_runs, list_runs, read_run
from models.runs_cli import runs

RECIPE = {"name": "digits", "seed": 0, "model": {"widths": [32, 64]}, "trainer": {"epochs": 3, "batch_size": 64}}
RESULT = {"accuracy": 0.99, "loss": 0.05, "samples": 360, "macro_f1": 0.98, "weights_epoch": 2}


def epoch(number: int) -> dict[str, Any]:
    return {
        "epoch": number,
        "train": {"loss": 1.0 / number},
        "validation": {"accuracy": 0.5 + number / 10, "loss": 0.5, "macro_f1": 0.4},
        "seconds": 1.5,
    }


def run_json(**changes: Any) -> dict[str, Any]:
    return {
        "format": "torchport-run",
        "format_version": 1,
        "name": "digits",
        "state": "finished",
        "command": "torchport train digits",
        "git_revision": "0123456789abcdef-dirty",
        "versions": {"torch": "2.13.0"},
        "data": {"name": "digits", "digest": "ab" * 32, "splits": {"train": 1293}, "skipped_rows": 0},
        "device": "cpu",
        "precision": "fp32",
        "parameters": 1234,
        "started_at": "2026-01-02T03:04:05+00:00",
        "seconds": 12.5,
        "result": RESULT,
        **changes,
    }


def write_run(
    path: Path, *, epochs: int = 3, recipe: dict[str, Any] = RECIPE, run: dict[str, Any] | None = None
) -> Path:
    path.mkdir(parents=True)
    (path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (path / "metrics.jsonl").write_text("".join(json.dumps(epoch(n + 1)) + "\n" for n in range(epochs)))
    if run is not None:
        (path / "run.json").write_text(json.dumps(run))
    return path


def test_a_finished_run_tells_everything(tmp_path: Path) -> None:
    summary = read_run(write_run(tmp_path / "a", run=run_json()))

    assert summary.as_dict() == {
        "path": str(tmp_path / "a"),
        "name": "digits",
        "state": "finished",
        "problem": None,
        "started_at": "2026-01-02T03:04:05+00:00",
        "epochs": 3,
        "planned_epochs": 3,
        "split": "held_out",
        "accuracy": 0.99,
        "loss": 0.05,
        "macro_f1": 0.98,
        "weights_epoch": 2,
        "seconds": 12.5,
        "parameters": 1234,
        "device": "cpu",
        "precision": "fp32",
        "git_revision": "0123456789abcdef-dirty",
        "data_digest": "ab" * 32,
    }


def test_a_training_in_the_folder_is_running_and_one_that_was_killed_interrupted(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", epochs=2, run=run_json(state="running", result=None, seconds=None))
    with RunFolder(path).exclusive():
        running = read_run(path)
    interrupted = read_run(path)

    assert (running.state, interrupted.state) == (RunState.RUNNING, RunState.INTERRUPTED)
    assert (running.epochs, running.planned_epochs) == (2, 3)
    assert (running.split, running.accuracy, running.macro_f1) == ("validation", 0.7, 0.4)
    assert running.seconds == 3.0
    assert running.weights_epoch is None


def test_reading_leaves_no_lock_behind(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", run=run_json(state="running"))

    read_run(path)

    with RunFolder(path).exclusive():
        pass


def test_a_finished_run_is_not_locked_even_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path / "a", run=run_json())
    monkeypatch.setattr(fcntl, "flock", lambda *_: pytest.fail("it was locked"))

    assert read_run(path).state == RunState.FINISHED


@pytest.mark.parametrize(
    ("epochs", "has_checkpoint", "state"),
    [(3, True, RunState.FINISHED), (3, False, RunState.INTERRUPTED), (2, True, RunState.INTERRUPTED)],
)
def test_a_run_without_run_json_is_finished_when_all_is_there(
    tmp_path: Path, epochs: int, has_checkpoint: bool, state: RunState
) -> None:
    path = write_run(tmp_path / "a", epochs=epochs)
    if has_checkpoint:
        (path / "checkpoint.pt").write_bytes(b"")

    summary = read_run(path)

    assert summary.state == state
    assert summary.name == "digits"
    assert summary.started_at is not None
    assert summary.data_digest is None


def test_runs_are_listed_newest_first_and_other_folders_are_not(tmp_path: Path) -> None:
    write_run(tmp_path / "old", run=run_json(started_at="2025-01-01T00:00:00"))
    write_run(tmp_path / "new", run=run_json(started_at="2026-06-01T02:00:00+02:00"))
    write_run(tmp_path / "middle", run=run_json(started_at=1767225600))  # 2026-01-01T00:00:00Z
    (tmp_path / "notes").mkdir()
    (tmp_path / "file.txt").write_text("")

    found = list_runs(tmp_path)

    assert [Path(run.path).name for run in found] == ["new", "middle", "old"]
    assert [run.started_at for run in found] == [
        "2026-06-01T00:00:00+00:00",
        "2026-01-01T00:00:00+00:00",
        "2025-01-01T00:00:00+00:00",
    ]
    assert [run.path for run in list_runs(tmp_path / "old")] == [str(tmp_path / "old")]


def test_a_torn_last_line_is_no_damage(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a", epochs=2)
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "tr')

    summary = read_run(path)

    assert (summary.state, summary.problem, summary.epochs) == (RunState.INTERRUPTED, None, 2)


DAMAGES = {
    "run.json is not JSON.": ("run.json", b"{"),
    "run.json is not the summary of a run.": ("run.json", b"[1, 2]"),
    "run.json has format version 2, and this torchport reads 1.": ("run.json", b'{"format_version": 2}'),
    "recipe.yaml is not YAML.": ("recipe.yaml", b"a: [1"),
    "recipe.yaml is not a recipe.": ("recipe.yaml", b"- 1"),
    "metrics.jsonl is not JSON in line 1.": ("metrics.jsonl", b"\xff\x00\n{}\n"),
    "metrics.jsonl is not an epoch in line 2.": ("metrics.jsonl", b'{"epoch": 1}\n[]\n{}\n'),
}


@pytest.mark.parametrize("problem", DAMAGES)
def test_a_damaged_file_is_named_and_the_others_are_read(tmp_path: Path, problem: str) -> None:
    path = write_run(tmp_path / "a", run=run_json())
    name, content = DAMAGES[problem]
    (path / name).write_bytes(content)

    summary = read_run(path)

    assert (summary.state, summary.problem) == (RunState.DAMAGED, problem)
    assert summary.name == "digits"
    assert summary.accuracy == (0.8 if name == "run.json" else 0.99)
    assert [run.problem for run in list_runs(tmp_path)] == [problem]


@pytest.mark.parametrize("name", ["run.json", "recipe.yaml", "metrics.jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"3",
        b"\x00" * 100,
        b"[" * 3000,
        b"&a [*a]",
        b"{1: 2, [3]: 4}",
        b'{"name": 1, "data": 2, "result": 3, "trainer": 4, "started_at": "x", "epoch": true, "validation": []}',
        b'{"name": "\\ud800", "result": {"accuracy": NaN, "loss": 1e999}, "started_at": 1e300, "seconds": "x"}',
        b"2026-01-01: .nan",
    ],
)
def test_nothing_in_a_file_crashes_the_list(
    tmp_path: Path, name: str, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_run(tmp_path / "a", run=run_json(state="running", result=None))
    (path / name).write_bytes(content)

    listed = runs(folder=tmp_path)
    compared = runs([str(path), str(path)])

    json.dumps([listed, compared], allow_nan=False)
    assert "Runs, the newest first" in capsys.readouterr().out


def test_a_folder_in_place_of_a_file_is_damage(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a")
    (path / "run.json").mkdir()

    assert read_run(path).problem == "run.json cannot be read (Is a directory)."


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    other = {**RECIPE, "seed": 1, "trainer": {"epochs": 3, "batch_size": 32, "precision": "bf16"}}
    return (
        write_run(tmp_path / "a", run=run_json()),
        write_run(tmp_path / "b", recipe=other, run=run_json(result={**RESULT, "accuracy": 0.5})),
    )


def test_a_comparison_shows_only_what_differs(pair: tuple[Path, Path]) -> None:
    comparison = compare_runs(pair)

    assert comparison.differences == {
        "seed": (0, 1),
        "trainer.batch_size": (64, 32),
        "trainer.precision": (None, "bf16"),
    }
    assert [run.accuracy for run in comparison.runs] == [0.99, 0.5]
    assert comparison.same_data is True


@pytest.mark.parametrize(("digest", "same"), [("cd" * 32, False), (None, None)])
def test_different_data_is_noticed(tmp_path: Path, digest: str | None, same: bool | None) -> None:
    first = write_run(tmp_path / "a", run=run_json())
    second = write_run(tmp_path / "b", run=run_json(data={"digest": digest}))

    assert compare_runs([first, second]).same_data is same


def test_what_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"There is no run in .*nowhere; see what there is with torchport runs"):
        compare_runs([tmp_path / "nowhere", tmp_path])
    with pytest.raises(RunFolderError, match=r"cannot be listed \(No such file or directory\); train one with"):
        list_runs(tmp_path / "nowhere")


def test_the_command_lists(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    write_run(tmp_path / "[red]c").joinpath("run.json").write_text("{")
    os.mkdir(os.fsencode(tmp_path) + b"/\xff")
    (Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")) / "metrics.jsonl").touch()

    document = runs(folder=tmp_path)

    output = capsys.readouterr().out
    json.dumps(document, allow_nan=False)
    assert document["ok"] is True
    assert sorted(run["state"] for run in document["runs"]) == ["damaged", "finished", "finished", "interrupted"]
    row = next(line for line in output.splitlines() if line.strip().startswith("a "))
    for text in ("finished", "3/3", "0.9900", "0.0500", "0.9800", "12 s", "0123456+", "abababa"):
        assert text in row
    assert "[red]c is damaged: run.json is not JSON." in output.replace("\n", "")


def test_the_command_cuts_no_number_and_marks_those_of_the_validation_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    write_run(tmp_path / "first", run=run_json())
    write_run(tmp_path / "other", epochs=2, run=run_json(state="running", result=None, started_at=0))

    runs(folder=tmp_path)

    output = capsys.readouterr().out
    cells = [line.split() for line in output.splitlines()]
    assert next(row for row in cells if row[:1] == ["first"])[1:6] == [
        "finished",
        "3/3",
        "0.9900",
        "0.0500",
        "0.9800",
    ]
    assert next(row for row in cells if row[:1] == ["other"])[1:6] == [
        "interrupted",
        "2/3",
        "0.7000*",
        "0.5000*",
        "0.4000*",
    ]
    assert "…" not in output
    assert "* on the validation split, not on the held-out one" in output


def test_the_command_compares_by_name_or_path(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")

    document = runs(["a", str(pair[1])], folder=tmp_path)

    output = capsys.readouterr().out
    assert document["differences"] == {
        "seed": [0, 1],
        "trainer.batch_size": [64, 32],
        "trainer.precision": [None, "bf16"],
    }
    assert [run["name"] for run in document["runs"]] == ["digits", "digits"]
    lines = [line.split() for line in output.splitlines()]
    assert ["accuracy", "0.9900", "0.5000"] in lines
    assert ["measured", "on", "held-out", "held-out"] in lines
    assert ["trainer.batch_size", "64", "32"] in lines
    assert ["trainer.precision", "-", "bf16"] in lines
    assert "trainer.epochs" not in output
    assert "different data" not in output


def test_the_command_shows_one_run_by_name(pair: tuple[Path, Path], tmp_path: Path) -> None:
    assert [run["path"] for run in runs(["b"], folder=tmp_path)["runs"]] == [str(tmp_path / "b")]


def test_the_command_without_runs_says_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert runs(folder=tmp_path)["runs"] == []
    assert "torchport train digits" in capsys.readouterr().out


def test_the_command_says_that_data_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "a", run=run_json())
    write_run(tmp_path / "b", run=run_json(data={"digest": "cd" * 32}))

    runs(["a", "b"], folder=tmp_path)

    assert "They saw different data: their results do not compare." in capsys.readouterr().out
