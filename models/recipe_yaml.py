"""Reading a recipe's YAML, and the `-s key=value` overrides on top of it."""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml

from models.errors import RecipeError

_BUILT_IN_FOLDER = Path(__file__).parent / "recipes"


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-3 is a number as in YAML 1.2, and no key may come twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # no recipe key is a list or mapping; the schema refuses it by name
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {key_node.value!r} comes twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


_RecipeLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


@dataclass(frozen=True, slots=True)
class Override:
    """One `-s key=value`."""

    key: str
    """Dotted: "trainer.epochs"."""

    value: object
    """As YAML reads it."""

    text: str
    """As it was typed."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Splits "key=value" and reads the value as YAML.

        Raises:
            RecipeError: when there is no key, no "=", or the value is not YAML.
        """
        key, equals, value = text.partition("=")
        if not equals or not all(key.split(".")):
            raise RecipeError(f"The override {text!r} is not of the form key=value; write -s trainer.epochs=5.")
        try:
            return cls(key, yaml.load(value, _RecipeLoader), text)  # a SafeLoader
        except yaml.YAMLError as error:
            raise RecipeError(f"The value in -s {text} is not YAML: {_problem(error)}; quote it.") from error


def built_in_recipes() -> list[str]:
    """Names of the recipes that come with torchport."""
    return sorted(path.stem for path in _BUILT_IN_FOLDER.glob("*.yaml"))


def read_recipe_yaml(name_or_path: str) -> tuple[str, dict[str, Any]]:
    """Finds a recipe and parses it.

    Returns:
        The file's path for messages, and its content.

    Raises:
        RecipeError: when it is missing, unreadable, not YAML, or not a mapping.
    """
    path = _BUILT_IN_FOLDER / f"{name_or_path}.yaml" if name_or_path in built_in_recipes() else Path(name_or_path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _RecipeLoader)  # a SafeLoader
    except FileNotFoundError as error:
        names = ", ".join(built_in_recipes())
        raise RecipeError(f"There is no recipe {name_or_path}; give a YAML file or one of: {names}.") from error
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read ({error.strerror}); give a YAML file.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"The recipe {path} is not UTF-8 text; give a YAML file.") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"The recipe {path} is not valid YAML{_line(error)}: {_problem(error)}.") from error
    if not isinstance(content, dict):
        kind = "is empty" if content is None else f"holds a {type(content).__name__}"
        raise RecipeError(f"The recipe {path} {kind}; it must hold keys and values, such as name: digits.")
    return str(path), content


def apply_overrides(content: dict[str, Any], overrides: Iterable[Override]) -> dict[str, Any]:
    """Returns a copy of `content` with each override set; later ones win."""
    values = copy.deepcopy(content)
    for override in overrides:
        *sections, leaf = override.key.split(".")
        target = values
        for section in sections:
            inner = target.setdefault(section, {})
            if inner is None:  # a section whose keys are all commented out
                inner = target[section] = {}
            if not isinstance(inner, dict):
                raise RecipeError(f"-s {override.text} cannot be applied: {section} is {inner!r}, not a section.")
            target = inner
        target[leaf] = override.value
    return values


def _line(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" at line {mark.line + 1}" if mark else ""


def _problem(error: yaml.YAMLError) -> str:
    problem = getattr(error, "problem", None) or getattr(error, "reason", None)
    return str(problem or "it cannot be parsed")
