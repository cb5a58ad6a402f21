"""How a batch gets to the device and its outputs come back.

On the CPU tensors are copies of the arrays. For a GPU they pass through pinned memory, which the GPU reads and writes
by itself: one copy in for each input, on a stream of their own, so that the next input is laid out meanwhile; and one
copy out for each output. Pinned memory takes long to get, so it is kept from batch to batch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from handlers.signature import Signature
from handlers.tensors import Array, TensorBatch
from handlers.torch_device import check_count, to_numpy, to_torch, widened

_IMAGE_AXES = 4


class Exchange(Protocol):
    """Takes the batches of a signature to a device and brings outputs back."""

    def computing(self) -> AbstractContextManager[object]:
        """What holds while a batch is taken in, computed and given out: inference only, and the right device."""
        ...

    def take_in(self, batch: TensorBatch) -> list[Tensor]:
        """The inputs on the device, in the signature's order; the module may change them.

        Args:
            batch: Inputs by name, each ``[batch, ...]``.
        """
        ...

    def give_out(self, outputs: Sequence[Tensor]) -> dict[str, Array]:
        """The outputs as arrays, by name; halves as float32.

        Args:
            outputs: In the signature's order.

        Raises:
            BackendError: If there are fewer or more than the signature says.
        """
        ...


class DirectExchange:
    """The exchange of the CPU; see :class:`Exchange`."""

    def __init__(self, signature: Signature) -> None:
        self._signature = signature
        self._device = torch.device("cpu")

    def computing(self) -> AbstractContextManager[object]:
        """Inference only."""
        return torch.inference_mode()

    def take_in(self, batch: TensorBatch) -> list[Tensor]:
        """Copy the inputs."""
        return to_torch(batch, self._signature.inputs, self._device)

    def give_out(self, outputs: Sequence[Tensor]) -> dict[str, Array]:
        """The outputs as arrays."""
        return to_numpy(outputs, self._signature.outputs)


class Transfers(Protocol):
    """Copies between host and device that go on while Python does."""

    def on_device(self) -> AbstractContextManager[object]:
        """Make the device the current one of this thread."""
        ...

    def pinned(self, size: int) -> Tensor:
        """So many bytes of the host that the device reads and writes by itself: ``[size]`` uint8."""
        ...

    def empty(self, shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        """A tensor on the device, of whatever values."""
        ...

    def arrive(self) -> None:
        """Wait until all of it was copied in, and the host's memory may be written again."""
        ...

    def begin(self) -> None:
        """Let what is copied in come after what was computed before."""
        ...

    def copy_in(self, target: Tensor, source: Tensor) -> None:
        """Start to copy from pinned memory to the device."""
        ...

    def join(self) -> None:
        """Let what is computed from now on see what was copied in."""
        ...

    def copy_out(self, target: Tensor, source: Tensor) -> None:
        """Start to copy to pinned memory, once what was computed before is there."""
        ...

    def leave(self) -> None:
        """Wait until all of it was copied out."""
        ...


class CudaTransfers:
    """The transfers of a CUDA device, with a stream of their own for what is copied in; see :class:`Transfers`.

    No tensor needs ``record_stream``: each is allocated, and freed, for the stream that computes, and that stream waits
    for the copies (:meth:`join`) before it does anything else.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copying = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        # Waiting for an event that nothing was recorded for returns at once.
        self._copied_in = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied_out = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def on_device(self) -> AbstractContextManager[object]:
        """Make the device the current one: without it, pinned memory would take room on the first GPU."""
        return torch.cuda.device(self._device)

    def pinned(self, size: int) -> Tensor:
        """Pinned memory."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def empty(self, shape: Sequence[int], dtype: torch.dtype, memory_format: torch.memory_format) -> Tensor:
        """A tensor that belongs to the stream that computes."""
        return torch.empty(tuple(shape), dtype=dtype, device=self._device, memory_format=memory_format)

    def arrive(self) -> None:
        """Wait for the copies in."""
        self._copied_in.synchronize()

    def begin(self) -> None:
        """Put the copies behind what computes: it may still use memory that a new tensor gets."""
        self._copying.wait_stream(torch.cuda.current_stream(self._device))

    def copy_in(self, target: Tensor, source: Tensor) -> None:
        """Copy on the stream of the copies."""
        with torch.cuda.stream(self._copying):
            target.copy_(source, non_blocking=True)

    def join(self) -> None:
        """Put what computes behind the copies."""
        self._copied_in.record(self._copying)
        torch.cuda.current_stream(self._device).wait_event(self._copied_in)

    def copy_out(self, target: Tensor, source: Tensor) -> None:
        """Copy on the stream that computes."""
        target.copy_(source, non_blocking=True)

    def leave(self) -> None:
        """Wait for the copies out; other threads of Python go on meanwhile."""
        self._copied_out.record(torch.cuda.current_stream(self._device))
        self._copied_out.synchronize()


class Staging:
    """The exchange of a GPU; see :class:`Exchange`. One batch at a time passes through it.

    Args:
        signature: Inputs and outputs.
        transfers: How bytes get to the device and back.
        channels_last: Whether inputs of four axes lie in memory with their channels last, as convolutions like them.
    """

    def __init__(self, signature: Signature, transfers: Transfers, *, channels_last: bool = False) -> None:
        self._signature = signature
        self._transfers = transfers
        self._channels_last = channels_last
        self._lock = threading.Lock()
        self._inputs = {spec.name: _HostBuffer(transfers.pinned) for spec in signature.inputs}
        self._outputs = {spec.name: _HostBuffer(transfers.pinned) for spec in signature.outputs}

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inference only, on the device, and nobody else meanwhile: the buffers are shared."""
        with self._lock, torch.inference_mode(), self._transfers.on_device():
            yield

    def take_in(self, batch: TensorBatch, into: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Copy the inputs to the device.

        Args:
            batch: Inputs by name, each ``[batch, ...]``.
            into: Tensors on the device to copy to, of the inputs' dtypes. They may be larger than the batch, which is
                then filled up: dynamic axes with the input's padding, and the batch with copies of its first sample.

        Returns:
            ``into``, or tensors of the batch's own shapes.
        """
        tensors: list[Tensor] = []
        # The last batch may have failed before it waited for its outputs.
        self._transfers.arrive()
        self._transfers.begin()
        try:
            for i, spec in enumerate(self._signature.inputs):
                array = batch[spec.name]
                target = self._room_for(array) if into is None else into[i]
                last = lies_channels_last(target.shape, self._channels_last)
                host = self._inputs[spec.name].view(target.shape, target.dtype, channels_last=last)
                _fill(host.numpy(), array, spec.padding)
                self._transfers.copy_in(target, host)
                tensors.append(target)
        finally:
            # Even if there was no memory for the last one: the first ones are being written.
            self._transfers.join()
        return tensors

    def wait(self) -> None:
        """Wait until the inputs are on the device, for who computes on another stream than torch's."""
        self._transfers.arrive()

    def give_out(self, outputs: Sequence[Tensor]) -> dict[str, Array]:
        """Copy the outputs to the host; the arrays are the caller's own."""
        specs = self._signature.outputs
        check_count(outputs, specs)
        hosts: list[Tensor] = []
        for spec, output in zip(specs, outputs, strict=True):
            tensor = widened(output)
            host = self._outputs[spec.name].view(tensor.shape, tensor.dtype)
            self._transfers.copy_out(host, tensor)
            hosts.append(host)
        self._transfers.leave()
        return {spec.name: np.array(host.numpy()) for spec, host in zip(specs, hosts, strict=True)}

    def _room_for(self, array: Array) -> Tensor:
        last = lies_channels_last(array.shape, self._channels_last)
        memory_format = torch.channels_last if last else torch.contiguous_format
        return self._transfers.empty(array.shape, torch_dtype(array.dtype), memory_format)


class _HostBuffer:
    """Pinned memory that grows with what it has to hold."""

    def __init__(self, pinned: Callable[[int], Tensor]) -> None:
        self._pinned = pinned
        self._memory: Tensor | None = None

    def view(self, shape: Sequence[int], dtype: torch.dtype, *, channels_last: bool = False) -> Tensor:
        """The beginning of the memory as a tensor."""
        size = math.prod(shape) * dtype.itemsize
        if self._memory is None or self._memory.numel() < size:
            self._memory = None  # first, so that both need not be there at once
            self._memory = self._pinned(size)
        return shaped(self._memory, shape, dtype, channels_last=channels_last)


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
    return DirectExchange(signature) if device.type == "cpu" else Staging(signature, CudaTransfers(device))
