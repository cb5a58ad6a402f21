"""Picture files: PNG and JPEG, decoded exactly as the handlers of an archive decode what clients send."""

from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from models.errors import PictureError

SUFFIXES = (".png", ".jpg", ".jpeg")

ColourMode = Literal["L", "RGB"]
"""Grey, or red, green and blue."""

# Others have no agreed full scale, and Pillow's conversion to 8 bits clips them silently.
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def read_picture(path: str, *, height: int, width: int, mode: ColourMode) -> npt.NDArray[np.uint8]:
    """Reads one picture file.

    Args:
        path: a PNG or JPEG file.
        height: rows it is resized to.
        width: columns it is resized to.
        mode: what its colours are converted to.

    Returns:
        [height, width] for L, [height, width, 3] for RGB.

    Raises:
        PictureError: naming the file, when it cannot be read or is no picture of 8 bits a channel.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG")) as image:
            if image.mode not in _EIGHT_BIT_MODES:
                raise _unusable(path, f"has the mode {image.mode}, and not 8 bits a channel")
            return resize_picture(image, height=height, width=width, mode=mode)
    except PictureError:
        raise
    except Exception as error:
        # Pillow's decoders raise a dozen unrelated types on broken files.
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise _unusable(path, f"cannot be read as a PNG or JPEG image ({reason})") from error


def resize_picture(image: Image.Image, *, height: int, width: int, mode: ColourMode) -> npt.NDArray[np.uint8]:
    """Turns a picture upright, and into the colours and size of the model; see `read_picture`."""
    upright = ImageOps.exif_transpose(image)
    # Transparency is dropped, whatever form it has; Pillow would warn of some.
    upright.info.pop("transparency", None)
    upright = upright.convert(mode)
    if upright.size != (width, height):
        upright = upright.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(upright, dtype=np.uint8)


def _unusable(path: str, problem: str) -> PictureError:
    return PictureError(f"{path} {problem}; replace it, or leave such files out with --skip-bad-rows.")
