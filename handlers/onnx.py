"""The ONNX Runtime backend."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from handlers.errors import BackendError, one_line
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch

if TYPE_CHECKING:
    from handlers.onnx_gpu import OnnxOnGpu

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxBackend:
    """Runs an ONNX graph with ONNX Runtime.

    Args:
        path: The ``.onnx`` file, weights inside.
        signature: Names the graph's inputs and outputs.
        device: ``cpu`` or ``cuda``.
        threads: Intra-op threads of the session.
        gpu: Which GPU; None for the first.
        gpu_memory_bytes: The most of its memory that the session may take; None for no limit.
        max_batch: Samples of the largest batch that CUDA graphs are captured for; 0 for no graphs.

    Attributes:
        holds_lock: False: ONNX Runtime lets other threads of Python run.

    Raises:
        BackendError: If ONNX Runtime is missing, or the file does not load on the device asked for.
    """

    holds_lock = False

    def __init__(
        self,
        path: Path,
        signature: Signature,
        *,
        device: str,
        threads: int,
        gpu: int | None = None,
        gpu_memory_bytes: int | None = None,
        max_batch: int = 0,
    ) -> None:
        try:
            import onnxruntime  # noqa: PLC0415  # only ONNX archives need it
        except ImportError as error:
            package = "onnxruntime" if device == "cpu" else "onnxruntime-gpu"
            raise BackendError(
                f"this archive needs ONNX Runtime, which is not installed; "
                f"run `pip install {package}` where TorchServe runs"
            ) from error
        self._device = device
        open_session = functools.partial(_open_session, onnxruntime, path, signature, device=device, threads=threads)
        self._on_gpu: OnnxOnGpu | None = None
        if device == "cuda":
            _prepare_cuda(onnxruntime)
            from handlers.onnx_gpu import OnnxOnGpu  # noqa: PLC0415  # needs torch, which finds CUDA's libraries

            self._on_gpu = OnnxOnGpu(
                open_session, signature, gpu=gpu or 0, memory_bytes=gpu_memory_bytes, max_batch=max_batch
            )
            return
        self._session = open_session({})
        # A graph lacks inputs that the model makes no use of.
        self._inputs = [node.name for node in self._session.get_inputs()]
        self._outputs = [spec.name for spec in signature.outputs]

    @property
    def device(self) -> str:
        """The device that it runs on."""
        return self._device

    @property
    def lanes(self) -> int:
        """Batches under way at once."""
        return 1 if self._on_gpu is None else self._on_gpu.lanes

    def run(self, batch: TensorBatch) -> dict[str, Array]:
        """Compute one batch; see :class:`handlers.backend.Backend`."""
        if self._on_gpu is not None:
            return self._on_gpu.run(batch)
        results = self._session.run(self._outputs, {name: batch[name] for name in self._inputs})
        return dict(zip(self._outputs, results, strict=True))

    def free_memory(self) -> None:
        """Nothing: what a batch that failed has left, the session uses for smaller ones."""


def _open_session(
    onnxruntime: ModuleType,
    path: Path,
    signature: Signature,
    provider_options: Mapping[str, str],
    *,
    device: str,
    threads: int,
) -> Any:
    """A session on the device, and nowhere else, that takes and gives what the signature says."""
    provider = _PROVIDERS[device]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Spinning threads steal cores from the frontend and from other workers.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Without VNNI, its products of bytes are added up in 16 bits and overflow: int8 then answers something else on an
    # older processor than on a newer one. Changes nothing where they cannot.
    options.add_session_config_entry("session.x64quantprecision", "1")
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            str(path),
            options,
            providers=[provider],
            provider_options=[dict(provider_options)],
            # Otherwise it prints the error, and starts on the CPU.
            enable_fallback=0,
        )
    except Exception as error:  # ONNX Runtime's exception classes share no base below Exception
        raise BackendError(
            f"{path.name} does not load in ONNX Runtime {onnxruntime.__version__}: {one_line(error)}"
        ) from error
    # Asked for a provider whose libraries are missing, ONNX Runtime takes the CPU all the same.
    if session.get_providers()[:1] != [provider]:
        raise BackendError(
            f"ONNX Runtime chose {', '.join(session.get_providers())} instead of {provider}; "
            "run `torchport doctor` to see what is missing"
        )
    _check_gpu(session, provider, provider_options.get("device_id"))
    _check_names(session, path, signature)
    return session


def _check_names(session: Any, path: Path, signature: Signature) -> None:
    """Refuse a graph that takes or lacks what the signature does not say."""
    inputs = {node.name for node in session.get_inputs()}
    outputs = {node.name for node in session.get_outputs()}
    strange = sorted(inputs - {spec.name for spec in signature.inputs})
    absent = [spec.name for spec in signature.outputs if spec.name not in outputs]
    if strange or absent:
        fault = f"takes {strange[0]!r}" if strange else f"does not give {absent[0]!r}"
        raise BackendError(f"{path.name} {fault}, unlike the signature; export it again")


def _check_gpu(session: Any, provider: str, gpu: str | None) -> None:
    """Refuse a session on another GPU than the one asked for."""
    found = session.get_provider_options()[provider].get("device_id")
    if gpu is not None and found != gpu:
        raise BackendError(
            f"ONNX Runtime chose GPU {found} instead of {gpu}; run `torchport doctor` to see what is there"
        )


def _prepare_cuda(onnxruntime: ModuleType) -> None:
    """Find the CUDA libraries, which torch's wheels carry and ONNX Runtime's do not."""
    provider = _PROVIDERS["cuda"]
    if provider not in onnxruntime.get_available_providers():
        raise BackendError(
            f"this ONNX Runtime has no {provider}; "
            "run `pip uninstall onnxruntime` and `pip install onnxruntime-gpu` where TorchServe runs"
        )
    import torch  # noqa: F401, PLC0415  # loads them

    onnxruntime.preload_dlls()
