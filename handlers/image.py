"""Images: from payloads to normalised input tensors."""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ImageFile import ImageFile

from handlers.errors import MalformedError, OutOfRangeError, RequestError, TooLargeError, UnsupportedTypeError
from handlers.jpeg_batches import JpegBatches
from handlers.limits import too_many_samples
from handlers.nested import flatten
from handlers.orientation import check_jpeg, turn_upright
from handlers.preprocessing import ImagePreprocessing

FloatArray = NDArray[np.float32]

# 16-bit and float images have no agreed full scale, and Pillow's conversion to 8 bits clips them silently.
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")
_FULL_SCALE = 255.0
# One request may hold so many images of the largest size.
_LARGEST_IMAGES = 8
# What Adobe's marker says of a JPEG file whose colours were not transformed: not every decoder looks at it.
_STORED_AS_RGB = 0
# The last chunk's name and checksum. Pillow does without it once it has all pixels, their checksums unread.
_PNG_END = b"IEND\xaeB`\x82"


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedImage:
    """The bytes of a PNG or JPEG file."""

    data: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class PixelArray:
    """Nested lists of pixel values, exactly as JSON gave them.

    Attributes:
        value: The nested lists.
        batched: True when this may be several samples stacked on a first axis.
    """

    value: object
    batched: bool


Payload = EncodedImage | PixelArray


class ImageDecoder:
    """Turns payloads into arrays of shape ``[samples, channels, height, width]``, float32, normalised.

    Args:
        preprocessing: Colour mode, size and normalisation.
        max_samples: More samples than this in one pixel array are refused.
        jpeg: Decodes JPEG files in colour, as far as it can; None for Pillow alone.
    """

    def __init__(self, preprocessing: ImagePreprocessing, *, max_samples: int, jpeg: JpegBatches | None = None) -> None:
        self._jpeg = jpeg
        self._spec = preprocessing
        self._max_samples = max_samples
        per_channel = (preprocessing.channels, 1, 1)
        self._mean = np.asarray(preprocessing.mean, dtype=np.float32).reshape(per_channel)
        self._std = np.asarray(preprocessing.std, dtype=np.float32).reshape(per_channel)
        # By channel, what becomes of each value that a pixel of a file can have.
        levels = np.arange(256, dtype=np.uint8).reshape(1, 1, 256, 1).repeat(preprocessing.channels, axis=3)
        self._levels: FloatArray = self._normalise(levels).reshape(preprocessing.channels, 256)

    def decode(self, payload: Payload) -> tuple[FloatArray, bool]:
        """Decode one payload.

        Returns:
            The samples, and whether the client sent them as a list.

        Raises:
            RequestError: If the payload is broken, or outside the signature.
        """
        if isinstance(payload, EncodedImage):
            return self._look_up(self._open(payload.data))[np.newaxis], False
        pixels, many = self._pixels(payload)
        return self._normalise(pixels), many

    def check_total(self, files: Sequence[bytes]) -> None:
        """Refuse a request whose images are large only together: a few kilobytes each, they take minutes to decode.

        Args:
            files: The images of one request. Those that cannot be read are left to :meth:`decode`.

        Raises:
            TooLargeError: If they have more pixels in all than a few images of the largest size.
        """
        if len(files) <= _LARGEST_IMAGES:
            return
        total = 0
        for data in files:
            with contextlib.suppress(Exception), _quiet():
                check_jpeg(data)
                image = _open(data)
                total += image.width * image.height
        if total > _LARGEST_IMAGES * self._spec.max_pixels:
            raise TooLargeError(
                "image_too_large",
                f"The images have {total} pixels in all; the limit is {_LARGEST_IMAGES * self._spec.max_pixels}; "
                "send fewer in one request.",
            )

    def _normalise(self, pixels: NDArray[np.generic]) -> FloatArray:
        """``[samples, height, width, channels]`` in 0..255 to normalised ``[samples, channels, height, width]``."""
        normalised: FloatArray = pixels.transpose(0, 3, 1, 2).astype(np.float32)
        normalised /= np.float32(_FULL_SCALE)
        normalised -= self._mean
        normalised /= self._std
        return normalised

    def _look_up(self, pixels: NDArray[np.uint8]) -> FloatArray:
        """The same of ``[height, width, channels]``, three times as fast, bit for bit."""
        found = np.empty((self._spec.channels, *pixels.shape[:2]), dtype=np.float32)
        for channel, levels in enumerate(self._levels):
            # With mode="raise" NumPy would write into a buffer of its own first.
            np.take(levels, pixels[..., channel], out=found[channel], mode="clip")
        return found

    def _open(self, data: bytes) -> NDArray[np.uint8]:
        """Decode a PNG or JPEG file to ``[height, width, channels]``, resized to the model's size."""
        spec = self._spec
        try:
            check_jpeg(data)
            with _quiet(), _open(data) as image:
                # Known from the header alone: refuse bombs before a pixel is decoded.
                if image.width * image.height > spec.max_pixels:
                    raise self._too_many_pixels(f"{image.width} x {image.height} pixels")
                if image.mode not in _EIGHT_BIT_MODES:
                    raise OutOfRangeError(
                        "unsupported_image_mode",
                        f"Images of mode {image.mode} are not accepted; send 8 bits a channel.",
                    )
                if image.format == "PNG" and _PNG_END not in data:
                    raise MalformedError("broken_image", "The image is incomplete: the end of the PNG file is missing.")
                upright = turn_upright(image, self._decoded_elsewhere(image, data))
                # Transparency is dropped, whatever form it has; Pillow would warn of some.
                upright.info.pop("transparency", None)
                if upright.mode != spec.mode:
                    upright = upright.convert(spec.mode)
                if upright.size != (spec.width, spec.height):
                    upright = upright.resize((spec.width, spec.height), Image.Resampling.BILINEAR)
                pixels = np.asarray(upright, dtype=np.uint8)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise self._too_many_pixels("too many pixels to count on") from error
        except UnidentifiedImageError as error:
            raise UnsupportedTypeError("unsupported_image", "The bytes are not a PNG or JPEG image.") from error
        except RequestError:
            raise
        except Exception as error:
            # Pillow's decoders raise a dozen unrelated types on broken files, and none of them is our defect.
            raise MalformedError(
                "broken_image", "The image file is damaged or incomplete and cannot be decoded."
            ) from error
        return pixels.reshape(spec.height, spec.width, spec.channels)

    def _decoded_elsewhere(self, image: ImageFile, data: bytes) -> Image.Image | None:
        """What the other decoder makes of a file, of which Pillow has read the header."""
        if self._jpeg is None or image.format != "JPEG" or (image.mode, self._spec.mode) != ("RGB", "RGB"):
            return None
        if image.info.get("adobe_transform") == _STORED_AS_RGB:
            return None
        # Pillow goes by the last of several headers, the other one may go by the first.
        if len(image.layer) != image.layers:  # type: ignore[attr-defined]  # which JPEG files have
            return None
        pixels = self._jpeg.decode(data, image.width * image.height)
        # Both read the size from the header; a file with two of them is Pillow's to judge.
        if pixels is None or pixels.shape != (image.height, image.width, 3):
            return None
        return Image.fromarray(pixels)

    def _too_many_pixels(self, has: str) -> TooLargeError:
        return TooLargeError(
            "image_too_large", f"The image has {has}; the limit is {self._spec.max_pixels} pixels in all."
        )

    def _pixels(self, payload: PixelArray) -> tuple[NDArray[np.float32], bool]:
        """Check nested lists and shape them as ``[samples, height, width, channels]``."""
        spec = self._spec
        one = (spec.height, spec.width)
        shapes = (
            f"[{spec.height}, {spec.width}]"
            if spec.channels == 1
            else f"[{spec.height}, {spec.width}, {spec.channels}]"
        )
        items, shape, types = flatten(payload.value)
        if list in types:
            raise MalformedError("ragged_array", f"The pixel array must be rectangular, of shape {shapes}.")
        if not types <= {int, float}:
            raise MalformedError(
                "not_numbers", f"The pixel array must hold only numbers, in nested lists of shape {shapes}."
            )
        sample_shapes = [(*one, spec.channels)] + ([one] if spec.channels == 1 else [])
        many = False
        count = 1
        if payload.batched and shape[1:] in sample_shapes and shape[0]:
            many, count = True, shape[0]
        elif shape not in sample_shapes:
            raise OutOfRangeError(
                "wrong_shape",
                f"The pixel array has the shape {list(shape)[:32]}; one sample must be {shapes}.",
            )
        if count > self._max_samples:
            raise too_many_samples(count, self._max_samples)
        try:
            values = np.array(items, np.float64)
        except OverflowError as error:
            raise _out_of_range() from error
        lowest, highest = float(values.min()), float(values.max())  # NaN if there is one
        if not (math.isfinite(lowest) and math.isfinite(highest)):
            raise OutOfRangeError("not_finite", "The pixel array holds NaN or infinite values.")
        if lowest < 0 or highest > _FULL_SCALE:
            raise _out_of_range()
        return values.astype(np.float32).reshape(count, *one, spec.channels), many


def _open(data: bytes) -> ImageFile:
    return Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))


def _quiet() -> warnings.catch_warnings[None]:
    """Of damaged EXIF, Pillow warns once a tag: 65,000 lines of log for one request."""
    return warnings.catch_warnings(action="ignore", category=UserWarning)


def _out_of_range() -> OutOfRangeError:
    return OutOfRangeError("out_of_range", f"Pixel values must lie between 0 and {_FULL_SCALE:.0f}.")
