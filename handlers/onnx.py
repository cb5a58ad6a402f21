"""The ONNX Runtime backend."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from handlers.errors import BackendError, one_line
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch

if TYPE_CHECKING:
    from handlers.staging import Staging

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
        self._gpu = gpu or 0
        provider = _PROVIDERS[device]
        if device == "cuda":
            _prepare_cuda(onnxruntime, provider)
        provider_options = cuda_options(self._gpu, memory_bytes=gpu_memory_bytes) if device == "cuda" else {}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Spinning threads steal cores from the frontend and from other workers.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Without VNNI, its products of bytes are added up in 16 bits and overflow: int8 then answers something else on
        # an older processor than on a newer one. Changes nothing where they cannot.
        options.add_session_config_entry("session.x64quantprecision", "1")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=[provider], provider_options=[provider_options]
            )
        except Exception as error:  # ONNX Runtime's exception classes share no base below Exception
            raise BackendError(
                f"{path.name} does not load in ONNX Runtime {onnxruntime.__version__}: {one_line(error)}"
            ) from error
        # Asked for a provider that cannot start, ONNX Runtime silently takes another one.
        if self._session.get_providers()[:1] != [provider]:
            raise BackendError(
                f"ONNX Runtime chose {', '.join(self._session.get_providers())} instead of {provider}; "
                "run `torchport doctor` to see what is missing"
            )
        self._inputs, self._outputs = self._names(path, signature)
        self._given = [spec.name for spec in signature.inputs]
        self._staging: Staging | None = None
        if device == "cuda":
            _check_gpu(self._session, provider, self._gpu)
            self._staging = _staging(signature, self._gpu)

    def _names(self, path: Path, signature: Signature) -> tuple[list[str], list[str]]:
        """The graph's inputs and the signature's outputs. A graph lacks inputs that the model makes no use of."""
        inputs = [node.name for node in self._session.get_inputs()]
        outputs = {node.name for node in self._session.get_outputs()}
        strange = sorted(set(inputs) - {spec.name for spec in signature.inputs})
        absent = [spec.name for spec in signature.outputs if spec.name not in outputs]
        if strange or absent:
            fault = f"takes {strange[0]!r}" if strange else f"does not give {absent[0]!r}"
            raise BackendError(f"{path.name} {fault}, unlike the signature; export it again")
        return inputs, [spec.name for spec in signature.outputs]

    @property
    def device(self) -> str:
        """The device that it runs on."""
        return self._device

    @property
    def lanes(self) -> int:
        """Batches under way at once."""
        return 1 if self._staging is None else self._staging.lanes

    def run(self, batch: TensorBatch) -> dict[str, Array]:
        """Compute one batch; see :class:`handlers.backend.Backend`."""
        if self._device == "cuda":
            results = self._run_bound(batch)
        else:
            results = self._session.run(self._outputs, {name: batch[name] for name in self._inputs})
        return dict(zip(self._outputs, results, strict=True))

    def free_memory(self) -> None:
        """Nothing: what a batch that failed has left, the session uses for smaller ones."""

    def _run_bound(self, batch: TensorBatch) -> list[Array]:
        """Compute with inputs and outputs on the GPU: one copy in for each input, and one copy out for each output."""
        binding = self._session.io_binding()
        if self._staging is None:
            for name in self._inputs:
                binding.bind_cpu_input(name, np.ascontiguousarray(batch[name]))
            return self._outputs_of(binding)
        # ONNX Runtime computes on a stream of its own, which does not wait for torch's.
        with self._staging.lent(batch) as tensors:
            for name, tensor in zip(self._given, tensors, strict=True):
                if name in self._inputs:
                    dtype, shape = batch[name].dtype, list(tensor.shape)
                    binding.bind_input(name, self._device, self._gpu, dtype, shape, tensor.data_ptr())
            return self._outputs_of(binding)

    def _outputs_of(self, binding: Any) -> list[Array]:
        for name in self._outputs:
            binding.bind_output(name, self._device, self._gpu)
        self._session.run_with_iobinding(binding)
        results: list[Array] = binding.copy_outputs_to_cpu()
        return results


def cuda_options(gpu: int, *, memory_bytes: int | None = None) -> dict[str, str]:
    """The options of ONNX Runtime's CUDA provider.

    Args:
        gpu: Which GPU.
        memory_bytes: The most memory that its arena may have; None for no limit.
    """
    options = {
        "device_id": str(gpu),
        # By default it tries every algorithm for every new shape, and batches have many.
        "cudnn_conv_algo_search": "HEURISTIC",
        # By default memory grows in powers of two, which other workers on the GPU would miss.
        "arena_extend_strategy": "kSameAsRequested",
        # As in torch (handlers/torch_device.py): fp32 means fp32.
        "use_tf32": "0",
    }
    if memory_bytes is not None:
        options["gpu_mem_limit"] = str(memory_bytes)
    return options


def _prepare_cuda(onnxruntime: Any, provider: str) -> None:
    """Find the CUDA libraries, which torch's wheels carry and ONNX Runtime's do not."""
    if provider not in onnxruntime.get_available_providers():
        raise BackendError(
            f"this ONNX Runtime has no {provider}; "
            "run `pip uninstall onnxruntime` and `pip install onnxruntime-gpu` where TorchServe runs"
        )
    import torch  # noqa: F401, PLC0415  # loads them

    onnxruntime.preload_dlls()


def _check_gpu(session: Any, provider: str, gpu: int) -> None:
    """Refuse a session on another GPU than the one asked for."""
    found = session.get_provider_options()[provider].get("device_id")
    if found != str(gpu):
        raise BackendError(
            f"ONNX Runtime chose GPU {found} instead of {gpu}; run `torchport doctor` to see what is there"
        )


def _staging(signature: Signature, gpu: int) -> Staging | None:
    """How batches get to the GPU: as torch does it, if it is a torch for GPUs."""
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        return None
    from handlers.staging import Staging  # noqa: PLC0415

    return Staging.on(torch.device("cuda", gpu), signature)
