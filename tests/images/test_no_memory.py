"""A decoder without enough memory never makes a file count as damaged, and never makes another picture of it."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pillow_heif
import pytest
from PIL import Image as Pillow

from autotag.errors import TaggingError
from autotag.images.children import DATA_MARGIN, FORK_SERVER, Child, ChildDied, Decoded
from autotag.images.decode import COMMON_NEED
from autotag.images.files import Download, Space
from images.odd_files import adam7, quarters, saved, tiff_of

#: Bytes that the child may allocate. Each decoder fails at another place: at its first table, in a row, at the end.
LIMITS = (1_000_000, 4_500_000, 8_000_000, 16_000_000)
ENOUGH = 2_000_000_000
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="400" height="300"><rect width="200" height="150" fill="red"/></svg>'


def picture(width: int = 1000, height: int = 750) -> Pillow.Image:
    return quarters(width, height)


def kind(name: str, **options: Any) -> Callable[[], bytes]:
    return lambda: saved(name, picture(), **options)


def animated(name: str) -> Callable[[], bytes]:
    return lambda: saved(name, picture(600, 450), save_all=True, append_images=[picture(600, 450).rotate(180)])


def heic(width: int, height: int, **options: int) -> bytes:
    out = io.BytesIO()
    pillow_heif.from_pillow(picture(width, height)).save(out, quality=40, **options)
    return out.getvalue()


FILES: dict[str, Callable[[], bytes]] = {
    "JPEG": kind("JPEG"),
    "progressive JPEG": kind("JPEG", progressive=True),
    "CMYK JPEG": lambda: saved("JPEG", picture().convert("CMYK")),
    "PNG": kind("PNG", compress_level=1),
    "interlaced PNG": lambda: adam7(picture(320, 240)),
    "animated PNG": animated("PNG"),
    "uncompressed TIFF": kind("TIFF"),
    "TIFF": kind("TIFF", compression="tiff_lzw"),
    "TIFF of one strip": kind("TIFF", compression="tiff_adobe_deflate", strip_size=10**9),
    "TIFF of one tile": kind("TIFF", compression="packbits", tile=(1008, 752)),
    "TIFF of JPEGs": kind("TIFF", compression="jpeg"),
    "TIFF with Zstandard": kind("TIFF", compression="zstd"),
    "TIFF of numbers": lambda: tiff_of("f", [x % 99 for x in range(120_000)], 400, 300, sample_format=3),
    "TIFF of a fax": lambda: saved("TIFF", picture().convert("1"), compression="group4"),
    "WebP": kind("WEBP", method=0),
    "lossless WebP": kind("WEBP", method=0, quality=0, lossless=True),
    "animated WebP": animated("WEBP"),
    "GIF": kind("GIF"),
    "BMP": kind("BMP"),
    "AVIF": kind("AVIF", speed=10),
    "HEIC": lambda: heic(400, 300),
    "HEIC of tiles": lambda: heic(1024, 768, tile_size=256),
    "JPEG 2000": lambda: saved("JPEG2000", picture(600, 450)),
    "PDF": kind("PDF"),
    "SVG": lambda: SVG,
    "ICO": lambda: saved("ICO", picture(256, 256), sizes=[(256, 256)], bitmap_format="bmp"),
}


async def outcome(data: bytes, limit: int) -> bytes | None:
    """The picture that a child makes of a file which may allocate ``limit`` bytes; None: the child gives up or dies."""
    child = Child(*await FORK_SERVER.fork(limit), max_need=ENOUGH)
    try:
        async with Download(Space(len(data)), len(data)) as download:
            await download.begin(len(data))
            await download.write(data)
            decoded = await child.decode(download.finish(), 512, ENOUGH, cpu=60, wall=300)
    except ChildDied:
        return None
    finally:
        await child.close()
    assert isinstance(decoded, Decoded)
    return decoded.jpeg


@pytest.mark.parametrize("name", FILES)
async def test_no_memory_is_no_damage(name: str) -> None:
    data = FILES[name]()
    whole = await outcome(data, COMMON_NEED + DATA_MARGIN)
    assert whole, "ordinary files need no more than a child has"
    for limit in LIMITS:
        try:
            got = await outcome(data, limit)
        except TaggingError as error:
            pytest.fail(f"with {limit:,} bytes, an intact file is refused: {error.code}")
        assert got in (None, whole), f"with {limit:,} bytes, something is missing in the picture"


async def test_a_large_webp_reserves_no_canvas() -> None:
    large = saved("WEBP", Pillow.new("RGB", (6500, 6500), "red"), method=0, quality=10)
    assert await outcome(large, COMMON_NEED + DATA_MARGIN)
