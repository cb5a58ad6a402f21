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


# The longest recipe that makes sense has some hundred lines.
_MAX_BYTES = 1 << 18
# PyYAML's constructors trip over what they did not expect: !!bool maybe, !!timestamp x, 2026-13-01.
_UNREADABLE = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError)


class _RecipeLoader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-3 is a number as in YAML 1.2, no key may come twice, and no bombs.

    A few lines of aliases of aliases can stand for more than any memory holds, so what each one repeats is counted.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._size = 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        before = self._size
        if self.check_event(yaml.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            node = super().compose_node(parent, index)
            self._size += self._sizes.get(id(node), _MAX_BYTES)  # not finished yet: it holds itself
            if self._size > _MAX_BYTES:
                raise yaml.composer.ComposerError(
                    problem=f"the alias {brief(event.anchor)} repeats itself or too much",
                    problem_mark=event.start_mark,
                )
            return node
        node = super().compose_node(parent, index)
        self._size += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        self._sizes[id(node)] = self._size - before
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                continue  # no recipe key is a list or mapping; the schema refuses it by name
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {brief(key_node.value)} comes twice", problem_mark=key_node.start_mark
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
        except _UNREADABLE as error:
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
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise RecipeError(f"The recipe {path} has more than {_MAX_BYTES >> 10} KiB; give a YAML file of a recipe.")
        content = yaml.load(data.decode("utf-8-sig"), _RecipeLoader)  # a SafeLoader
    except FileNotFoundError as error:
        names = ", ".join(built_in_recipes())
        raise RecipeError(f"There is no recipe {name_or_path}; give a YAML file or one of: {names}.") from error
    except OSError as error:
        raise RecipeError(f"The recipe {path} cannot be read ({error.strerror}); give a YAML file.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"The recipe {path} is not UTF-8 text; give a YAML file.") from error
    except _UNREADABLE as error:
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
                raise RecipeError(f"-s {override.text} cannot be applied: {section} is {brief(inner)}, not a section.")
            target = inner
        target[leaf] = override.value
    return values


def _line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f" at line {mark.line + 1}" if mark else ""


def _problem(error: Exception) -> str:
    """What the parser says, on one short line."""
    if isinstance(error, yaml.YAMLError):
        said = getattr(error, "problem", None) or getattr(error, "reason", None)
    elif isinstance(error, RecursionError):
        said = "it is nested too deeply"
    else:
        said = str(error) if isinstance(error, ValueError) else None  # the others speak of PyYAML's own code
    words = " ".join(str(said or "it cannot be parsed").split())
    return words if len(words) <= 120 else f"{words[:117]}..."


def brief(value: object) -> str:
    """A value short enough for one line."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits; lists nested beyond the stack
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 80 else f"{text[:77]}..."
