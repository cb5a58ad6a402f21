"""Who may import whom: the rule that keeps archives complete and trainings free of servers."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("models", "handlers", "export", "deploy", "loadtest")
MAY_IMPORT = {
    "handlers": set(),
    "models": set(),
    "export": {"handlers"},
    "deploy": {"export", "handlers"},
    "loadtest": {"deploy", "handlers"},
}
# What a server must have installed, as far as its archives need it: see docs/serving.md.
# PyYAML comes with TorchServe, which parses the archive's YAML.
HANDLER_LIBRARIES = {"numpy", "torch", "PIL", "onnxruntime", "tokenizers"}
# They take the place of TorchServe's own code, inside of it; and do without where it is not installed.
IMPORT_TORCHSERVE = {"handlers/continuous.py", "handlers/wire.py"}


def imports(package: str) -> Iterator[tuple[str, str]]:
    """Yields (file, top-level name) of every import statement, wherever it stands."""
    for path in sorted((ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [package if node.level else str(node.module)]
            else:
                continue
            for name in names:
                yield str(path.relative_to(ROOT)), name.partition(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_imports_only_those_it_may(package: str) -> None:
    foreign = set(PACKAGES) | {"torchport", "tests"}
    allowed = MAY_IMPORT[package] | {package}
    assert [(file, name) for file, name in imports(package) if name in foreign - allowed] == []


def test_handlers_need_only_what_a_server_has() -> None:
    allowed = HANDLER_LIBRARIES | {"handlers"} | sys.stdlib_module_names
    foreign = {(file, name) for file, name in imports("handlers") if name not in allowed}
    # The second only where a setting asks for it.
    assert foreign == {(file, "ts") for file in IMPORT_TORCHSERVE} | {("handlers/jpeg_batches.py", "torchvision")}


@pytest.mark.parametrize("file", sorted(IMPORT_TORCHSERVE))
def test_torchserve_is_imported_inside_functions_only(file: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]

    def imported(nodes: Iterable[ast.AST]) -> list[int]:
        return [
            node.lineno
            for node in nodes
            if (isinstance(node, ast.Import) and any(alias.name.partition(".")[0] == "ts" for alias in node.names))
            or (isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == "ts")
        ]

    inside = {line for function in functions for line in imported(ast.walk(function))}
    assert set(imported(ast.walk(tree))) == inside != set()


def test_only_the_locustfile_imports_locust_and_gevent() -> None:
    importers = {file for package in PACKAGES for file, name in imports(package) if name in ("locust", "gevent")}
    assert importers == {"loadtest/locustfile.py"}
