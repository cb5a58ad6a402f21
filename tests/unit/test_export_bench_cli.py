"""The command ``bench`` on a real archive, behind the boundary of all commands."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import torchport
from export.bench import Bench, BenchOptions, count_steps, open_for_bench, run_bench

# As short as it gets: what is tested is what comes out, not how fast it was.
QUICK = ("--duration", "0.01", "--rounds", "1", "--in-flight", "3", "--batch-sizes", "1,2")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(torchport.build_app(), [str(argument) for argument in ("bench", *arguments)])


def sentence(result: Result) -> str:
    assert result.exit_code == 1, (result.stdout, result.stderr)
    lines = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_everything_is_measured_printed_and_written(archive: Path, tmp_path: Path) -> None:
    result = run(archive, *QUICK, "--out", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout.strip().splitlines()[-1])
    assert document["ok"] is True
    assert document["results"] == str(tmp_path / "out" / "bench.json")
    written = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert written == {key: value for key, value in document.items() if key not in ("ok", "results")}
    assert [point["shape"]["batch"] for point in document["points"]] == [1, 2]
    assert document["workload"]["source"] == "golden samples"
    assert document["workload"]["requests"] == 12
    limit = document["limit"]
    assert [(one["way"], one["in_flight"]) for one in limit["throughputs"]] == [
        ("padded", 32),
        ("planned", 3),
        ("answered", 3),
    ]
    assert limit["samples_per_s"] == max(one["samples_per_s"] for one in limit["throughputs"][:2])
    assert document["threads"] == 1
    assert document["memory"]["peak_bytes"] > document["memory"]["before_bytes"] > 0
    assert "limit: " in result.stdout
    assert "grouped by the planner" in " ".join(result.stdout.split())


def test_steps_are_counted_before_they_are_taken(archive: Path) -> None:
    options = BenchOptions(archive=archive, batch_sizes=(1,), duration_s=0.01, rounds=2, in_flight=(2,))
    inspection = open_for_bench(options)
    said: list[str] = []
    bench = run_bench(options, inspection, step=said.append)
    assert len(said) == count_steps(options, inspection.signature)
    assert isinstance(bench, Bench)
    assert not said[-1].startswith("round")


def test_a_quiet_machine_is_not_called_disturbed(archive: Path) -> None:
    options = BenchOptions(archive=archive, batch_sizes=(1,), duration_s=0.01, rounds=1, in_flight=(2,))
    bench = run_bench(options, open_for_bench(options))
    assert not replace(bench, cpu_share=0.99).disturbed
    assert replace(bench, cpu_share=0.5).disturbed


def test_files_and_random_requests_take_the_place_of_golden_samples(
    archive: Path, picture: Any, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(picture("dark"))
    result = run(archive, *QUICK, "--input", tmp_path / "a.png", "--json")
    assert json.loads(result.stdout.strip().splitlines()[-1])["workload"]["source"] == "1 files"
    result = run(archive, *QUICK, "--random", "--json")
    assert json.loads(result.stdout.strip().splitlines()[-1])["workload"]["requests"] == 256


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--batch-sizes", "1,0"], "--batch-sizes is '1,0'; give whole numbers from 1"),
        (["--batch-sizes", ""], "--batch-sizes is ''"),
        (["--in-flight", "many"], "--in-flight is 'many'"),
        (["--in-flight", "9999999"], "give whole numbers from 1 to 999999"),
        (["--lengths", "4"], "every axis of this one is fixed"),
        (["--duration", "nan"], "--duration is nan; give seconds"),
        (["--duration", "0"], "--duration is 0; give seconds"),
        (["--texts", "{folder}/x.txt"], "--texts is for models of texts"),
        (["--texts", "{folder}/x.txt", "--random"], "only one of --input, --texts and --random"),
        (["--columns", "text"], "give the table with --texts"),
        (["--input", "{folder}/missing.png"], "cannot read the input {folder}/missing.png: No such file"),
        (["--input", "{folder}/unnamed"], "the name of the input {folder}/unnamed does not say what it is"),
        (["--input", "{folder}/x.txt"], "{folder}/x.txt is refused: "),
        (["--out", "{folder}/x.txt/below"], "nothing can be written to {folder}/x.txt/below"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(
    archive: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    (tmp_path / "x.txt").write_text("a text\n")
    given = [argument.replace("{folder}", str(tmp_path)) for argument in arguments]
    quick = list(QUICK) if not set(arguments) & set(QUICK) else []
    assert words.replace("{folder}", str(tmp_path)) in sentence(run(archive, *quick, *given))


def test_a_damaged_archive_is_refused(archive: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.mar"
    damaged.write_bytes(archive.read_bytes()[:-100])
    assert "damaged" in sentence(run(damaged))
    assert "there is no archive at" in sentence(run(tmp_path / "none.mar"))
