"""The eager backend: a module built from its own source, with its weights."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from handlers.artifact import Artifact, ModuleSource
from handlers.calling import NamedModule
from handlers.errors import BackendError, one_line
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch
from handlers.torch_device import check_device, to_numpy, to_torch, torch_device

SOURCE_FOLDER = "source"
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class EagerBackend:
    """Builds a module with its factory, loads its weights and calls it.

    Args:
        path: A state_dict that ``torch.save`` wrote. The source of the factory lies beside it, in ``source/``.
        signature: Names of inputs and outputs.
        artifact: Factory, precision and device.
        threads: Intra-op threads of this process.

    Raises:
        BackendError: If the module cannot be built, the weights do not fit it, or the device is missing.
    """

    def __init__(self, path: Path, signature: Signature, artifact: Artifact, *, threads: int) -> None:
        torch.set_num_threads(threads)
        if artifact.module is None or artifact.precision not in _DTYPES:
            raise BackendError(
                f"an eager artifact names its factory and is {', '.join(_DTYPES)}, not {artifact.precision}; "
                "export it again"
            )
        self._signature = signature
        self._device = torch_device(artifact.device)
        module = _build(artifact.module, path.parent / SOURCE_FOLDER)
        _load_weights(module, path)
        dtype = _DTYPES[artifact.precision]
        named = NamedModule(
            module.to(self._device, dtype),
            [spec.name for spec in signature.inputs],
            [spec.name for spec in signature.outputs],
            dtype=dtype,
        )
        self._module = named.eval()
        check_device(itertools.chain(module.parameters(), module.buffers()), self._device)

    @property
    def device(self) -> str:
        """The device that it runs on."""
        return self._device.type

    def run(self, batch: TensorBatch) -> dict[str, Array]:
        """Compute one batch; see :class:`handlers.backend.Backend`."""
        with torch.inference_mode():
            outputs = self._module(*to_torch(batch, self._signature.inputs, self._device))
            return to_numpy(outputs, self._signature.outputs)


def _build(source: ModuleSource, folder: Path) -> nn.Module:
    """Call the factory, found in the archive's own source before anywhere else."""
    package, _, name = source.factory.partition(":")
    with _first_on_path(folder, package.partition(".")[0]):
        try:
            factory = getattr(importlib.import_module(package), name)
            module = factory(**source.config)
        except Exception as error:  # the archive's own code may raise anything
            raise BackendError(
                f"{source.factory} does not build the model ({type(error).__name__}: {one_line(error)}); "
                "install what it imports, or export the archive again"
            ) from error
    if not isinstance(module, nn.Module):
        raise BackendError(f"{source.factory} gives a {type(module).__name__}, not a torch module; export it again")
    return module


@contextlib.contextmanager
def _first_on_path(folder: Path, package: str) -> Iterator[None]:
    """Let the package be imported from a folder, whatever of that name this process has imported already.

    In a worker the folder stays on the path, since the module may import more when it runs. A process that has a
    package of that name, such as one that checks an archive of its own models, gets it back afterwards.
    """
    if not folder.is_dir():
        yield
        return
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    clashing = _modules(package) if _has(folder, package) else {}
    for name in clashing:
        del sys.modules[name]
    try:
        yield
    finally:
        if clashing:
            for name in _modules(package):
                del sys.modules[name]
            sys.modules.update(clashing)
            sys.path.remove(str(folder))


def _has(folder: Path, package: str) -> bool:
    return (folder / package).is_dir() or (folder / f"{package}.py").is_file()


def _modules(package: str) -> dict[str, ModuleType]:
    """What this process has imported of a package."""
    return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == package}


def _load_weights(module: nn.Module, path: Path) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        raise BackendError(f"{path.name} is not a state_dict that torch loads safely: {one_line(error)}") from error
    if not isinstance(state, Mapping):
        raise BackendError(f"{path.name} holds a {type(state).__name__}, not a state_dict; export it again")
    try:
        module.load_state_dict(state)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise BackendError(f"the weights in {path.name} do not fit the model: {one_line(error)}") from error
