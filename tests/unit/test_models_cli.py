"""`torchport train`: what it returns, prints and refuses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from models import cli
from models.errors import ModelsError, TerminatedError

TINY = ["model.widths=[4]", "model.blocks_per_stage=1", "trainer.batch_size=128", "trainer.epochs=1"]


def test_train_returns_what_machines_want(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = cli.train("digits", TINY, out=tmp_path / "run")

    assert answer["ok"] is True
    assert answer["checkpoint"] == str(tmp_path / "run" / "checkpoint.pt")
    assert Path(str(answer["checkpoint"])).exists()
    assert answer["samples"] == 360
    assert 0 < float(str(answer["accuracy"])) <= 1
    assert answer["parameters"] == 4 * 9 + 8 + 50
    assert float(str(answer["seconds"])) > 0
    json.dumps(answer)
    output = capsys.readouterr()
    assert "held-out accuracy" in output.out
    assert "94" in output.out


def test_the_run_folder_is_named_after_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    cli.train("digits", [*TINY, "name=mine"])

    assert (tmp_path / "runs" / "mine" / "checkpoint.pt").exists()


def test_the_command_line_reaches_every_option(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(cli.train)
    settings = [argument for override in TINY for argument in ("-s", override)]

    result = CliRunner().invoke(app, ["digits", *settings, "--out", str(tmp_path), "--resume"])

    assert result.exit_code == 0, result.output
    assert (tmp_path / "checkpoint.pt").exists()


def test_errors_are_for_the_user_and_leave_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ModelsError, match=r"did you mean trainer\.epochs") as caught:
        cli.train("digits", ["trainer.epoch=1"], out=tmp_path / "run")

    assert caught.value.user_facing
    assert not (tmp_path / "run").exists()


def test_a_training_in_processes_that_is_told_to_end_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(*_: object, **__: object) -> None:
        raise TerminatedError("The training was ended by SIGTERM.", signal_number=15)

    monkeypatch.setattr("models.launch.train_in_processes", end)
    app = typer.Typer()
    app.command()(cli.train)

    result = CliRunner().invoke(app, ["digits", "--nproc", "2"])

    assert result.exit_code == 143
    assert "Error: The training was ended by SIGTERM." in result.output


def test_help_needs_neither_torch_nor_scikit_learn() -> None:
    check = "import sys, models.cli; print({'torch', 'sklearn', 'pydantic'} & set(sys.modules))"

    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "set()"
