"""The C library's allocator: freed memory stays with the process.

By default glibc gives large blocks back to the kernel as soon as they are free, and the next operator of the same
model pays for every page anew: a batch of 12 texts of 36 tokens took 20 ms rather than 12 (int8 encoder, 4 layers).
"""

from __future__ import annotations

import ctypes
import sys

# Of glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
# Blocks above it are still given back one by one: weights that are replaced, pictures of a hundred megapixels.
_LARGEST_KEPT_BYTES = 256 << 20
_MOST_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Let this process keep what it has freed, for its next batch.

    Returns:
        Whether the C library understands.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    mallopt.argtypes = [ctypes.c_int, ctypes.c_int]
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)) and bool(mallopt(_TRIM_THRESHOLD, _MOST_KEPT_BYTES))
