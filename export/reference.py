"""The reference: what the checkpoint itself answers, in eager float32 on the CPU."""

from __future__ import annotations

import torch
from torch import nn

from export.errors import CheckpointError
from handlers.calling import NamedModule
from handlers.errors import one_line
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch


class Reference:
    """The checkpoint's own answers.

    Args:
        module: In eval mode, on the CPU, in float32.
    """

    def __init__(self, module: NamedModule) -> None:
        self._module = module

    @classmethod
    def of(cls, module: nn.Module, signature: Signature) -> Reference:
        """The reference of a bare module, called as the signature says."""
        inputs, outputs = ([spec.name for spec in specs] for specs in (signature.inputs, signature.outputs))
        return cls(NamedModule(module, inputs, outputs))

    def run(self, batch: TensorBatch) -> dict[str, Array]:
        """Compute one batch with one thread, so that the same input gives the same bits.

        Args:
            batch: Inputs by name, ``[batch, ...]``.

        Returns:
            Outputs by name, ``[batch, ...]``, in the module's own dtypes.

        Raises:
            CheckpointError: If the module fails, or gives something else than the signature's outputs.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                # Copies: a module that works in place would hand its leavings to the artifact as input.
                tensors = [torch.from_numpy(batch[name].copy()) for name in self._module.input_names]
                outputs = self._module(*tensors)
                arrays = {name: output.numpy() for name, output in zip(self._module.output_names, outputs, strict=True)}
        except Exception as error:  # the module is the user's code
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in batch.items())
            raise CheckpointError(f"the checkpoint's own model fails on {shapes}: {one_line(error)}") from error
        finally:
            torch.set_num_threads(threads)
        return arrays
