"""Files that people write: JSON or YAML, read the way people write them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from export.errors import CheckpointError, ExportError
from handlers.document import shown

# Far more than thousands of labels need; PyYAML takes about 10 s for as much.
MAX_BYTES = 1 << 20
# PyYAML's constructors trip over what they did not expect: !!bool maybe, !!timestamp x, 2026-13-01.
_UNREADABLE = (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError)


class _Loader(yaml.SafeLoader):
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
            self._size += self._sizes.get(id(node), MAX_BYTES)  # not finished yet: it holds itself
            if self._size > MAX_BYTES:
                raise yaml.composer.ComposerError(
                    problem=f"the alias {shown(event.anchor)} repeats itself or too much", problem_mark=event.start_mark
                )
            return node
        node = super().compose_node(parent, index)
        self._size += 1 + (len(node.value) if isinstance(node, yaml.ScalarNode) else 0)
        self._sizes[id(node)] = self._size - before
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {shown(key_node.value)} comes twice", problem_mark=key_node.start_mark
                    )
                seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def read_settings(path: Path, what: str, error_type: type[ExportError]) -> Any:
    """The content of a JSON or YAML file; an empty one is an empty mapping.

    Args:
        path: The file.
        what: What it is, for messages, such as ``the thresholds``.
        error_type: The error to raise.

    Raises:
        ExportError: If it cannot be read or parsed; of the type ``error_type``.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise error_type(f"{what} {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise error_type(f"{what} {path} is not UTF-8 text") from error
    if len(data) > MAX_BYTES:
        raise error_type(f"{what} {path} has more than {MAX_BYTES >> 20} MiB; it must be a short JSON or YAML file")
    try:
        # Not left to YAML, which refuses JSON's tabs.
        return json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        if path.suffix.lower() == ".json":
            raise error_type(f"{what} {path} is not valid JSON: {_brief(error)}") from error
    try:
        content = yaml.load(text, _Loader)  # a SafeLoader
    except _UNREADABLE as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise error_type(f"{what} {path} is not valid YAML{where}: {_brief(error)}") from error
    return {} if content is None else content


def read_arguments(path: Path) -> dict[str, Any]:
    """Keyword arguments for a factory, from a JSON or YAML file.

    Raises:
        CheckpointError: If it cannot be read, or is not a mapping of names to plain JSON values.
    """
    content = read_settings(path, "the configuration", CheckpointError)
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(
            f"the configuration {path} must be a mapping of the factory's arguments to values, not {shown(content)}"
        )
    for name, value in content.items():
        try:
            is_plain = json.loads(json.dumps(value, allow_nan=False)) == value
        except (TypeError, ValueError, RecursionError):
            is_plain = False
        if not is_plain:
            raise CheckpointError(
                f"the configuration {path} gives {shown(name)} the value {shown(value)}, which JSON cannot carry; "
                "give plain numbers, texts, lists and mappings of texts to such values"
            )
    return dict(content)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """What JSON makes of an object; it would keep the last one of two equal keys without a word."""
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(shown(key) for key in keys if keys.count(key) > 1)} comes twice")
    return mapping


def _brief(error: BaseException) -> str:
    """What a parser says, on one short line."""
    if isinstance(error, yaml.YAMLError):
        said = getattr(error, "problem", None) or getattr(error, "reason", None)
    elif isinstance(error, RecursionError):
        said = "it is nested too deeply"
    else:
        said = str(error) if isinstance(error, ValueError) else None  # the others speak of PyYAML's own code
    words = " ".join(str(said or "it cannot be parsed").split())
    return words if len(words) <= 120 else f"{words[:117]}..."
