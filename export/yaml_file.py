"""Files of settings: JSON or YAML, read the way people write them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from export.errors import ExportError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 1e-3 is a number as in YAML 1.2, and no key may come twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if isinstance(key_node, yaml.ScalarNode):
                if key_node.value in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key_node.value!r} comes twice", problem_mark=key_node.start_mark
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
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise error_type(f"{what} {path} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise error_type(f"{what} {path} is not UTF-8 text") from error
    if path.suffix.lower() == ".json":
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise error_type(f"{what} {path} is not valid JSON: {' '.join(str(error).split())[:100]}") from error
    try:
        content = yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date such as 2026-13-01
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        said = getattr(error, "problem", None)
        problem = f": {said}" if said else ""
        raise error_type(f"{what} {path} is not valid YAML{where}{problem}") from error
    return {} if content is None else content


def read_arguments(path: Path) -> dict[str, Any]:
    return read_settings(path, "the configuration", __import__("export.errors").errors.CheckpointError)
