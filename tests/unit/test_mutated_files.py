"""A part of tests/benchmarks/mutated_files.py: whatever a file that people write holds, the error is one sentence."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from export.errors import CheckpointError
from export.yaml_file import MAX_BYTES, read_arguments, read_settings
from models.errors import RecipeError
from models.recipe import load_recipe

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def mutated_files() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    import mutated_files

    yield mutated_files
    sys.path.remove(str(BENCHMARKS))


def test_every_original_is_read(mutated_files: Any, tmp_path: Path) -> None:
    for kind in mutated_files.kinds(tmp_path).values():
        for ending, content in kind.originals:
            (tmp_path / f"original{ending}").write_bytes(content)
            kind.read(tmp_path / f"original{ending}")


def test_mutated_files_are_read_or_refused_with_one_sentence(mutated_files: Any, tmp_path: Path) -> None:
    found = mutated_files.run(tmp_path, count=600, commands=20, seed=2026)
    assert found.faults == []
    assert found.commands == 20
    assert {name for name, what in found.outcomes if what == "read"} == set(mutated_files.kinds(tmp_path))


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_small_text_that_means_a_huge_document_is_refused_at_once(
    mutated_files: Any, tmp_path: Path, number: int
) -> None:
    path = tmp_path / "bomb.yaml"
    path.write_text(sys.modules["file_mutations"].BOMBS[number])
    with pytest.raises(CheckpointError, match=r"bomb\.yaml is not valid YAML at line \d+: the alias .* too much"):
        read_settings(path, "the signature", CheckpointError)
    with pytest.raises(RecipeError, match=r"bomb\.yaml is not valid YAML at line \d+: the alias .* too much"):
        load_recipe(str(path))


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {<<: *a}", "&a {b: {c: *a}}"])
def test_what_holds_itself_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "ring.yaml"
    path.write_text(text)
    with pytest.raises(CheckpointError, match="the alias 'a' repeats itself"):
        read_settings(path, "the signature", CheckpointError)
    with pytest.raises(RecipeError, match="the alias 'a' repeats itself"):
        load_recipe(str(path))


def test_modest_aliases_and_a_byte_order_mark_are_welcome(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("\ufeffa: &a {x: 1e-3}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n", encoding="utf-8")
    assert read_arguments(path) == {"a": {"x": 0.001}, "b": {"x": 0.001, "y": 2}, "c": [{"x": 0.001}] * 2}
    path = tmp_path / "settings.json"
    path.write_text('\ufeff{"a": 1e-3}', encoding="utf-8")
    assert read_arguments(path) == {"a": 0.001}


def test_a_long_file_is_refused_before_it_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "long.yaml"
    path.write_text("- 1\n" * (MAX_BYTES // 4 + 1))
    with pytest.raises(CheckpointError, match=r"the signature .*long\.yaml has more than 1 MiB"):
        read_settings(path, "the signature", CheckpointError)
    with pytest.raises(RecipeError, match=r"long\.yaml has more than 256 KiB"):
        load_recipe(str(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "must be a mapping of the factory's arguments"),
        ("3: 4", "must be a mapping of the factory's arguments"),
        ("a: .nan", "gives 'a' the value nan, which JSON cannot carry"),
        ("a: 2026-02-03", "which JSON cannot carry"),
        ("a: {1: 2}", "which JSON cannot carry"),
        ("a: !!set {b}", "which JSON cannot carry"),
        ("a: !!bool maybe", "is not valid YAML: it cannot be parsed"),
        ("a: 2026-13-01", "is not valid YAML: month must be"),
        ("[" * 2000, "nested too deeply"),
    ],
)
def test_arguments_are_plain_values_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_arguments(path)
    assert "config.yaml" in str(caught.value)


def test_a_key_that_json_has_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"a": {"b": 1, "b": 2}}')
    with pytest.raises(CheckpointError, match="the key 'b' comes twice"):
        read_arguments(path)
