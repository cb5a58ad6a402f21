"""The boundary that all commands share: errors, exit codes, JSON, and help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.testing import CliRunner, Result

import torchport
from deploy.errors import StateError

HEAVY = {"torch", "numpy", "onnx", "onnxruntime", "sklearn", "PIL", "locust", "gevent", "matplotlib", "psutil"}
NAMES = [name for name, _ in torchport.COMMANDS]

Run = Callable[..., Result]


def invoke(function: Callable[..., dict[str, Any]], *arguments: str) -> Result:
    """Run a command behind the boundary."""
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(torchport.with_boundary(function))
    return CliRunner().invoke(app, list(arguments))


def failing(error: BaseException) -> Callable[..., dict[str, Any]]:
    def command() -> dict[str, Any]:
        print("a table")
        raise error

    return command


def torchport_process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torchport", *arguments], capture_output=True, text=True, check=False, **options
    )


def test_a_result_is_a_document_on_the_last_line() -> None:
    def command() -> dict[str, Any]:
        print("a table")
        return {"ok": True, "text": "two\nlines"}

    result = invoke(command, "--json")
    assert result.exit_code == 0
    table, document = result.stdout.splitlines()
    assert table == "a table"
    assert json.loads(document) == {"ok": True, "text": "two\nlines"}
    assert invoke(command).stdout == "a table\n"


def test_what_does_not_hold_fails_with_its_document() -> None:
    result = invoke(lambda: {"ok": False, "p99_ms": 12.5}, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout) == {"ok": False, "p99_ms": 12.5}
    assert result.stderr == ""


def test_arguments_and_options_reach_the_command() -> None:
    def command(name: Annotated[str, typer.Argument()], count: Annotated[int, typer.Option()] = 1) -> dict[str, Any]:
        return {"name": name, "count": count}

    assert json.loads(invoke(command, "it", "--count", "3", "--json").stdout) == {"name": "it", "count": 3}


@pytest.mark.parametrize(
    ("error", "code", "sentence"),
    [
        (StateError("there is none; start one"), 1, "there is none; start one"),
        (FileNotFoundError(2, "No such file or directory", "a/b.pt"), 1, "a/b.pt: No such file or directory"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
        (OSError("only words"), 1, "only words"),
        (TimeoutError(), 1, "TimeoutError"),
        (
            ValueError("two\nlines"),
            70,
            "unexpected ValueError: two lines (a defect of torchport: run again with --debug)",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_is_one_sentence_and_a_code(error: BaseException, code: int, sentence: str) -> None:
    result = invoke(failing(error))
    assert (result.exit_code, result.stdout, result.stderr) == (code, "a table\n", f"Error: {sentence}\n")

    result = invoke(failing(error), "--json")
    assert (result.exit_code, result.stderr) == (code, f"Error: {sentence}\n")
    table, document = result.stdout.splitlines()
    assert table == "a table"
    assert json.loads(document) == {"ok": False, "error": {"type": type(error).__name__, "message": sentence}}


@pytest.mark.parametrize(("error", "code"), [(StateError("there is none"), 1), (ValueError("odd"), 70)])
def test_debug_adds_the_traceback_and_changes_nothing_else(error: Exception, code: int) -> None:
    result = invoke(failing(error), "--debug", "--json")
    assert result.exit_code == code
    assert result.stderr.startswith("Traceback (most recent call last)")
    assert "raise error" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("Error: ")
    assert json.loads(result.stdout.splitlines()[-1])["ok"] is False


@pytest.mark.parametrize("value", [float("nan"), Path("a")])
def test_a_result_that_is_not_json_is_a_defect(value: object) -> None:
    result = invoke(lambda: {"ok": True, "value": value}, "--json")
    assert result.exit_code == 70
    assert json.loads(result.stdout)["ok"] is False


def test_a_command_may_choose_its_exit_code() -> None:
    result = invoke(failing(typer.Exit(5)))
    assert (result.exit_code, result.stderr) == (5, "")


PRINTERS = {
    "print": "for i in range(100_000): print('line', i)",
    "one line": "print('line')",
    "rich": "from rich.console import Console\n    for i in range(20_000): Console().print('line', i)",
}


@pytest.mark.parametrize("printer", PRINTERS)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_reader_that_goes_away_is_no_error(printer: str, options: list[str], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import torchport\n\ndef command():\n    {PRINTERS[printer]}\n    return {{}}\n\n"
        "torchport.COMMANDS = (('many', command), ('other', command))\ntorchport.main()\n",
        encoding="utf-8",
    )
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, str(script), "many", *options],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            # Buffered, as it is for most, the failure comes late.
            env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
        )
    finally:
        os.close(writing)
    assert done.stderr == ""
    assert done.returncode == 1


def test_a_real_command_reports_an_error_in_both_ways(tmp_path: Path) -> None:
    done = torchport_process("inspect", "nowhere.mar", "--json", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == "Error: there is no archive at nowhere.mar; `torchport export` writes one\n"
    message = "there is no archive at nowhere.mar; `torchport export` writes one"
    assert json.loads(done.stdout) == {"ok": False, "error": {"type": "ArchiveError", "message": message}}
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["serv"], "No such command 'serv'"),
        (["doctor", "--fast"], "No such option: --fast"),
        (["inspect"], "Missing argument"),
        (["serve", "a.mar", "--port", "many"], "Invalid value for '--port'"),
        (["serve", "a.mar", "--workers", "0"], "Invalid value for '--workers'"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(arguments: list[str], complaint: str) -> None:
    result = CliRunner().invoke(torchport.build_app(), arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert complaint in " ".join(result.stderr.replace("│", " ").split())
    assert "Traceback" not in result.stderr


def test_a_wrong_command_line_is_told_to_machines_too() -> None:
    done = torchport_process("doctor", "--fast", "--json")
    assert done.returncode == 2
    assert "--fast" in done.stderr
    document = json.loads(done.stdout)
    assert (document["ok"], document["error"]["type"]) == (False, "UsageError")


def test_the_version_is_printed() -> None:
    result = CliRunner().invoke(torchport.build_app(), ["--version"])
    assert (result.exit_code, result.stdout) == (0, "torchport 0.1.0\n")


def test_help_is_fast() -> None:
    code = f"""
import sys
from typer.testing import CliRunner
import torchport
app = torchport.build_app()
for arguments in ([], *([name] for name in {NAMES!r})):
    assert CliRunner().invoke(app, [*arguments, "--help"]).exit_code == 0
print(sorted({HEAVY!r} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr


def test_help_lists_every_command_with_a_line() -> None:
    command = typer.main.get_command(torchport.build_app())
    listed = CliRunner().invoke(torchport.build_app(), ["--help"]).stdout
    assert list(command.commands) == NAMES  # type: ignore[attr-defined]
    for name, each in command.commands.items():  # type: ignore[attr-defined]
        assert f" {name} " in listed
        assert each.help


@pytest.mark.parametrize("name", NAMES)
def test_every_argument_and_option_is_explained(name: str) -> None:
    command = typer.main.get_command(torchport.build_app()).commands[name]  # type: ignore[attr-defined]
    shown = CliRunner().invoke(torchport.build_app(), [name, "--help"], env={"COLUMNS": "200"}).stdout
    assert {"json", "debug"} <= {parameter.name for parameter in command.params}
    for parameter in command.params:
        assert parameter.help, parameter.name
        label = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar or parameter.name
        lines = [line for line in shown.splitlines() if f" {label}" in line]
        assert any(parameter.help.split()[0] in line for line in lines), label


def test_defaults_in_words_are_shown() -> None:
    shown = CliRunner().invoke(torchport.build_app(), ["serve", "--help"], env={"COLUMNS": "200"}).stdout
    assert "[default: (what the archive says)]" in shown  # Rich takes a [default: …] in the help for markup
