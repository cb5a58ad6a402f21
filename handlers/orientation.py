"""Which way up an image is: what its EXIF says, read without the cost that a hostile file may put into it.

Pillow reads every tag of EXIF data, and when it turns an image all tags of nested tables too, at some 10 µs each. A
file of a few hundred kilobytes can hold 60,000 of them, and so keep a worker busy for seconds.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from PIL import ExifTags, Image
from PIL.ImageFile import ImageFile

from handlers.errors import MalformedError

# Cameras write some 20, with private ones and a preview's 60.
_MAX_TAGS = 512
_EXIF = b"Exif\0\0"
_BYTE_ORDERS = {b"II": "<", b"MM": ">"}
_PNG_PROFILE = "Raw profile type exif"

_JPEG_BEGIN = b"\xff\xd8"
_JPEG_APP1 = 0xE1
_JPEG_SCAN = 0xDA
# Markers that Pillow takes for two bytes without a length: padding, restarts, begin and end, extensions.
_JPEG_BARE = frozenset({0x00, 0x01, 0xC8, *range(0xD0, 0xDA), *range(0xF0, 0xFE), 0xFF})

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def check_jpeg(data: bytes) -> None:
    """Refuse a JPEG file whose EXIF data Pillow would be long in reading; it does so when it opens the file.

    Args:
        data: Any file; others than JPEG go through.

    Raises:
        MalformedError: If it has far more tags than any camera writes.
    """
    if data.startswith(_JPEG_BEGIN) and _EXIF in data:
        _check_tags(b"".join(_jpeg_exif(data)))


def turn_upright(image: ImageFile, pixels: Image.Image | None = None) -> Image.Image:
    """The image as it is meant to be seen: what ``PIL.ImageOps.exif_transpose`` would give.

    Args:
        image: Opened, and not decoded yet.
        pixels: What another decoder made of it, a JPEG file; None to decode it here.

    Raises:
        MalformedError: If its EXIF data have far more tags than any camera writes.
    """
    if pixels is None:
        image.load()  # in a PNG, EXIF data may come after the pixels
    exif = image.info.get("exif")
    if exif is None and _PNG_PROFILE in image.info:
        exif = bytes.fromhex("".join(image.info[_PNG_PROFILE].split("\n")[3:]))
    if exif:
        _check_tags(exif)
    turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    found = image if pixels is None else pixels
    return found if turn is None else found.transpose(turn)


def _check_tags(exif: bytes) -> None:
    """Refuse EXIF data whose first table, the one with the orientation, is absurdly long."""
    start = exif.rfind(_EXIF, 0, 2 * len(_EXIF)) + len(_EXIF) if exif.startswith(_EXIF) else 0
    order = _BYTE_ORDERS.get(exif[start : start + 2])
    if order is None or len(exif) < start + 8:
        return  # no such data, which Pillow finds out at once
    table = start + struct.unpack_from(f"{order}I", exif, start + 4)[0]
    if table + 2 > len(exif):
        return
    (tags,) = struct.unpack_from(f"{order}H", exif, table)
    if tags > _MAX_TAGS:
        raise MalformedError(
            "broken_image", f"The image has {tags} EXIF tags; the limit is {_MAX_TAGS}; send it without them."
        )


def _jpeg_exif(data: bytes) -> Iterator[bytes]:
    """The EXIF data of a JPEG file, piece by piece, as Pillow puts them together."""
    position = data.find(b"\xff", len(_JPEG_BEGIN))
    first = True
    while 0 <= position < len(data) - 3:
        marker = data[position + 1]
        if marker == _JPEG_SCAN:
            return
        if marker in _JPEG_BARE:
            position = data.find(b"\xff", position + (1 if marker == 0xFF else 2))
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        segment = data[position + 4 : position + 2 + length]
        if marker == _JPEG_APP1 and segment.startswith(_EXIF):
            yield segment if first else segment[len(_EXIF) :]
            first = False
        position = data.find(b"\xff", position + 2 + length)
