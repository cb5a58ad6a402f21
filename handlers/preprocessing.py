"""Preprocessing as a signature describes it: what becomes of images and texts before the model sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from handlers.document import Section, shown
from handlers.errors import SignatureError

CHANNELS = {"L": 1, "RGB": 3}
TRUNCATE = "truncate"
REFUSE = "refuse"
TOO_LONG = (TRUNCATE, REFUSE)

DEFAULT_MAX_PIXELS = 4096 * 4096
# Pillow's own limit (PIL.Image.MAX_IMAGE_PIXELS): it warns of larger images, and refuses those of twice as many.
_PILLOW_MAX_PIXELS = (1 << 30) // 4 // 3
# Far outside of what normalisation needs, and well inside of what float32 holds.
_MIN_STD = 1e-6
_MAX_MAGNITUDE = 1e6

_MAX_DIMENSION = 1 << 20
_MAX_TOKEN = (1 << 31) - 1


def plain_file_name(name: str, what: str) -> str:
    """Refuse a file name that could leave the archive's root.

    Raises:
        SignatureError: If it has a slash or begins with a dot.
    """
    if "/" in name or "\\" in name or name.startswith("."):
        raise SignatureError(f"{what} must be a plain file name, not {shown(name)}")
    return name


@dataclass(frozen=True, kw_only=True, slots=True)
class ImagePreprocessing:
    """How pixels become the input tensor: ``(pixel / 255 - mean) / std``, channels first.

    Attributes:
        mode: Pillow mode that images are converted to: ``L`` (grey) or ``RGB``.
        height: Rows that images are resized to, in pixels.
        width: Columns that images are resized to, in pixels.
        mean: One number a channel, in units of full scale (0 to 1).
        std: One positive number a channel, in units of full scale.
        max_pixels: Larger images are refused before they are decoded (decompression bombs).
    """

    mode: str
    height: int
    width: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    max_pixels: int = DEFAULT_MAX_PIXELS

    @property
    def channels(self) -> int:
        """Number of colour channels."""
        return CHANNELS[self.mode]

    @classmethod
    def from_section(cls, section: Section) -> ImagePreprocessing:
        """Read the ``preprocessing.image`` mapping."""
        mode = section.string("mode", choices=tuple(CHANNELS))
        channels = CHANNELS[mode]
        image = cls(
            mode=mode,
            height=section.integer("height", minimum=1, maximum=_MAX_DIMENSION),
            width=section.integer("width", minimum=1, maximum=_MAX_DIMENSION),
            mean=section.numbers("mean", length=channels, minimum=-_MAX_MAGNITUDE, maximum=_MAX_MAGNITUDE),
            std=section.numbers("std", length=channels, minimum=_MIN_STD, maximum=_MAX_MAGNITUDE),
            max_pixels=(
                section.integer("max_pixels", minimum=1, maximum=_PILLOW_MAX_PIXELS)
                if section.has("max_pixels")
                else DEFAULT_MAX_PIXELS
            ),
        )
        section.finish()
        return image

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "mode": self.mode,
            "height": self.height,
            "width": self.width,
            "mean": list(self.mean),
            "std": list(self.std),
            "max_pixels": self.max_pixels,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class TextPreprocessing:
    """How a text becomes token ids.

    Attributes:
        tokenizer: File name of the ``tokenizer.json`` at the archive's root.
        max_length: Tokens of the longest text.
        pad_id: The token that fills up the shorter texts of a batch.
        too_long: What becomes of longer texts, one of ``TOO_LONG``: they are cut off, and their answers say so; or
            they are refused, for models whose answer to a part would mislead.
    """

    tokenizer: str
    max_length: int
    pad_id: int
    too_long: str = TRUNCATE

    @classmethod
    def from_section(cls, section: Section) -> TextPreprocessing:
        """Read the ``preprocessing.text`` mapping."""
        text = cls(
            tokenizer=plain_file_name(section.string("tokenizer"), "preprocessing.text.tokenizer"),
            max_length=section.integer("max_length", minimum=1, maximum=_MAX_DIMENSION),
            pad_id=section.integer("pad_id", minimum=0, maximum=_MAX_TOKEN),
            too_long=section.string("too_long", choices=TOO_LONG) if section.has("too_long") else TRUNCATE,
        )
        section.finish()
        return text

    def to_document(self) -> dict[str, Any]:
        """The JSON form."""
        document: dict[str, Any] = {
            "tokenizer": self.tokenizer,
            "max_length": self.max_length,
            "pad_id": self.pad_id,
        }
        if self.too_long != TRUNCATE:  # so that archives of before keep their bytes
            document["too_long"] = self.too_long
        return document
