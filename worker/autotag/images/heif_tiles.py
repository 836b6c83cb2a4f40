"""Decodes large HEIC pictures tile by tile, in the memory of one tile.

Cameras save a picture as a grid of tiles of 512 × 512 pixels. pillow-heif decodes all of them at once: 24 megapixels
take 240 MB. The libheif in its wheel can decode a single tile (libheif 1.18 and later, libheif/heif_tiling.h). If that
library is not found, `grid` returns that there are no tiles.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_size_t, c_uint8, c_uint32, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pillow_heif
from PIL import Image as Pillow

from autotag.images.boxes import Property, primary_properties
from autotag.images.finish import TURNS
from autotag.images.opened import damaged

RGB, INTERLEAVED_RGB, INTERLEAVED = 1, 10, 10  # heif_colorspace, heif_chroma and heif_channel of libheif/heif_image.h
UNTURNED, TO_8_BITS = 1, 40  # offsets of ignore_transformations and convert_hdr_to_8bit in heif_decoding_options
ANTICLOCKWISE = {1: Pillow.Transpose.ROTATE_90, 2: Pillow.Transpose.ROTATE_180, 3: Pillow.Transpose.ROTATE_270}
MAX_TILES = 10_000
MAX_TILE = 4096 * 4096  # pixels


class _Error(Structure):
    _fields_ = [("code", c_int), ("subcode", c_int), ("message", c_char_p)]


class _Tiling(Structure):
    _fields_ = [
        ("version", c_int), ("columns", c_uint32), ("rows", c_uint32), ("tile_width", c_uint32),
        ("tile_height", c_uint32), ("width", c_uint32), ("height", c_uint32), ("top", c_uint32), ("left", c_uint32),
        ("extra", c_uint8), ("extra_sizes", c_uint32 * 8), ("later", c_uint8 * 64),
    ]  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """The tiles of the primary picture, and how to turn the assembled picture (as in EXIF)."""

    columns: int
    rows: int
    tile_width: int
    tile_height: int
    width: int
    height: int
    orientation: int


def grid(data: bytes) -> Grid | None:
    """The tiles of the primary picture; None: it is not made of tiles, has transparency, or is cropped."""
    library, properties = _library(), primary_properties(data)
    if library is None or b"clap" in dict(properties):
        return None
    with _primary(library, data) as handle:
        found = _Tiling(version=1)
        if handle is None or library.heif_image_handle_has_alpha_channel(handle):
            return None
        if library.heif_image_handle_get_image_tiling(handle, 0, byref(found)).code:
            return None
    width, height, across, down = found.width, found.height, found.tile_width, found.tile_height
    covers = found.columns * across >= width > 0 and found.rows * down >= height > 0
    if not covers or across * down > MAX_TILE or not 1 < found.columns * found.rows <= MAX_TILES:
        return None
    return Grid(found.columns, found.rows, across, down, width, height, orientation(properties))


def orientation(properties: list[Property]) -> int:
    """The combined effect of all rotations and mirrorings, as EXIF's orientation."""
    probe = turned = Pillow.frombytes("L", (2, 2), bytes(range(4)))
    for kind, body in properties:
        if kind == b"irot" and body[:1] and body[0] & 3:
            turned = turned.transpose(ANTICLOCKWISE[body[0] & 3])
        if kind == b"imir" and body[:1]:
            flip = Pillow.Transpose.FLIP_LEFT_RIGHT if body[0] & 1 else Pillow.Transpose.FLIP_TOP_BOTTOM
            turned = turned.transpose(flip)
    same = (n for n, turn in TURNS.items() if probe.transpose(turn).tobytes() == turned.tobytes())
    return next(same, 1)


def scale(tiles: Grid, least: tuple[int, int]) -> int:
    """By which factor the tiles can be scaled down so that the picture has at least this size."""
    by = 1
    while (
        by < 16
        and tiles.tile_width % (by * 2) == tiles.tile_height % (by * 2) == 0
        and tiles.width >= least[0] * by * 2
        and tiles.height >= least[1] * by * 2
    ):
        by *= 2
    return by


def decode(data: bytes, tiles: Grid, by: int) -> Pillow.Image:
    """The picture, scaled down by ``by``, not turned.

    Raises:
        TaggingError: ``damaged_image``.
    """
    library = _library()
    shown = Pillow.new("RGB", (-(-tiles.width // by), -(-tiles.height // by)))
    with _primary(library, data) as handle:
        if library is None or handle is None:
            raise damaged()
        for row in range(tiles.rows):
            for column in range(tiles.columns):
                tile = _tile(library, handle, column, row)
                place = (column * tiles.tile_width // by, row * tiles.tile_height // by)
                shown.paste(tile.reduce(by) if by > 1 else tile, place)
    return shown


def _tile(library: Any, handle: c_void_p, column: int, row: int) -> Pillow.Image:
    options = library.heif_decoding_options_alloc()
    for at in (UNTURNED, TO_8_BITS):
        ctypes.c_uint8.from_address(options + at).value = 1
    image = c_void_p()
    try:
        error = library.heif_image_handle_decode_image_tile(
            handle, byref(image), RGB, INTERLEAVED_RGB, options, column, row
        )
        if error.code:
            raise damaged()
        stride = c_int()
        pixels = library.heif_image_get_plane_readonly(image, INTERLEAVED, byref(stride))
        size = (library.heif_image_get_width(image, INTERLEAVED), library.heif_image_get_height(image, INTERLEAVED))
        if not pixels or min(size) < 1 or stride.value < 3 * size[0]:
            raise damaged()
        content = ctypes.string_at(pixels, stride.value * (size[1] - 1) + 3 * size[0])
        return Pillow.frombytes("RGB", size, content.ljust(stride.value * size[1]), "raw", "RGB", stride.value)
    finally:
        library.heif_image_release(image)
        library.heif_decoding_options_free(options)


@contextlib.contextmanager
def _primary(library: Any, data: bytes) -> Iterator[c_void_p | None]:
    context, handle = c_void_p(library.heif_context_alloc()), c_void_p()
    try:
        library.heif_context_set_max_decoding_threads(context, 0)
        failed = (
            library.heif_context_read_from_memory_without_copy(context, data, len(data), None).code
            or library.heif_context_get_primary_image_handle(context, byref(handle)).code
        )
        yield None if failed else handle
    finally:
        if handle:
            library.heif_image_handle_release(handle)
        library.heif_context_free(context)


@cache
def _library() -> Any:
    """pillow-heif's own libheif, which is already loaded."""
    home = Path(pillow_heif.__file__).parent
    found = [*home.parent.glob("pillow_heif.libs/libheif*.so*"), *home.glob(".dylibs/libheif*.dylib")]
    try:
        library: Any = ctypes.CDLL(str(found[0])) if found else None
        if library is not None:
            _declare(library)
    except (OSError, AttributeError):  # another build, or an older libheif
        return None
    return library


def _declare(library: Any) -> None:
    pointer = c_void_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "heif_context_alloc": (pointer, []), "heif_context_free": (None, [pointer]),
        "heif_context_set_max_decoding_threads": (None, [pointer, c_int]),
        "heif_context_read_from_memory_without_copy": (_Error, [pointer, c_char_p, c_size_t, pointer]),
        "heif_context_get_primary_image_handle": (_Error, [pointer, POINTER(pointer)]),
        "heif_image_handle_release": (None, [pointer]), "heif_image_handle_has_alpha_channel": (c_int, [pointer]),
        "heif_image_handle_get_image_tiling": (_Error, [pointer, c_int, POINTER(_Tiling)]),
        "heif_image_handle_decode_image_tile":
            (_Error, [pointer, POINTER(pointer), c_int, c_int, pointer, c_uint32, c_uint32]),
        "heif_decoding_options_alloc": (pointer, []), "heif_decoding_options_free": (None, [pointer]),
        "heif_image_get_plane_readonly": (pointer, [pointer, c_int, POINTER(c_int)]),
        "heif_image_get_width": (c_int, [pointer, c_int]), "heif_image_get_height": (c_int, [pointer, c_int]),
        "heif_image_release": (None, [pointer]),
    }  # fmt: skip
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
