"""How a batch gets to the device and its outputs come back.

On the CPU tensors are copies of the arrays. For a GPU they pass through pinned memory, which the GPU reads and writes
by itself: one copy in for each input, on a stream of their own, and one copy out for each output. There are two
*lanes*, each with memory of its own, kept from batch to batch: while one batch computes, the next is laid out and
copied in by another thread, and the outputs of the last are read. The GPU still computes one batch after the other.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from handlers.backend import MOST_LANES
from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch
from handlers.torch_device import check_count, to_numpy, to_torch, widened
from handlers.transfers import CudaTransfers, Transfers

_IMAGE_AXES = 4

Compute = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""From the inputs on the device, in the signature's order, to the outputs; it may change its inputs."""


class Exchange(Protocol):
    """Takes the batches of a signature to a device and brings outputs back."""

    @property
    def lanes(self) -> int:
        """How many batches can be under way at once, each in a thread of its own."""
        ...

    def run(self, batch: TensorBatch, compute: Compute) -> dict[str, Array]:
        """Compute one batch on the device, for inference only.

        Args:
            batch: Inputs by name, each ``[batch, ...]``.
            compute: What is done with them there.

        Returns:
            The outputs by name; halves as float32. The arrays are the caller's own.

        Raises:
            BackendError: If it gives fewer or more outputs than the signature says.
        """
        ...


class DirectExchange:
    """The exchange of the CPU; see :class:`Exchange`."""

    lanes = 1

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._device = torch.device("cpu")

    def run(self, batch: TensorBatch, compute: Compute) -> dict[str, Array]:
        """Compute on copies of the inputs."""
        with torch.inference_mode():
            outputs = compute(to_torch(batch, self._signature.inputs, self._device))
            return to_numpy(outputs, self._signature.outputs)


class Staging:
    """The exchange of a GPU; see :class:`Exchange`.

    Args:
        signature: Inputs and outputs.
        transfers: How bytes get to the device and back, for each lane.
        channels_last: Whether inputs of four axes lie in memory with their channels last, as convolutions like them.

    Attributes:
        lanes: As many as there are transfers.
    """

    def __init__(self, signature: Signature, transfers: Sequence[Transfers], *, channels_last: bool = False) -> None:
        self.lanes = len(transfers)
        # In turn, so that warming up prepares all of them.
        self._free: queue.SimpleQueue[_Lane] = queue.SimpleQueue()
        for own in transfers:
            self._free.put(_Lane(signature, own, channels_last=channels_last))
        # The device computes one batch after the other, and a CUDA graph's memory is every batch's.
        self._turn = threading.Lock()

    @classmethod
    def on(cls, device: torch.device, signature: Signature, *, channels_last: bool = False) -> Staging:
        """The staging of a CUDA device."""
        return cls(signature, [CudaTransfers(device) for _ in range(MOST_LANES)], channels_last=channels_last)

    def run(
        self, batch: TensorBatch, compute: Compute, *, shapes: Sequence[Sequence[int]] | None = None
    ) -> dict[str, Array]:
        """Compute one batch; see :class:`Exchange`.

        Args:
            batch: Inputs by name, each ``[batch, ...]``.
            compute: Called by one thread at a time.
            shapes: Of the tensors that it gets, in the signature's order; None for the batch's own. They may be larger
                than the batch, which is then filled up: dynamic axes with the input's padding, and the batch with
                copies of its first sample.
        """
        with self._lane() as lane:
            tensors = lane.take_in(batch, shapes)
            with self._turn:
                lane.transfers.join()
                try:
                    hosts = lane.start_out(compute(tensors))
                except BaseException:
                    # Nobody waits for what was launched, and it may write to its inputs.
                    lane.transfers.begin()
                    raise
            return lane.finish_out(hosts)

    @contextmanager
    def lent(self, batch: TensorBatch) -> Iterator[list[Tensor]]:
        """The inputs of a batch on the device, for who computes on another stream than torch's, one at a time.

        Args:
            batch: Inputs by name, each ``[batch, ...]``.
        """
        with self._lane() as lane:
            tensors = lane.take_in(batch, None)
            with self._turn:
                lane.transfers.arrive()
                yield tensors

    @contextmanager
    def _lane(self) -> Iterator[_Lane]:
        """One that nobody else has, for inference only, on the device."""
        lane = self._free.get()
        try:
            with torch.inference_mode(), lane.transfers.on_device():
                yield lane
        finally:
            self._free.put(lane)


class _Lane:
    """The memory that one batch at a time passes through.

    Attributes:
        transfers: Copies.
    """

    def __init__(self, signature: Signature, transfers: Transfers, *, channels_last: bool) -> None:
        self.transfers = transfers
        self._signature = signature
        self._channels_last = channels_last
        self._inputs = {spec.name: (_Memory(transfers.pinned), _Memory(transfers.room)) for spec in signature.inputs}
        self._outputs = {spec.name: _Memory(transfers.pinned) for spec in signature.outputs}

    def take_in(self, batch: TensorBatch, shapes: Sequence[Sequence[int]] | None) -> list[Tensor]:
        """Copy the inputs to the device; see :meth:`Staging.run`. They are there once the transfers have joined."""
        # The last batch may have failed before it waited for its outputs.
        self.transfers.arrive()
        tensors = []
        for i, spec in enumerate(self._signature.inputs):
            array = batch[spec.name]
            shape = array.shape if shapes is None else shapes[i]
            dtype = torch_dtype(array.dtype)
            last = lies_channels_last(shape, self._channels_last)
            pinned, room = self._inputs[spec.name]
            host, _ = pinned.view(shape, dtype, channels_last=last)
            target, is_new = room.view(shape, dtype, channels_last=last)
            if is_new:
                self.transfers.begin()
            _fill(host.numpy(), array, spec.padding)
            self.transfers.copy_in(target, host)
            tensors.append(target)
        return tensors

    def start_out(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Begin to copy the outputs to the host, and say where to."""
        specs = self._signature.outputs
        check_count(outputs, specs)
        hosts = []
        for spec, output in zip(specs, outputs, strict=True):
            tensor = widened(output)
            host, _ = self._outputs[spec.name].view(tensor.shape, tensor.dtype)
            self.transfers.copy_out(host, tensor)
            hosts.append(host)
        return hosts

    def finish_out(self, hosts: Sequence[Tensor]) -> dict[str, Array]:
        """Wait for the outputs; the arrays are the caller's own."""
        self.transfers.leave()
        return {spec.name: np.array(host.numpy()) for spec, host in zip(self._signature.outputs, hosts, strict=True)}


class _Memory:
    """Bytes, of the host or of the device, that become more when a batch needs more."""

    def __init__(self, allocate: Callable[[int], Tensor]) -> None:
        self._allocate = allocate
        self._bytes: Tensor | None = None

    def view(self, shape: Sequence[int], dtype: torch.dtype, *, channels_last: bool = False) -> tuple[Tensor, bool]:
        """The beginning of them as a tensor, and whether they were allocated for it just now."""
        size = math.prod(shape) * dtype.itemsize
        memory = self._bytes
        is_new = False
        if memory is None or memory.numel() < size:
            is_new = True
            self._bytes = memory = None  # first, so that both need not be there at once
            self._bytes = memory = self._allocate(size)
        return shaped(memory, shape, dtype, channels_last=channels_last), is_new


def shaped(memory: Tensor, shape: Sequence[int], dtype: torch.dtype, *, channels_last: bool = False) -> Tensor:
    """The beginning of a piece of memory as a tensor of any shape and dtype.

    Args:
        memory: ``[size]`` uint8, large enough.
        shape: Of the tensor.
        dtype: Of the tensor.
        channels_last: Whether its second axis is the one that lies together in memory; it then has four.
    """
    flat = memory[: math.prod(shape) * dtype.itemsize].view(dtype)
    if not channels_last:
        return flat.view(tuple(shape))
    batch, channels, height, width = shape
    return flat.view(batch, height, width, channels).permute(0, 3, 1, 2)


def lies_channels_last(shape: Sequence[int], wanted: bool) -> bool:
    """Whether a tensor of that shape lies with its channels last, where that is wanted: pictures do."""
    return wanted and len(shape) == _IMAGE_AXES


def torch_dtype(dtype: np.dtype[np.generic]) -> torch.dtype:
    """Torch's name of a dtype."""
    return torch.from_numpy(np.empty(0, dtype)).dtype


def _fill(target: Array, array: Array, padding: float | None) -> None:
    """Write a batch over an array that is at least as large."""
    if target.shape == array.shape:
        target[...] = array
        return
    rows, *sizes = array.shape
    if target.shape[1:] != array.shape[1:]:
        if padding is None:
            raise ValueError(f"an input of the shape {array.shape} has no padding to fill {target.shape} up with")
        target[:rows] = padding
    target[(slice(rows), *map(slice, sizes))] = array
    target[rows:] = target[:1]


def build_exchange(signature: Signature, device: torch.device) -> Exchange:
    """The exchange of a device."""
    return DirectExchange(signature) if device.type == "cpu" else Staging.on(device, signature)
