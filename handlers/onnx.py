"""The ONNX Runtime backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from handlers.errors import BackendError, one_line
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxBackend:
    """Runs an ONNX graph with ONNX Runtime.

    Args:
        path: The ``.onnx`` file, weights inside.
        signature: Names the graph's inputs and outputs.
        device: ``cpu`` or ``cuda``.
        threads: Intra-op threads of the session.

    Raises:
        BackendError: If ONNX Runtime is missing, or the file does not load on the device asked for.
    """

    def __init__(self, path: Path, signature: Signature, *, device: str, threads: int) -> None:
        try:
            import onnxruntime  # noqa: PLC0415  # only ONNX archives need it
        except ImportError as error:
            package = "onnxruntime" if device == "cpu" else "onnxruntime-gpu"
            raise BackendError(
                f"this archive needs ONNX Runtime, which is not installed; "
                f"run `pip install {package}` where TorchServe runs"
            ) from error
        self._device = device
        provider = _PROVIDERS[device]
        if device == "cuda":
            _prepare_cuda(onnxruntime, provider)
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
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[provider])
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

    def run(self, batch: TensorBatch) -> dict[str, Array]:
        """Compute one batch; see :class:`handlers.backend.Backend`."""
        results = self._session.run(self._outputs, {name: batch[name] for name in self._inputs})
        return dict(zip(self._outputs, results, strict=True))


def _prepare_cuda(onnxruntime: Any, provider: str) -> None:
    """Find the CUDA libraries, which torch's wheels carry and ONNX Runtime's do not."""
    if provider not in onnxruntime.get_available_providers():
        raise BackendError(
            f"this ONNX Runtime has no {provider}; "
            "run `pip uninstall onnxruntime` and `pip install onnxruntime-gpu` where TorchServe runs"
        )
    import torch  # noqa: F401, PLC0415  # loads them

    onnxruntime.preload_dlls()
