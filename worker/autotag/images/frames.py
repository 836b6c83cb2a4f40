"""JPEG 2000, animated PNG and WebP, and code that AVIF, BMP, GIF and ICO share with them: Pillow decodes all of
these."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    ImageFile,
    ImageStat,
    Jpeg2KImagePlugin,
    TiffImagePlugin,
)
from PIL import Image as Pillow

from autotag.images import vips
from autotag.images.finish import SCALING, flattened, plain, to_srgb
from autotag.images.jpeg import rows_decoded
from autotag.images.levels import scale_numbers
from autotag.images.opened import FIXED_NEED, Decoded, Opened, damaged, share
from autotag.images.sent import ImageNotes
from autotag.images.shape import fit

#: Bytes per pixel that Pillow needs at its peak: for the frame, the frame before it, and conversions.
STILL, ANIMATED = 10, 20
HELD = 8  # bytes per pixel that a still picture keeps: the decoded picture and its copy
MAX_FRAMES = 100  # frames that are searched for one that is not blank
CONTRAST = 8.0  # standard deviation of grey; a frame with less counts as blank if another frame has more
#: Plugins that fill the picture from top to bottom, so that the rows of a truncated file can be counted.
COUNTED = (BmpImagePlugin.BmpImageFile, GifImagePlugin.GifImageFile, TiffImagePlugin.TiffImageFile)
Opener = Callable[[io.BytesIO], ImageFile.ImageFile]


def open_frames(kind: str, data: bytes, side: int, opener: Opener, icc: bytes | None = None) -> Opened:
    """Opens a file with one of Pillow's plugins. icc: its colour profile, if the plugin does not find it."""
    image = opener(io.BytesIO(data))
    animated = getattr(image, "n_frames", 1) > 1
    pixels = image.width * image.height
    need = FIXED_NEED + 3 * len(data) + pixels * (ANIMATED if animated else STILL)
    held = None if animated else FIXED_NEED + len(data) + pixels * HELD
    return Opened(kind, image.width, image.height, need, partial(_decode, data, opener, animated, icc=icc), held=held)


def open_jpeg2000(data: bytes, side: int) -> Opened:
    """Opens a JPEG 2000, which is decoded at a lower resolution if it is large."""
    with Jpeg2KImagePlugin.Jpeg2KImageFile(io.BytesIO(data)) as image:
        width, height = image.size
        bands = len(image.getbands())
    style = data.find(b"\xff\x52")  # COD
    levels = data[style + 9] if 0 <= style < len(data) - 9 else 0
    shape = fit(width, height, side)
    reduce = 0
    while reduce < min(levels, 32) and min(width / shape.width, height / shape.height) >= 2 ** (reduce + 2):
        reduce += 1
    need = FIXED_NEED + 4 * len(data) + ((width * height * (4 * bands + 12)) >> 2 * reduce)
    return Opened("JPEG 2000", width, height, need, partial(_decode, data, partial(_reduced, reduce), False))


def _reduced(reduce: int, data: io.BytesIO) -> ImageFile.ImageFile:
    image = Jpeg2KImagePlugin.Jpeg2KImageFile(data)
    image.reduce = reduce
    return image


def _decode(
    data: bytes, opener: Opener, animated: bool, width: int, height: int, *, icc: bytes | None = None
) -> Decoded:
    image = opener(io.BytesIO(data))
    icc = icc or image.info.get("icc_profile")
    if animated:
        picture, frame = frame_with_something(image, (width, height))
        return Decoded(picture, icc, {"frame": frame} if frame else {})
    rows, top = image.height, 0
    try:
        image.load()
    except (OSError, SyntaxError, ValueError):
        if not isinstance(image, COUNTED):
            raise
        image = opener(io.BytesIO(data))
        upwards = _is_upside_down(image)
        rows = rows_decoded(image, upwards=upwards)
        top = image.height - rows if upwards else 0
    notes: ImageNotes = {}
    picture = image.copy()
    if image.mode.startswith(("I", "F")):  # numbers of an unknown range
        picture = numbers(image, width, height)
    if rows < image.height:
        notes = share(rows, image.height)
        picture = picture.crop((0, top, image.width, top + rows))
    return Decoded(picture, icc, notes)


def _is_upside_down(image: ImageFile.ImageFile) -> bool:
    """Whether the file stores the last row first, as most BMPs do."""
    arguments = image.tile[0].args
    return isinstance(image, BmpImagePlugin.BmpImageFile) and isinstance(arguments, tuple) and arguments[-1] == -1


def numbers(image: Pillow.Image, width: int, height: int) -> Pillow.Image:
    """A picture of large or floating-point numbers, converted to 8 bits per colour and scaled down."""
    data = image.convert("F").tobytes()
    kind = "ushort" if image.mode.startswith("I;16") else "float"
    if kind == "ushort":
        data = image.convert("I;16").tobytes()
    return scale_numbers(lambda: vips.from_memory(data, image.width, image.height, kind), width, height)


def frame_with_something(image: Pillow.Image, size: tuple[int, int]) -> tuple[Pillow.Image, int]:
    """The first frame that is not blank, scaled down, and its number; the first frame if all are blank."""
    best, best_frame, most = None, 0, -1.0
    for frame in range(MAX_FRAMES):
        try:
            image.seek(frame)
            image.load()
        except EOFError:
            break
        except (OSError, SyntaxError, ValueError):
            if best is None:
                raise
            break  # the file is damaged from here on
        picture = plain(image)
        picture = picture.resize(size, SCALING, reducing_gap=3.0) if picture.width > size[0] else picture.copy()
        contrast = ImageStat.Stat(flattened(to_srgb(picture, None)).convert("L")).stddev[0]
        if contrast > most + CONTRAST or best is None:
            best, best_frame, most = picture, frame, contrast
        if contrast >= CONTRAST:
            break
    if best is None:
        raise damaged()
    return best, best_frame
