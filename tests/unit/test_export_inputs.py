"""Random inputs: over the whole range of the pixels, and the same every time."""

from dataclasses import replace

import numpy as np

from export.inputs import random_batch
from handlers.signature import ImagePreprocessing, Signature


def test_a_batch_covers_the_normalised_range_of_pixels(signature: Signature) -> None:
    batch = random_batch(signature, 64)
    assert (batch.shape, batch.dtype) == ((64, 1, 8, 8), np.float32)
    assert -2 <= batch.min() < -1.95
    assert 1.95 < batch.max() <= 2


def test_the_same_size_gives_the_same_batch_and_another_size_another_one(signature: Signature) -> None:
    assert np.array_equal(random_batch(signature, 3), random_batch(signature, 3))
    assert not np.array_equal(random_batch(signature, 3), random_batch(signature, 7)[:3])


def test_each_channel_has_its_own_range(signature: Signature) -> None:
    image = ImagePreprocessing(mode="RGB", height=4, width=5, mean=(0.0, 0.5, 1.0), std=(1.0, 1.0, 0.1))
    batch = random_batch(replace(signature, image=image), 50)
    assert batch.shape == (50, 3, 4, 5)
    assert [round(float(batch[:, channel].mean())) for channel in range(3)] in ([0, 0, -5], [1, 0, -5])
