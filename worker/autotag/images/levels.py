"""Scales pictures with libvips, and gives numbers that have no known range the contrast that a person needs.

Elevation maps, X-rays and scientific pictures hold 16-bit or floating-point numbers. Their darkest and lightest half
percent become black and white. Numbers that mean "no data" and numbers that are not finite become transparent.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Sequence

from PIL import Image as Pillow

from autotag.images import vips

CODES = {"char": "b", "ushort": "H", "short": "h", "uint": "I", "int": "i", "float": "f", "double": "d"}
SAMPLE = 100_000  # pixels that are read to find the range
PERCENT = 0.005  # this share of the pixels becomes black, and as many become white
#: 16-bit pictures whose light parts reach this share of the range are ordinary photographs: nothing is stretched.
ORDINARY = 0.25
#: The largest number of each integer type, which is white.
FULL = {"char": 127.0, "ushort": 65535.0, "short": 32767.0, "uint": 2.0**32 - 1, "int": 2.0**31 - 1}
LARGE = 1e30  # larger numbers are not measurements
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
Reopen = Callable[[], vips.Image]


def scale_numbers(reopen: Reopen, width: int, height: int, nodata: float | None = None) -> Pillow.Image:
    """The picture in this size, with 8 bits per colour.

    Args:
        reopen: opens the file; it is read twice if its numbers have no known range.
        width: of the result, in pixels.
        height: of the result, in pixels.
        nodata: a number that means "no data".

    Raises:
        vips.VipsError: the file is damaged.
    """
    image = reopen()
    if image.interpretation in ("lab", "labs"):
        image = image("colourspace", space="srgb")
    if image.format in ("complex", "dpcomplex"):
        image = image("complexget", get="real")
    if image.format != "uchar":
        image = _to_bytes(image, reopen, nodata)
    return _scaled(image, width, height)


def _scaled(image: vips.Image, width: int, height: int) -> Pillow.Image:
    if image.interpretation == "cmyk" and image.bands >= 4:
        if image.bands > 4:
            image = image("extract_band", band=0, n=4)
        if (image.width, image.height) != (width, height):
            image = image("resize", scale=width / image.width, vscale=height / image.height)
        return Pillow.frombytes("CMYK", (image.width, image.height), image.pixels())
    if image.bands > 4 or (image.bands == 2 and image.interpretation == "multiband"):
        image = image("extract_band", band=0, n=3 if image.bands > 4 else 1)
    space = "b-w" if image.bands < 3 else "srgb"
    if image.interpretation != space:
        image = image("copy", interpretation=space)
    if (image.width, image.height) != (width, height):
        image = image("thumbnail_image", width=width, height=height, size="force", no_rotate=True)
    return Pillow.frombytes(MODES[image.bands], (image.width, image.height), image.pixels())


def _to_bytes(image: vips.Image, reopen: Reopen, nodata: float | None) -> vips.Image:
    values, bands = _sample(reopen())
    has_alpha = bands in (2, 4) and image.interpretation not in ("multiband", "cmyk")
    colours = bands - has_alpha
    opaque = 1.0
    if has_alpha:
        opaque = _opaque(values[bands - 1 :: bands], image.format)
        values = [value for at, value in enumerate(values) if (at + 1) % bands]
    empty = nodata if nodata is not None else _empty(values, image.format)
    low, high = _range(values, image.format, empty)
    if nodata is None and image.format in ("ushort", "uint") and high == FULL[image.format]:
        empty = None  # an ordinary picture in which one shade is far from all others
    alpha = (
        image("extract_band", band=bands - 1)("linear", a=[255 / opaque], b=[0.0])("cast", format="uchar")
        if has_alpha
        else None
    )
    data = (
        image("extract_band", band=0, n=min(colours, 4 if image.interpretation == "cmyk" else 3))
        if bands > 1
        else image
    )
    if image.interpretation != "cmyk" and data.bands == 2:
        data = data("extract_band", band=0)
    scale = 255 / ((high - low) or 1)
    shown = data("linear", a=[scale], b=[-low * scale])("cast", format="uchar")
    if alpha is None and (empty is not None or image.format in ("float", "double")):
        alpha = _valid(data, empty)
    space = image.interpretation if image.interpretation == "cmyk" else "b-w" if shown.bands == 1 else "srgb"
    if alpha is not None:
        shown = vips.call("bandjoin", **{"in": [shown, alpha]})
    return shown("copy", interpretation=space)


def _opaque(values: Sequence[float], kind: str) -> float:
    """The alpha value that means "not transparent". Floats may go up to 1, to 255 or to 65535."""
    if kind in FULL:
        return FULL[kind]
    most = max((value for value in values if math.isfinite(value)), default=1.0)
    return 1.0 if most <= 1.5 else 255.0 if most <= 256 else 65535.0


def _valid(data: vips.Image, empty: float | None) -> vips.Image:
    """255 where the numbers are measurements, 0 elsewhere."""
    valid = data("relational_const", relational="more", c=[-LARGE])
    valid = vips.call(
        "boolean", left=valid, right=data("relational_const", relational="less", c=[LARGE]), boolean="and"
    )
    if empty is not None:
        differs = data("relational_const", relational="noteq", c=[float(empty)])
        valid = vips.call("boolean", left=valid, right=differs, boolean="and")
    return valid("bandbool", boolean="and") if valid.bands > 1 else valid


def _sample(image: vips.Image) -> tuple[list[float], int]:
    """Numbers from all parts of the picture, all bands of each pixel, without averaging."""
    step = max(1, math.isqrt(image.width * image.height // SAMPLE))
    code, bands = CODES[image.format], image.bands
    if step > 1:
        image = image("subsample", xfac=min(step, image.width), yfac=min(step, image.height))
    return [*array(code, image.pixels())], bands


def _empty(values: Sequence[float], kind: str) -> float | None:
    """A number that seems to mean "no data" although the file does not say so: the lowest or highest, far from all
    others."""
    numbers = sorted({value for value in values if math.isfinite(value) and abs(value) < LARGE})
    if len(numbers) < 4:
        return None
    for end, beside, other in ((0, 1, -1), (-1, -2, 0)):
        gap, rest = abs(numbers[beside] - numbers[end]), abs(numbers[other] - numbers[beside])
        if rest and gap > rest and (values.count(numbers[end]) > 1 or kind in ("float", "double")):
            return numbers[end]
    return None


def _range(values: Sequence[float], kind: str, empty: float | None) -> tuple[float, float]:
    """The numbers that become black and white."""
    numbers = sorted(value for value in values if math.isfinite(value) and abs(value) < LARGE and value != empty)
    if not numbers:
        return 0.0, 1.0
    cut = int(len(numbers) * PERCENT)
    low, high = numbers[cut], numbers[-1 - cut]
    if kind in ("ushort", "uint") and high >= ORDINARY * FULL[kind]:
        return 0.0, FULL[kind]
    if kind in ("float", "double") and numbers[0] >= 0:
        for full, least in ((1.0, ORDINARY), (255.0, 200.0)):
            if least <= high and numbers[-1] <= full:
                return 0.0, full
    if low == high:
        low, high = numbers[0], numbers[-1]
    return float(low), float(high)
