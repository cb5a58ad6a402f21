"""Turns pydantic's findings about a recipe into one sentence."""

import difflib
from collections.abc import Sequence

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from models.errors import RecipeError
from models.recipe_yaml import Override, brief

_SKIP_KEY = "data.skip_bad_rows"  # what --skip-bad-rows sets, whatever the data set
_SECTIONS_WITH_VARIANTS = ("data", "model")


def explain(
    error: ValidationError, *, source: str, overrides: Sequence[Override], valid_keys: Sequence[str]
) -> RecipeError:
    """Describes the finding that most likely caused the others.

    Args:
        error: what pydantic found.
        source: the recipe's file.
        overrides: what was set on the command line; blamed when it set the key.
        valid_keys: every dotted key that this recipe may hold.
    """
    findings = error.errors(include_url=False)
    # A misspelt key also makes the right one missing: report the misspelling.
    finding = min(findings, key=lambda found: found["type"] != "extra_forbidden")
    if finding["type"] == "value_error":  # a check across fields, whose sentence is complete
        return RecipeError(str(finding["ctx"]["error"]))
    key = _dotted(_without_variant(finding["loc"]))
    place = _blame(key, source, overrides)
    if finding["type"] == "extra_forbidden":
        return RecipeError(_unknown_key(key, finding["loc"], place, valid_keys))
    if finding["type"] == "missing":
        return RecipeError(f"The recipe {source} has no {key}; add it, or set it with -s {key}=VALUE.")
    if finding["type"] == "union_tag_invalid":
        choices = finding["ctx"]["expected_tags"].replace("'", "")
        place = _blame(f"{key}.name", source, overrides)
        return RecipeError(f"{key}.name is {brief(finding['ctx']['tag'])} in {place}; it must be one of {choices}.")
    if finding["type"] == "invalid_key":
        return RecipeError(f"The recipe {source} has the key {brief(finding['input'])}; keys must be text.")
    if finding["loc"][-1] == "[key]":
        key = _dotted(_without_variant(finding["loc"][:-2]))
        place = _blame(key, source, overrides)
    return RecipeError(_wrong_value(key, finding, place))


def _wrong_value(key: str, finding: ErrorDetails, place: str) -> str:
    value = brief(finding["input"])
    if finding["loc"][-1] == "[key]":  # of a mapping such as data.label_names: YAML makes a number of 0
        return f'{key} has the key {value} in {place}, which is not text; quote the label: "{value}".'
    return f"{key} is {value} in {place}; it must {_expected(finding)}."


def _unknown_key(key: str, location: Sequence[int | str], place: str, valid_keys: Sequence[str]) -> str:
    if key == _SKIP_KEY:
        return (
            f"The data set {location[1]} has no rows to skip ({place}); leave out --skip-bad-rows, and {key} in the "
            "recipe."
        )
    return f"There is no key {key} in a recipe ({place}); {_suggest(key, valid_keys)}"


def _without_variant(location: Sequence[int | str]) -> Sequence[int | str]:
    """Pydantic puts the variant's name into the path: ("data", "text", "train") -> ("data", "train")."""
    return (location[0], *location[2:]) if len(location) > 1 and location[0] in _SECTIONS_WITH_VARIANTS else location


def _expected(finding: ErrorDetails) -> str:
    """What pydantic wants, in words that follow "it must"."""
    message = finding["msg"]
    in_yaml_terms = {
        "model_type": "be a section with keys of its own",
        "model_attributes_type": "be a section with keys of its own",
        "tuple_type": "be a list",
        "string_pattern_mismatch": "start with a letter or digit and hold only letters, digits, '.', '_' and '-'",
    }
    if finding["type"] == "too_short":
        least = finding["ctx"]["min_length"]
        return "hold at least one item" if least == 1 else f"hold at least {least} entries"
    return in_yaml_terms.get(finding["type"], message.removeprefix("Input should "))


def _dotted(location: Sequence[int | str]) -> str:
    """("model", "widths", 1) -> "model.widths[1]"."""
    text = ""
    for part in location:
        name = part if isinstance(part, int) or (part.isprintable() and len(part) <= 60) else brief(part)
        text += f"[{name}]" if isinstance(part, int) else f".{name}"
    return text.removeprefix(".")


def _blame(key: str, source: str, overrides: Sequence[Override]) -> str:
    for override in reversed(overrides):
        if key == override.key or key.startswith((f"{override.key}.", f"{override.key}[")):
            return f"-s {override.text}"
    return source


def _suggest(key: str, valid_keys: Sequence[str]) -> str:
    """Nearest key in the same section, else the nearest anywhere, else the section's keys or the sections."""
    section, _, leaf = key.rpartition(".")
    siblings = {valid.rpartition(".")[2]: valid for valid in valid_keys if valid.rpartition(".")[0] == section}
    anywhere = {valid.rpartition(".")[2]: valid for valid in reversed(valid_keys)}
    for candidates in (siblings, anywhere):
        close = difflib.get_close_matches(leaf, candidates, n=1)
        if close:
            return f"did you mean {candidates[close[0]]}?"
    top_level = [valid for valid in valid_keys if "." not in valid]
    return f"valid keys are {', '.join(siblings or top_level)}."
