"""What a batch asks of a device, for gpu_limits.py: operations, and the bytes that it must move."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one sample asks for, and what every batch does whatever its size.

    Attributes:
        flops: Of one sample: matrix products and convolutions, two for a multiplication with its addition.
        activation_bytes: Of one sample: inputs read and outputs written by every layer that has none inside.
        weight_bytes: Of every batch: each weight read once, those of embeddings excepted, which are looked up.
    """

    flops: float
    activation_bytes: float
    weight_bytes: float

    def floor_s(self, samples: int, flops_per_s: float, bytes_per_s: float) -> float:
        """Seconds below which a batch cannot be computed layer by layer."""
        return max(samples * self.flops / flops_per_s, self.bytes(samples) / bytes_per_s)

    def bytes(self, samples: int) -> float:
        """Of a batch."""
        return self.weight_bytes + samples * self.activation_bytes


def count_work(module: nn.Module, sample: Tensor) -> Work:
    """Count the work of one sample.

    Args:
        module: On the sample's device.
        sample: ``[1, ...]``.
    """
    weights = sum(
        tensor.nbytes
        for layer in module.modules()
        if not isinstance(layer, nn.Embedding)
        for tensor in [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    )
    moved = 0

    def add(layer: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        nonlocal moved
        moved += sum(tensor.nbytes for tensor in [*inputs, output] if isinstance(tensor, Tensor))

    leaves = [layer for layer in module.modules() if not any(layer.children())]
    hooks = [layer.register_forward_hook(add) for layer in leaves]
    try:
        # Attention as two matrix products: not every fused kernel has its formula in every torch.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            module(sample)
    finally:
        for hook in hooks:
            hook.remove()
    return Work(flops=counter.get_total_flops(), activation_bytes=moved, weight_bytes=weights)


class WorkByShape:
    """Counts once for every shape of a sample.

    Args:
        module: What is counted.
        prepare: Makes the module's input of a sample's shape.
    """

    def __init__(self, module: nn.Module, prepare: Callable[[tuple[int, ...]], Tensor]) -> None:
        self._module = module
        self._prepare = prepare
        self._known: dict[tuple[int, ...], Work] = {}

    def of(self, shape: tuple[int, ...]) -> Work:
        """The work of a sample of a shape, without the batch axis."""
        if shape not in self._known:
            self._known[shape] = count_work(self._module, self._prepare(shape))
        return self._known[shape]
