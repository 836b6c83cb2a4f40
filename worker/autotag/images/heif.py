"""HEIC files, as iPhones save them. The decoder needs the whole picture, or one of its thumbnails."""

from __future__ import annotations

import io
from functools import partial

from PIL import Image as Pillow
from PIL import ImageFile
from pillow_heif import options
from pillow_heif.as_plugin import HeifImageFile

from autotag.images.colours import by_numbers
from autotag.images.finish import plain
from autotag.images.opened import FIXED_COST, Decoded, Opened, unsupported

#: Bytes per pixel, of 8 and of more bits: YCbCr, RGB and Pillow's copy. Measured: 8.1 with 4:2:0.
PER_PIXEL, PER_WIDE_PIXEL = 10, 16
DRAFT = 1.25  # a thumbnail must be so much larger than what is sent

options.DECODE_THREADS = 1  # each thread would hold a tile
options.DEPTH_IMAGES = options.AUX_IMAGES = False


def open_heif(data: bytes, side: int) -> Opened:
    """Opens the primary picture.

    Raises:
        TaggingError: it is damaged.
    """
    try:
        image = _image(data)
    except SyntaxError:
        if b"meta" not in data[:64] and b"moov" in data:
            raise unsupported("a HEIC sequence without a still picture") from None
        raise
    width, height = image.size
    each = PER_WIDE_PIXEL if image.info.get("bit_depth", 8) > 8 else PER_PIXEL
    cost = FIXED_COST + 3 * len(data) + width * height * each
    small = min((size for size in image.info.get("thumbnails", [])), default=0)
    cheaper = None
    if small:
        least = FIXED_COST + 3 * len(data) + small * small * each
        cheaper = Opened("HEIC", width, height, least, partial(_thumbnail, data, small))
    return Opened("HEIC", width, height, cost, partial(_decode, data), cheaper=cheaper)


def _decode(data: bytes, width: int, height: int) -> Decoded:
    image = _image(data)
    image.draft("RGB", (int(width * DRAFT), int(height * DRAFT)))
    return _loaded(image)


def _thumbnail(data: bytes, small: int, width: int, height: int) -> Decoded:
    """A thumbnail that is smaller than wanted: better than nothing, where memory is short."""
    image = _image(data)
    image.draft("RGB", (min(small // 2, width), min(small // 2, height)))
    decoded = _loaded(image)
    return Decoded(decoded.image, decoded.icc, {"thumbnail": [*decoded.image.size]})


def _image(data: bytes) -> ImageFile.ImageFile:
    return HeifImageFile(io.BytesIO(data))  # type: ignore[no-untyped-call]


def _loaded(image: ImageFile.ImageFile) -> Decoded:
    icc = image.info.get("icc_profile")
    numbers = image.info.get("nclx_profile")
    if icc is None and numbers:
        icc = by_numbers(int(numbers["color_primaries"]), int(numbers["transfer_characteristics"]))
    image.load()
    picture: Pillow.Image = plain(image)
    return Decoded(picture.copy() if picture is image else picture, icc)
