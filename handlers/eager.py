"""The eager backend: a module built from its own source, with its weights."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import pickle
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import nn

from handlers.artifact import Artifact, ModuleSource
from handlers.calling import NamedModule
from handlers.cuda_graphs import CudaGraphs
from handlers.cuda_recorder import CudaRecorder
from handlers.errors import BackendError, one_line
from handlers.signature import Signature
from handlers.staging import Exchange, Staging, build_exchange
from handlers.tensors import Array, TensorBatch
from handlers.torch_device import check_device, free_cached, torch_device

SOURCE_FOLDER = "source"
_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class EagerBackend:
    """Builds a module with its factory, loads its weights and calls it.

    On a GPU the usual shapes of batches are replayed as CUDA graphs, and the weights and inputs of convolutions have
    their channels last.

    Args:
        path: A state_dict that ``torch.save`` wrote. The source of the factory lies beside it, in ``source/``.
        signature: Names of inputs and outputs.
        artifact: Factory, precision and device.
        threads: Intra-op threads of this process.
        gpu: Which GPU; None for torch's current one.
        max_batch: Samples of the largest batch that CUDA graphs are captured for; 0 for no graphs.

    Attributes:
        holds_lock: False: every operator lets other threads of Python run.

    Raises:
        BackendError: If the module cannot be built, the weights do not fit it, or the device is missing.
    """

    holds_lock = False

    def __init__(
        self,
        path: Path,
        signature: Signature,
        artifact: Artifact,
        *,
        threads: int,
        gpu: int | None = None,
        max_batch: int = 0,
    ) -> None:
        torch.set_num_threads(threads)
        if artifact.module is None or artifact.precision not in _DTYPES:
            raise BackendError(
                f"an eager artifact names its factory and is {', '.join(_DTYPES)}, not {artifact.precision}; "
                "export it again"
            )
        self._device = torch_device(artifact.device, gpu)
        module = _build(artifact.module, path.parent / SOURCE_FOLDER)
        _load_weights(module, path)
        dtype = _DTYPES[artifact.precision]
        module = module.to(self._device, dtype)
        named = NamedModule(
            module,
            [spec.name for spec in signature.inputs],
            [spec.name for spec in signature.outputs],
            dtype=dtype,
        )
        self._module = named.eval()
        check_device(itertools.chain(module.parameters(), module.buffers()), self._device)
        self._exchange: Exchange
        self._graphs: CudaGraphs | None = None
        if artifact.device == "cuda":
            self._prepare_gpu(module, signature, max_batch)
        else:
            self._exchange = build_exchange(signature, self._device)

    def _prepare_gpu(self, module: nn.Module, signature: Signature, max_batch: int) -> None:
        pictures = any(isinstance(layer, nn.Conv2d) for layer in module.modules())
        if pictures:
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
        staging = Staging.on(self._device, signature, channels_last=pictures)
        self._exchange = staging
        if max_batch:
            # Without dynamic axes, every shape is one of the graphs'.
            recorder = CudaRecorder(self._device, self._compute, tune=not signature.axes)
            self._graphs = CudaGraphs(signature, staging, recorder, max_batch=max_batch, channels_last=pictures)

    @property
    def device(self) -> str:
        """The device that it runs on."""
        return self._device.type

    @property
    def lanes(self) -> int:
        """Batches under way at once."""
        return self._exchange.lanes

    def run(self, batch: TensorBatch) -> dict[str, Array]:
        """Compute one batch; see :class:`handlers.backend.Backend`."""
        outputs = self._graphs.run(batch) if self._graphs else None
        if outputs is None:
            outputs = self._exchange.run(batch, self._compute)
        return outputs

    def _compute(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        outputs: Sequence[torch.Tensor] = self._module(*tensors)
        return outputs

    def free_memory(self) -> None:
        """Give back what torch keeps; see :class:`handlers.backend.Backend`."""
        free_cached(self._device)


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
