"""Eager artifacts: the weights, the source that builds their module, and the versions of what that source imports."""

from __future__ import annotations

import ast
import importlib.util
import io
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import torch

from export.errors import ConversionError

SOURCE_FOLDER = "source"

# Every archive carries or needs these, in any version that its handlers work with.
_EVERYWHERE = frozenset({"torch", "numpy", "pillow", "pyyaml"})
# Taken from the archive's own root before its source folder is looked at.
_RESERVED = frozenset({"handlers", "ts", "entry", "model_handler"})
# What Python and multiprocessing call the program itself: here, the conversion.
_SCRIPTS = frozenset({"__main__", "__mp_main__"})
# Torchport's, and imported by this process whatever the model needs.
_OWN_TOOLS = frozenset({"export", "loadtest", "deploy", "torchport", "tests"})


def write_weights(module: torch.nn.Module, path: Path) -> None:
    """Write the state_dict, as ``torch.load(weights_only=True)`` reads it back.

    Raises:
        ConversionError: If something else than tensors is in it.
    """
    state = module.state_dict()
    stranger = next((name for name, value in state.items() if not isinstance(value, torch.Tensor)), None)
    if stranger is not None:
        raise ConversionError(
            f"the module's state has {stranger!r}, which is no tensor and could only be read by running code; "
            "use --format torchscript"
        )
    for name, value in state.items():
        # Views are saved with the whole of what they look at.
        state[name] = value.detach().clone() if value.untyped_storage().nbytes() != value.nbytes else value.detach()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    path.write_bytes(buffer.getvalue())


def write_source(factory: str, folder: Path) -> dict[str, str]:
    """Write the source of everything local that is imported, below ``source/``.

    Call it when the module has been built and has run once, so that everything it imports is imported.

    Args:
        factory: Import path of the module's factory.
        folder: The artifact's folder.

    Returns:
        Versions of the installed packages that this source imports, for ``artifact.requires``.

    Raises:
        ConversionError: If the factory has no source that could travel.
    """
    package = factory.partition(":")[0].partition(".")[0]
    sources = local_sources()
    used = {name for source in sources.values() for name in _imports(source)}
    if not any(Path(path).parts[0].removesuffix(".py") == package for path in sources):
        _require_installed(factory, package)
        used.add(package)
    for path, source in sources.items():
        target = folder / SOURCE_FOLDER / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source)
    return _versions(used)


def local_sources() -> dict[str, bytes]:
    """The source of every imported module that is not installed, by its path below the source folder.

    Raises:
        ConversionError: If one has a name that archives use themselves, or no source.
    """
    sources: dict[str, bytes] = {}
    for name, file in sorted(_local_modules()):
        top = name.partition(".")[0]
        if top in _RESERVED:
            raise ConversionError(
                f"the model imports {name}, and archives have a {top!r} of their own; rename that module"
            )
        if file.suffix != ".py":
            raise ConversionError(
                f"the model imports {name}, which has no Python source ({file.name}); install it as a package where "
                "the model is served, or use --format torchscript"
            )
        path = Path(*name.split("."))
        sources[(path / "__init__.py" if file.name == "__init__.py" else path.with_suffix(".py")).as_posix()] = (
            file.read_bytes()
        )
    return sources


def _local_modules() -> Iterator[tuple[str, Path]]:
    """Imported modules that are the user's or torchport's own models, and their files."""
    repository = Path(__file__).resolve().parent.parent
    installed = _installed_folders()
    for name, module in list(sys.modules.items()):
        top = name.partition(".")[0]
        file = getattr(module, "__file__", None)
        if top in _SCRIPTS or top in _OWN_TOOLS or not isinstance(file, str):
            continue
        path = Path(file).resolve()
        if path.is_relative_to(repository / "handlers") or not path.is_file():
            continue
        # Installed torchport lies among the installed packages, but nobody can be expected to install it for serving.
        if path.is_relative_to(repository / "models") or not any(path.is_relative_to(place) for place in installed):
            yield name, path


def _installed_folders() -> list[Path]:
    paths = sysconfig.get_paths()
    places = {paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")}
    places |= {*site.getsitepackages(), site.getusersitepackages()}
    # A virtual environment's own standard library is that of the Python it was made from.
    places.add(str(Path(importlib.util.__file__).parent.parent))
    return [Path(place).resolve() for place in places]


def _imports(source: bytes) -> Iterator[str]:
    """Top-level packages that a source imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.partition(".")[0]


def _require_installed(factory: str, package: str) -> None:
    if package not in metadata.packages_distributions():
        raise ConversionError(
            f"neither a source file nor an installed package holds the factory {factory}, so it cannot travel; "
            "move it into a module of its own and name that in --model"
        )


def _versions(packages: set[str]) -> dict[str, str]:
    """Exact versions of distributions, by the packages that they install; only what is imported here."""
    known: Mapping[str, list[str]] = metadata.packages_distributions()
    names = {
        distribution
        for package in packages & sys.modules.keys()
        for distribution in known.get(package, [])
        if distribution.lower() not in _EVERYWHERE and distribution.lower() != "torchport"
    }
    return {name: metadata.version(name) for name in sorted(names)}
