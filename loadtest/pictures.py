"""Generated photographs: JPEG files as costly to decode as real ones, for load without a data set."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

QUALITY = 90
# Detail is the weaker the finer it is, as in photographs (about 1/f): each octave has such a share of the last one's.
_FALLS = (0.58, 0.78)
_OCTAVES = 8
_STRENGTH = 40.0
_SHAPES = 12
_GREY = 128.0


def generate_pictures(count: int, *, height: int, width: int, seed: int = 0, quality: int = QUALITY) -> list[bytes]:
    """JPEG files of made-up scenes: a sky-like gradient, blobs with edges, and detail of every size.

    Files of 224 x 224 at quality 90 have 10 to 25 kB, as photographs of that size have.

    Args:
        count: How many.
        height: Rows, in pixels.
        width: Columns, in pixels.
        seed: Decides all of them.
        quality: Of the JPEG encoder, 1 to 95.

    Returns:
        The files' bytes, RGB with 4:2:0 colour, as cameras write them.
    """
    dice = np.random.default_rng(seed)
    return [_encode(_paint(height, width, dice), quality) for _ in range(count)]


def _paint(height: int, width: int, dice: np.random.Generator) -> NDArray[np.uint8]:
    """One scene, [height, width, 3]."""
    rows, columns = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
    slope = dice.uniform(-40, 40, (2, 3))
    scene = _GREY + dice.uniform(-50, 50, 3) + rows[..., None] * slope[0] + columns[..., None] * slope[1]
    for _ in range(_SHAPES):
        centre, size = dice.uniform(-1, 1, 2), dice.uniform(0.1, 0.6, 2)
        inside = ((rows - centre[0]) / size[0]) ** 2 + ((columns - centre[1]) / size[1]) ** 2 < 1
        scene[inside] += dice.uniform(-60, 60, 3)
    # Brightness has detail, colour little: what chroma subsampling relies on.
    fall = dice.uniform(*_FALLS)
    scene += _detail(height, width, fall, dice)[..., None]
    scene += np.stack([_detail(height, width, fall, dice) for _ in range(3)], axis=-1) * 0.2
    pixels: NDArray[np.uint8] = np.clip(np.round(scene), 0, 255).astype(np.uint8)
    return pixels


def _detail(height: int, width: int, fall: float, dice: np.random.Generator) -> NDArray[np.float32]:
    """Noise whose strength falls with its frequency, [height, width]."""
    total = np.zeros((height, width), np.float32)
    strength = _STRENGTH
    for octave in range(_OCTAVES):
        cells = 2 ** (octave + 1)
        shape = (min(cells, height), min(cells, width))
        coarse = Image.fromarray(dice.normal(0, strength, shape).astype(np.float32))
        total += np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        strength *= fall
    return total


def _encode(pixels: NDArray[np.uint8], quality: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()
