"""HEIC files, as iPhones save them. A large enough thumbnail is used; otherwise the picture is decoded by tiles, or as
a whole."""

from __future__ import annotations

import io
from functools import partial

from PIL import Image as Pillow
from PIL import ImageFile
from pillow_heif import options
from pillow_heif.as_plugin import HeifImageFile

from autotag.images import heif_tiles
from autotag.images.colours import by_numbers
from autotag.images.finish import plain
from autotag.images.opened import FIXED_NEED, Decoded, Opened, unsupported
from autotag.images.shape import fit

#: Bytes per pixel, with 8 and with more bits, for YCbCr, RGB and Pillow's copy. Measured: 8.1 with 4:2:0.
PER_PIXEL, PER_WIDE_PIXEL = 10, 16
#: Bytes per pixel of a tile, and of the picture that is assembled from the tiles, with Pillow's copy.
PER_TILE_PIXEL, PER_SCALED_PIXEL = 40, 7
HELD = 5  # bytes per pixel that a decoded picture keeps
DRAFT = 1.25  # a thumbnail must be larger than the sent picture by this factor

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
    fixed = FIXED_NEED + 3 * len(data)
    small = min((size for size in image.info.get("thumbnails", [])), default=0)
    cheaper = None
    if small:
        least = fixed + small * small * each
        cheaper = Opened("HEIC", width, height, least, partial(_thumbnail, data, small))
    shape = fit(width, height, side)
    if image.draft("RGB", _draft(shape.width, shape.height)):  # a thumbnail is large enough
        need = fixed + image.width * image.height * each
        return Opened("HEIC", width, height, need, partial(_decode, data), cheaper=cheaper)
    tiles = heif_tiles.grid(data)
    if tiles is None:
        need, held = fixed + width * height * each, fixed + width * height * HELD
        return Opened("HEIC", width, height, need, partial(_decode, data), cheaper=cheaper, held=held)
    size = (shape.height, shape.width) if tiles.orientation >= 5 else (shape.width, shape.height)
    by = heif_tiles.scale(tiles, _draft(*size))
    need = fixed + tiles.tile_width * tiles.tile_height * PER_TILE_PIXEL
    scaled = tiles.width * tiles.height // by**2
    need += scaled * PER_SCALED_PIXEL
    decode = partial(_decode_tiles, data, tiles, _icc(image))
    held = fixed + scaled * HELD
    return Opened("HEIC", tiles.width, tiles.height, need, decode, tiles.orientation, cheaper, held=held)


def _draft(width: int, height: int) -> tuple[int, int]:
    return int(width * DRAFT), int(height * DRAFT)


def _decode(data: bytes, width: int, height: int) -> Decoded:
    image = _image(data)
    image.draft("RGB", _draft(width, height))
    return _loaded(image)


def _decode_tiles(data: bytes, tiles: heif_tiles.Grid, icc: bytes | None, width: int, height: int) -> Decoded:
    return Decoded(heif_tiles.decode(data, tiles, heif_tiles.scale(tiles, _draft(width, height))), icc)


def _thumbnail(data: bytes, small: int, width: int, height: int) -> Decoded:
    """A thumbnail that is smaller than wanted, for when memory is short."""
    image = _image(data)
    image.draft("RGB", (min(small // 2, width), min(small // 2, height)))
    decoded = _loaded(image)
    return Decoded(decoded.image, decoded.icc, {"thumbnail": [*decoded.image.size]})


def _image(data: bytes) -> ImageFile.ImageFile:
    return HeifImageFile(io.BytesIO(data))  # type: ignore[no-untyped-call]


def _loaded(image: ImageFile.ImageFile) -> Decoded:
    icc = _icc(image)
    image.load()
    picture: Pillow.Image = plain(image)
    return Decoded(picture.copy() if picture is image else picture, icc)


def _icc(image: ImageFile.ImageFile) -> bytes | None:
    profile: bytes | None = image.info.get("icc_profile")
    numbers = image.info.get("nclx_profile")
    if profile is None and numbers:
        return by_numbers(int(numbers["color_primaries"]), int(numbers["transfer_characteristics"]))
    return profile
