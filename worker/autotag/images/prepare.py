"""Prepares an image file for the model.

The result is a new JPEG: upright, in sRGB, without metadata, in the size that the model sees. The files are untrusted,
so this runs in a process that can be killed. docs/images.md describes the rules for users.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL import Image as Pillow

from autotag.errors import TaggingError, image_error
from autotag.images.avif import open_avif
from autotag.images.bmp import open_bmp
from autotag.images.documents import open_pdf, open_svg
from autotag.images.finish import encode
from autotag.images.frames import open_jpeg2000
from autotag.images.gif import open_gif
from autotag.images.heif import open_heif
from autotag.images.icons import open_icon
from autotag.images.jpeg import open_jpeg
from autotag.images.kinds import kind_of
from autotag.images.opened import Opened, damaged
from autotag.images.png import open_png
from autotag.images.riff import open_webp
from autotag.images.sent import Prepared
from autotag.images.shape import fit
from autotag.images.tiff import open_raw, open_tiff

Pillow.MAX_IMAGE_PIXELS = None  # limits are on memory: `Opened.need`

OPENERS: dict[str, Callable[[bytes, int], Opened]] = {
    "JPEG": open_jpeg, "PNG": open_png, "GIF": open_gif, "BMP": open_bmp, "AVIF": open_avif,
    "TIFF": open_tiff, "RAW": open_raw, "WebP": open_webp,
    "HEIC": open_heif, "HEIF": open_heif, "ICO": open_icon, "JPEG 2000": open_jpeg2000,
    "PDF": open_pdf, "SVG": open_svg,
}  # fmt: skip


def measure(path: Path, side: int, max_need: int | None = None) -> Opened:
    """Reads the headers of a file and chooses the best way to decode it within ``max_need`` bytes. Decodes nothing.

    Raises:
        TaggingError: ``image``: the file is empty, not an image, damaged or of an unsupported kind.
    """
    return _choose_way(_open(path.read_bytes(), side), max_need)


def prepare(path: Path, side: int, max_need: int) -> Prepared:
    """Converts a file to the JPEG that is sent, with sides of at most ``side`` pixels.

    Raises:
        TaggingError: ``image``: as `measure`, or ``image_too_large`` if no way to decode it fits ``max_need``.
    """
    return prepare_bytes(path.read_bytes(), side, max_need)


def prepare_bytes(data: bytes, side: int, max_need: int) -> Prepared:
    """Like `prepare`, for a file in memory."""
    opened = _choose_way(_open(data, side), max_need)
    if opened.need > max_need:
        raise image_error(
            "image_too_large",
            f"The image has {opened.width} × {opened.height} pixels. Decoding this file ({opened.kind}) takes"
            f" {opened.need / 1e6:.0f} MB of memory; {max_need / 1e6:.0f} MB are available. {opened.advice}.",
        )
    return prepare_opened(opened, side)


def prepare_opened(opened: Opened, side: int) -> Prepared:
    """Like `prepare`, for a file that `measure` has opened."""
    shape = fit(*opened.upright, side)
    target = (shape.height, shape.width) if opened.orientation >= 5 else (shape.width, shape.height)
    try:
        decoded = opened.decode(*target)
        smaller = target < (opened.width, opened.height)
        jpeg = encode(decoded, opened.orientation, shape, smaller=smaller)
    except (TaggingError, MemoryError):
        raise
    except Exception:  # noqa: BLE001
        # Decoders raise many exception types for broken files (OSError, SyntaxError, struct.error, …).
        # All of them are errors of this image only.
        raise damaged() from None
    notes = decoded.notes.copy()
    if shape.pieces > 1:
        notes["pieces"] = shape.pieces
    return Prepared(jpeg, notes)


def _choose_way(opened: Opened, max_need: int | None) -> Opened:
    """The best way to decode the file that fits ``max_need``; if none fits, the one that needs least."""
    while max_need is not None and opened.need > max_need and opened.cheaper:
        opened = opened.cheaper
    return opened


def _open(data: bytes, side: int) -> Opened:
    kind = kind_of(data)
    try:
        opened = OPENERS[kind](data, side)
        shape = fit(*opened.upright, side)
        return opened.finished(shape.width * shape.height)
    except (TaggingError, MemoryError):
        raise
    except Exception:  # noqa: BLE001 (as above)
        raise damaged() from None
