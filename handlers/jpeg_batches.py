"""JPEG files decoded on the GPU, those of several threads together, which nvJPEG does faster than one after the other.

Its pixels differ from Pillow's by a few levels, since the standard leaves rounding and the interpolation of colours
open. So it is off unless a setting asks for it, and the golden samples judge it when the worker loads.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from handlers.errors import BackendError, LoadError, one_line

if TYPE_CHECKING:
    from handlers.artifact import Artifact

logger = logging.getLogger("torchport")

Pixels = NDArray[np.uint8]

# Of one list: they take 6 bytes each of the GPU, and what nvJPEG needs. Larger files are the CPU's.
_MOST_PIXELS = 1 << 25
_MOST_FILES = 32
# nvJPEG may give what it has of a file that was cut off.
_END = b"\xff\xd9"
_END_WITHIN = 64


@dataclass(slots=True)
class _Waiting:
    """A file that some thread waits for.

    Attributes:
        data: Its bytes.
        size: Its pixels, by its header.
        done: Whether it was tried.
        pixels: What it holds; None if it could not be decoded.
    """

    data: bytes
    size: int
    done: bool = False
    pixels: Pixels | None = None


class JpegBatches:
    """Decodes files that arrive while others are decoded as one list.

    Args:
        decode: Takes files and gives the pixels of each, ``[height, width, 3]``, or raises for all of them; then it
            gets each file alone.
    """

    def __init__(self, decode: Callable[[Sequence[bytes]], Sequence[Pixels]]) -> None:
        self._decode = decode
        self._waiting: deque[_Waiting] = deque()
        self._turn = threading.Lock()
        self._told = False

    def decode(self, data: bytes, size: int) -> Pixels | None:
        """Decode one file.

        Args:
            data: Of a JPEG file in colour, whose header was checked.
            size: Its width times its height.

        Returns:
            ``[height, width, 3]``; None if it is left to another decoder, which says what is wrong with it.
        """
        if size > _MOST_PIXELS or _END not in data[-_END_WITHIN:]:
            return None
        own = _Waiting(data, size)
        self._waiting.append(own)
        with self._turn:
            # Another thread may have decoded it with its own meanwhile.
            while not own.done:
                self._decode_some()
        return own.pixels

    def _decode_some(self) -> None:
        batch = self._next_list()
        try:
            error = self._try(batch)
            if error is not None and len(batch) > 1:  # one bad file fails all of a list
                errors = [self._try([item]) for item in batch]
                error = next((error for error in errors if error is not None), None)
            if error is not None and not self._told:
                self._told = True
                logger.warning("a JPEG file could not be decoded on the GPU, and is on the CPU: %s", one_line(error))
        finally:
            for item in batch:
                item.done = True

    def _try(self, items: Sequence[_Waiting]) -> Exception | None:
        """Decode files as one list; gives the error that left all of them without pixels."""
        try:
            found = self._decode([item.data for item in items])
            if len(found) != len(items):
                raise ValueError(f"{len(items)} files gave {len(found)} pictures")
        except Exception as error:  # the library raises plain RuntimeErrors, for files of every fault
            return error
        for item, pixels in zip(items, found, strict=True):
            item.pixels = pixels
        return None

    def _next_list(self) -> list[_Waiting]:
        """The oldest files, as many as fit."""
        batch = [self._waiting.popleft()]
        size = batch[0].size
        while self._waiting and len(batch) < _MOST_FILES and size + self._waiting[0].size <= _MOST_PIXELS:
            size += self._waiting[0].size
            batch.append(self._waiting.popleft())
        return batch


def build_jpeg_batches(artifact: Artifact | None, gpu: int | None) -> JpegBatches:
    """The decoder of a GPU.

    Args:
        artifact: What computes the model.
        gpu: Its GPU's number; None for torch's current one.

    Raises:
        LoadError: If the model does not run on a GPU, there is none, or torchvision is not installed.
    """
    if artifact is None or artifact.device != "cuda":
        raise LoadError("jpeg_on_gpu is for models that run on a GPU, and this one does not; set it to 0")
    try:
        import torch  # noqa: PLC0415  # few workers decode on a GPU
        from torchvision.io import ImageReadMode, decode_jpeg  # noqa: PLC0415
    except (ImportError, RuntimeError) as error:  # the second: it was built for another torch
        raise LoadError(
            f"jpeg_on_gpu needs torchvision ({one_line(error)}); "
            "install the one that belongs to torch, or set jpeg_on_gpu to 0"
        ) from error
    from handlers.torch_device import torch_device  # noqa: PLC0415

    try:
        device = torch_device("cuda", gpu)
    except BackendError as error:
        raise LoadError(f"jpeg_on_gpu: {error}") from error
    # torchvision writes to what it allocates without waiting for the stream that it allocates for. On a stream of its
    # own, that memory is nobody else's: on the model's, it may be in use yet (pytorch/vision pull request 9606).
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def decode(files: Sequence[bytes]) -> list[Pixels]:
        tensors = [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in files]
        with torch.cuda.stream(stream):
            decoded = decode_jpeg(tensors, mode=ImageReadMode.RGB, device=device)
            return [tensor.permute(1, 2, 0).contiguous().cpu().numpy() for tensor in decoded]

    return JpegBatches(decode)
