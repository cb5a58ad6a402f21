"""The ONNX Runtime backend."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from handlers.errors import BackendError
from handlers.signature import Signature

_PROVIDER = "CPUExecutionProvider"


class OnnxBackend:
    """Runs an ONNX graph with ONNX Runtime on the CPU.

    Args:
        path: The ``.onnx`` file, weights inside.
        signature: Names the graph's input and output.
        threads: Intra-op threads of the session.

    Raises:
        BackendError: If ONNX Runtime is missing, or the file does not load on the provider asked for.
    """

    def __init__(self, path: Path, signature: Signature, *, threads: int) -> None:
        try:
            import onnxruntime  # noqa: PLC0415  # only ONNX archives need it
        except ImportError as error:
            raise BackendError(
                "this archive needs ONNX Runtime, which is not installed; "
                "run `pip install onnxruntime` where TorchServe runs"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # Spinning threads steal cores from the frontend and from other workers.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=[_PROVIDER])
        except Exception as error:  # ONNX Runtime's exception classes share no base below Exception
            reason = str(error).strip().splitlines()[0]
            raise BackendError(
                f"{path.name} does not load in ONNX Runtime {onnxruntime.__version__}: {reason}"
            ) from error
        # Asked for a provider that cannot start, ONNX Runtime silently takes another one.
        if self._session.get_providers()[:1] != [_PROVIDER]:
            raise BackendError(f"ONNX Runtime chose {self._session.get_providers()} instead of {_PROVIDER}")
        self._input = signature.inputs[0].name
        self._outputs = [signature.outputs[0].name]

    @property
    def device(self) -> str:
        """The device that it runs on."""
        return "cpu"

    def run(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        """Compute one batch; see :class:`handlers.backend.Backend`."""
        output: NDArray[np.float32] = self._session.run(self._outputs, {self._input: batch})[0]
        return output
