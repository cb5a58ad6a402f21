"""Recipes: defaults, overrides, and one sentence for every mistake."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from models.errors import RecipeError
from models.recipe import Recipe, load_recipe


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\nseed: 3\ntrainer:\n  epochs: 7\n")
    return path


def failure(name_or_path: str | Path, *overrides: str) -> str:
    """The message, which must be one line whatever went wrong."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(name_or_path), overrides)
    message = str(caught.value)
    assert "\n" not in message
    assert "pydantic" not in message
    assert message.endswith((".", "?"))
    return message


def test_the_built_in_recipe_spells_out_the_defaults() -> None:
    assert load_recipe("digits") == Recipe(name="digits")


def test_a_file_needs_only_what_differs(recipe_file: Path) -> None:
    recipe = load_recipe(str(recipe_file))

    assert (recipe.name, recipe.seed, recipe.trainer.epochs) == ("mine", 3, 7)
    assert recipe.optimizer == Recipe(name="x").optimizer


def test_overrides_are_yaml_and_the_last_one_wins(recipe_file: Path) -> None:
    recipe = load_recipe(
        str(recipe_file),
        ["trainer.epochs=1", "optimizer.learning_rate=1e-2", "model.widths=[16, 32, 64]", "trainer.epochs=2"],
    )

    assert recipe.trainer.epochs == 2
    assert recipe.optimizer.learning_rate == 0.01
    assert recipe.model.widths == (16, 32, 64)


def test_the_resolved_recipe_loads_to_itself(tmp_path: Path) -> None:
    recipe = load_recipe("digits", ["model.widths=[8]", "seed=5"])
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.as_dict()))

    assert load_recipe(str(path)) == recipe


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        load_recipe("digits").seed = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("line", "named", "suggested"),
    [
        ("sed: 1", "There is no key sed", "did you mean seed?"),
        ("trainer: {epoch: 3}", "There is no key trainer.epoch", "did you mean trainer.epochs?"),
        ("learning_rate: 1.0", "There is no key learning_rate", "did you mean optimizer.learning_rate?"),
        ("trainer: {zzz: 3}", "There is no key trainer.zzz", "valid keys are epochs, batch_size"),
    ],
)
def test_an_unknown_key_names_the_nearest_and_the_file(tmp_path: Path, line: str, named: str, suggested: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\n{line}\n")

    message = failure(path)

    assert named in message
    assert suggested in message
    assert str(path) in message


def test_an_unknown_key_is_reported_before_what_it_leaves_missing(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("nam: mine\n")

    assert "did you mean name?" in failure(path)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("seed: ten", "seed is 'ten'"),
        ("seed: '1'", "it must be a valid integer"),
        ("seed: true", "seed is True"),
        ("seed: -1", "it must be greater than or equal to 0"),
        ("trainer: {epochs: 0}", "trainer.epochs is 0"),
        ("trainer: {device: tpu}", "it must be 'auto', 'cpu' or 'cuda'"),
        ("trainer: 3", "trainer is 3 in {path}; it must be a section"),
        ("model: {widths: 8}", "model.widths is 8 in {path}; it must be a list"),
        ("model: {widths: [8, x]}", "model.widths[1] is 'x'"),
        ("model: {widths: []}", "it must hold at least one item"),
        ("optimizer: {learning_rate: .nan}", "it must be a finite number"),
        ("data: {held_out_fraction: 0.9}", "it must be less than or equal to 0.5"),
        ("1: x", "has the key 1; keys must be text"),
    ],
)
def test_a_wrong_value_names_field_value_and_expectation(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\n{line}\n")

    message = failure(path)

    assert expected.format(path=path) in message
    assert str(path) in message


def test_a_name_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    assert "name is '../up' in -s name=../up" in failure("digits", "name=../up")


def test_an_override_is_blamed_instead_of_the_file() -> None:
    assert failure("digits", "trainer.epochs=ten").startswith("trainer.epochs is 'ten' in -s trainer.epochs=ten")
    assert "-s trainer.epoch=1" in failure("digits", "trainer.epoch=1")


@pytest.mark.parametrize("override", ["trainer.epochs", "=1", "trainer.=1", ".epochs=1"])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    assert repr(override) in failure("digits", override)


def test_an_override_through_a_plain_value_is_refused() -> None:
    assert "seed is 0, not a section" in failure("digits", "seed.x=1")


def test_an_override_that_is_not_yaml_is_refused() -> None:
    assert "-s model.widths=[1" in failure("digits", "model.widths=[1")


@pytest.mark.parametrize("name", ["nope", "no/such/file.yaml"])
def test_a_missing_recipe_lists_the_built_in_ones(name: str) -> None:
    assert (
        failure(name)
        == f"There is no recipe {name}; give a YAML file or one of: ag_news, digits, image_folder, sst2, tickets."
    )


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"name: mine\nseed: [1\ntrainer:\n", "not valid YAML at line 3"),
        (b"name: mine\nname: yours\n", "at line 2: the key 'name' comes twice"),
        (b"name: \x00\n", "not valid YAML"),
        (b"", "is empty"),
        (b"- 1\n", "holds a list"),
        (b"seed: 1\n", "has no name"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_recipe_says_why(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)

    message = failure(path)

    assert expected in message
    assert str(path) in message


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert "Is a directory" in failure(tmp_path)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.name=tickets", "model.name=convnet"], "model.name is convnet, and data.name is tickets"),
        (["trainer.accumulation=3"], "does not divide into trainer.accumulation = 3 parts"),
        (["data.name=digit"], "data.name is 'digit' in -s data.name=digit; it must be one of digits, images"),
        (["data.path=x"], "There is no key data.path in a recipe"),
        (["data.name=images"], "has no data.path; add it, or set it with -s data.path=VALUE"),
        (["data.name=text", "data.train=a.csv", "data.label_names={0: a, 1: b}"], 'quote the label: "0".'),
        (["data.name=text", "data.train=a.csv", "data.label_names={}"], "it must hold at least 2 entries."),
        (["data.skip_bad_rows=true"], "The data set digits has no rows to skip (-s data.skip_bad_rows=true); leave"),
        (["data.name=tickets", "data.skip_bad_rows=true"], "The data set tickets has no rows to skip"),
        (["data.name=images", "data.path=x", "data.clean_htm=true"], "valid keys are held_out_fraction, validation_f"),
        (["model.hidden_dims=3"], "valid keys are name, widths, blocks_per_stage, dropout."),
        (["trainer.final_weights=last", "trainer.early_stopping=3"], "trainer.early_stopping is 3, which ends"),
        (["trainer.consistency=0.5", "model.dropout=0.0"], "trainer.consistency is 0.5, and the model has no dropout"),
        (["data=5"], "data is 5 in -s data=5; it must be a section"),
    ],
)
def test_sections_that_do_not_go_together_are_named(overrides: list[str], expected: str) -> None:
    # Without the model section that the built-in recipe has, the data decides.
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits", overrides)

    assert expected in str(caught.value)


@pytest.mark.parametrize("overrides", [["model.dropout=0.1"], ["model.dropout=0.0", "model.token_dropout=0.1"]])
def test_any_dropout_is_enough_for_consistency(overrides: list[str]) -> None:
    assert load_recipe("tickets", ["trainer.consistency=1.0", *overrides]).trainer.consistency == 1


def test_pairs_have_a_limited_number_of_rows() -> None:
    assert "it must be less than or equal to 10000000" in failure("tickets", "model.pair_buckets=10000001")


def test_the_data_decides_about_the_model_of_a_recipe_that_names_none(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: mine\ndata: {name: tickets}\nmodel: {num_layers: 1}\n")

    recipe = load_recipe(str(path))

    assert recipe.model.name == "text_encoder"
    assert recipe.as_dict()["data"]["count"] == 4000


@pytest.mark.parametrize("name", ["digits", "tickets", "sst2", "ag_news", "image_folder"])
def test_every_built_in_recipe_is_one_and_reads_back_as_resolved(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name)
    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(recipe.as_dict()))

    assert recipe.name == name
    assert load_recipe(str(path)) == recipe
