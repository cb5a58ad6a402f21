"""CUDA graphs: the usual shapes of batches, recorded when a worker loads and replayed with a single launch.

A small model's batch takes the GPU some microseconds of arithmetic, and the CPU hundreds of them to launch its
kernels one by one. A graph has them all, for one shape of its inputs: so there is one for each *bucket*, a batch size
and sizes of the dynamic axes, and a batch is filled up to the smallest bucket that holds it.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from handlers.errors import BackendError, one_line
from handlers.signature import Signature
from handlers.staging import Staging, lies_channels_last, shaped, torch_dtype
from handlers.tensors import Array, TensorBatch, TensorSpec
from handlers.warm_up import plain_batch

logger = logging.getLogger("torchport")

MOST_GRAPHS = 48
# Below it a graph is launches and little else, whatever the length.
_SHORTEST = 16
# A server waits for its workers: startupTimeout is 120 s where nobody set it.
_CAPTURE_LIMIT_S = 30.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """A shape that a graph is captured for.

    Attributes:
        samples: Of the batch.
        sizes: Of the dynamic axes, by name.
    """

    samples: int
    sizes: Mapping[str, int]

    @property
    def positions(self) -> int:
        """Of all samples together."""
        return self.samples * math.prod(self.sizes.values())

    def holds(self, other: Bucket, *, exactly: bool) -> bool:
        """Whether a batch of that shape can be filled up to this one.

        Args:
            other: The batch's shape.
            exactly: Whether the dynamic axes must have these very sizes.
        """
        if other.samples > self.samples:
            return False
        if exactly:
            return other.sizes == self.sizes
        return all(size <= self.sizes[name] for name, size in other.sizes.items())


def buckets(signature: Signature, max_batch: int) -> list[Bucket]:
    """The shapes to capture, the largest first: later graphs find room in the memory that earlier ones set aside.

    Batches of every power of two up to the largest; and for each of them powers of two of every dynamic axis, up to its
    maximum. Where axes cannot be padded, their smallest and largest sizes. At most ``MOST_GRAPHS``, by leaving out
    every second size.
    """
    ladders = {"": _powers(1, max_batch)}
    for name, axis in signature.axes.items():
        if is_paddable(signature):
            ladders[name] = _powers(max(axis.minimum, min(_SHORTEST, axis.maximum)), axis.maximum)
        else:
            ladders[name] = sorted({axis.minimum, axis.maximum})
    while math.prod(map(len, ladders.values())) > MOST_GRAPHS:
        longest = max(ladders, key=lambda name: len(ladders[name]))
        ladders[longest] = ladders[longest][::-2][::-1]  # the largest stays
    batches = ladders.pop("")
    shapes: list[dict[str, int]] = [{}]
    for name, ladder in ladders.items():
        shapes = [{**shape, name: size} for shape in shapes for size in ladder]
    found = [Bucket(samples=samples, sizes=shape) for samples in batches for shape in shapes]
    return sorted(found, key=lambda bucket: bucket.positions, reverse=True)


def is_paddable(signature: Signature) -> bool:
    """Whether a batch may be longer than its samples, and the outputs be cut off again."""
    return all(spec.padding is not None for spec in signature.inputs if spec.dynamic_axes) and all(
        name in signature.axes for spec in signature.outputs for name in spec.dynamic_axes.values()
    )


def _powers(low: int, high: int) -> list[int]:
    """Powers of two from ``low``, and ``high``."""
    return sorted({1 << power for power in range(high.bit_length()) if low <= 1 << power < high} | {high})


class Recorder(Protocol):
    """Captures what a model does on a GPU."""

    def memory(self, size: int) -> Tensor:
        """So many bytes on the device, for the inputs of graphs: ``[size]`` uint8."""
        ...

    def capture(self, inputs: Sequence[Tensor]) -> tuple[Callable[[], None], Sequence[Tensor]]:
        """Run the model a few times, then once more to record it.

        Args:
            inputs: On the device, in the signature's order. Their memory is read at every replay.

        Returns:
            What replays it, and the tensors that every replay writes: the outputs, in the signature's order.
        """
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class _Graph:
    """A captured graph.

    Attributes:
        bucket: Its shape.
        inputs: What it reads.
        outputs: What it writes.
        replay: Runs it.
    """

    bucket: Bucket
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    replay: Callable[[], None]


class CudaGraphs:
    """Computes batches whose shapes were captured.

    A module that cannot be captured, because it looks at values to decide what to do, has no graphs; so has one that
    leaves no memory for them. One line of the log says so.

    Args:
        signature: Inputs, outputs and bounds of the axes.
        staging: Takes batches to the device.
        recorder: Captures the model.
        max_batch: Samples of the largest batch.
        channels_last: Whether inputs of four axes lie with their channels last.
        clock: Seconds.
    """

    def __init__(
        self,
        signature: Signature,
        staging: Staging,
        recorder: Recorder,
        *,
        max_batch: int,
        channels_last: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._signature = signature
        self._staging = staging
        self._channels_last = channels_last
        self._exactly = not is_paddable(signature)
        self._graphs: list[_Graph] = []
        self._told = False
        with torch.inference_mode():
            self._capture(buckets(signature, max_batch), recorder, clock)

    @property
    def captured(self) -> list[Bucket]:
        """The shapes that there are graphs for, the smallest first."""
        return [graph.bucket for graph in self._graphs]

    def run(self, batch: TensorBatch) -> dict[str, Array] | None:
        """Replay the graph of the smallest bucket that holds a batch.

        Args:
            batch: Inputs by name, each ``[batch, ...]``.

        Returns:
            The outputs by name, of the batch's own shape; None if no graph holds it.
        """
        if not self._graphs:
            return None
        shape = _shape(batch, self._signature)
        graph = self._smallest(shape) if shape else None
        if shape is None or graph is None:
            self._tell_plain(batch)
            return None
        compute = functools.partial(self._replayed, graph, shape)
        return self._staging.run(batch, compute, shapes=[tensor.shape for tensor in graph.inputs])

    def _replayed(self, graph: _Graph, shape: Bucket, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The outputs on the device, of the batch's own shape, until the next batch is computed."""
        _copy(tensors, graph.inputs)
        graph.replay()
        return [_cut(tensor, spec, shape) for tensor, spec in zip(graph.outputs, self._signature.outputs, strict=True)]

    def _smallest(self, shape: Bucket) -> _Graph | None:
        fitting = (graph for graph in self._graphs if graph.bucket.holds(shape, exactly=self._exactly))
        return next(fitting, None)

    def _capture(self, wanted: Sequence[Bucket], recorder: Recorder, clock: Callable[[], float]) -> None:
        """Capture one bucket after the other; where one fails, there is no graph at all."""
        began = clock()
        try:
            memory = [recorder.memory(max(_size(spec, bucket) for bucket in wanted)) for spec in self._signature.inputs]
            for bucket in wanted:
                if clock() - began > _CAPTURE_LIMIT_S:
                    logger.warning(
                        "CUDA graphs took long to capture: the %d smallest of %d shapes of batches run without",
                        len(wanted) - len(self._graphs),
                        len(wanted),
                    )
                    self._told = True
                    break
                self._graphs.append(self._captured(bucket, memory, recorder))
        except Exception as error:  # the archive's own code may raise anything
            # What they hold may be what a plain batch is short of.
            self._graphs.clear()
            # Ending a capture that has failed fails as well, and says less.
            cause = error.__context__ or error
            logger.warning("the model runs without CUDA graphs, since it cannot be captured: %s", one_line(cause))
        self._graphs.reverse()

    def _captured(self, bucket: Bucket, memory: Sequence[Tensor], recorder: Recorder) -> _Graph:
        inputs = []
        for spec, room in zip(self._signature.inputs, memory, strict=True):
            shape = _sizes(spec, bucket)
            last = lies_channels_last(shape, self._channels_last)
            inputs.append(shaped(room, shape, torch_dtype(spec.numpy_dtype), channels_last=last))
        graphs: list[_Graph] = []

        def capture(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
            _copy(tensors, inputs)
            replay, outputs = recorder.capture(inputs)
            for spec, output in zip(self._signature.outputs, outputs, strict=True):
                _check(output, spec, bucket)
            graphs.append(_Graph(bucket=bucket, inputs=inputs, outputs=outputs, replay=replay))
            return outputs

        self._staging.run(plain_batch(self._signature, bucket.samples, bucket.sizes), capture)
        return graphs[0]

    def _tell_plain(self, batch: TensorBatch) -> None:
        if not self._told:
            self._told = True
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in batch.items())
            logger.warning("batches that no CUDA graph was captured for run without one, such as %s", shapes)


def _shape(batch: TensorBatch, signature: Signature) -> Bucket | None:
    """The shape of a batch; None if it is not one of the signature."""
    first = batch[signature.inputs[0].name]
    if not first.ndim:
        return None
    sizes: dict[str, int] = {}
    for spec in signature.inputs:
        array = batch[spec.name]
        if array.ndim != len(spec.shape) or len(array) != len(first) or array.dtype != spec.numpy_dtype:
            return None
        for axis, size in zip(spec.shape[1:], array.shape[1:], strict=True):
            if size != (sizes.setdefault(axis, size) if isinstance(axis, str) else axis):
                return None
    return Bucket(samples=len(first), sizes=sizes)


def _copy(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> None:
    """Copy on the device: a lane's memory is its own, and that of the graphs is every batch's."""
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def _sizes(spec: TensorSpec, bucket: Bucket) -> tuple[int, ...]:
    """An input's shape in a bucket."""
    return (bucket.samples, *(bucket.sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape[1:]))


def _size(spec: TensorSpec, bucket: Bucket) -> int:
    """An input's bytes in a bucket."""
    return math.prod(_sizes(spec, bucket)) * spec.numpy_dtype.itemsize


def _check(output: Tensor, spec: TensorSpec, bucket: Bucket) -> None:
    """Refuse an output from which a batch's own part could not be cut."""
    expected = [bucket.samples, *(bucket.sizes.get(axis) if isinstance(axis, str) else axis for axis in spec.shape[1:])]
    fits = output.ndim == len(expected) and all(
        size is None or size == length for size, length in zip(expected, output.shape, strict=True)
    )
    if not fits:
        raise BackendError(f"its {spec.name!r} has the shape {list(output.shape)}, unlike the signature")


def _cut(output: Tensor, spec: TensorSpec, shape: Bucket) -> Tensor:
    """The part of a bucket's output that is a batch's own."""
    index = [slice(shape.samples)]
    index += [slice(shape.sizes.get(axis) if isinstance(axis, str) else None) for axis in spec.shape[1:]]
    return output[tuple(index)]
