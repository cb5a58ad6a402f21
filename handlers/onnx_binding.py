"""ONNX Runtime with inputs and outputs that stay on its device, and with graphs that it captures there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch

if TYPE_CHECKING:
    from torch import Tensor

# The option of a run that says which graph it captures, or replays if it was.
_NUMBER = "gpu_graph_id"
_NO_GRAPH = -1


class BoundSession:
    """Runs a session, with one copy for each input and output at most.

    Args:
        session: An ``onnxruntime.InferenceSession``.
        signature: Inputs and outputs.
        device: ``cpu`` or ``cuda``, as the session's.
        index: Number of the GPU.
    """

    def __init__(self, session: Any, signature: Signature, *, device: str, index: int) -> None:
        self._session = session
        self._signature = signature
        self._device = device
        self._index = index
        # A graph lacks inputs that the model makes no use of.
        self._taken = {node.name for node in session.get_inputs()}
        self._plain = _options(_NO_GRAPH)

    def bind_host(self, batch: TensorBatch) -> Any:
        """A binding to arrays, which are copied to the device.

        Args:
            batch: Inputs by name.
        """
        binding = self._session.io_binding()
        for name in self._taken:
            binding.bind_cpu_input(name, np.ascontiguousarray(batch[name]))
        return binding

    def bind_device(self, tensors: Sequence[Tensor]) -> Any:
        """A binding to tensors on the device, which are read at every run.

        Args:
            tensors: The inputs, in the signature's order. They must outlive the binding.
        """
        binding = self._session.io_binding()
        for spec, tensor in zip(self._signature.inputs, tensors, strict=True):
            if spec.name in self._taken:
                binding.bind_input(spec.name, *self._place(tensor, spec.numpy_dtype))
        return binding

    def bind_outputs(self, binding: Any, tensors: Sequence[Tensor]) -> None:
        """Let every run with a binding write to these tensors.

        Args:
            binding: To inputs.
            tensors: The outputs, in the signature's order. They must outlive the binding.
        """
        for spec, tensor in zip(self._signature.outputs, tensors, strict=True):
            binding.bind_output(spec.name, *self._place(tensor, spec.numpy_dtype))

    def run(self, binding: Any) -> list[Array]:
        """The outputs, in the signature's order.

        Args:
            binding: To inputs.
        """
        for spec in self._signature.outputs:
            binding.bind_output(spec.name, self._device, self._index)
        self._session.run_with_iobinding(binding, self._plain)
        results: list[Array] = binding.copy_outputs_to_cpu()
        return results

    def run_graph(self, binding: Any, number: int) -> None:
        """Capture a graph, or replay it if this thread has captured it; return when it is done.

        Args:
            binding: To inputs and outputs; the same for every run of a number.
            number: Of the graph, from 0.
        """
        self._session.run_with_iobinding(binding, _options(number))

    def _place(self, tensor: Tensor, dtype: np.dtype[Any]) -> tuple[str, int, np.dtype[Any], list[int], int]:
        return self._device, self._index, dtype, list(tensor.shape), tensor.data_ptr()


def _options(number: int) -> Any:
    import onnxruntime  # noqa: PLC0415  # only ONNX archives need it

    options = onnxruntime.RunOptions()
    options.add_run_config_entry(_NUMBER, str(number))
    return options
