"""Random inputs over the ranges of a signature."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from handlers.signature import Signature

SEED = 0


def random_batch(signature: Signature, size: int) -> NDArray[np.float32]:
    """A batch of random pixels over their whole range, normalised; the same for the same size.

    Returns:
        Shape ``[size, channels, height, width]``.
    """
    image = signature.image
    pixels = np.random.default_rng([SEED, size]).random((size, image.channels, image.height, image.width))
    mean = np.asarray(image.mean).reshape(-1, 1, 1)
    std = np.asarray(image.std).reshape(-1, 1, 1)
    batch: NDArray[np.float32] = ((pixels - mean) / std).astype(np.float32)
    return batch
