"""BMP files. Pillow decodes most of them; libvips decodes those whose pixels are numbers of 16 or 32 bits.

In these, each colour and the transparency may use any bits of the number. The file has a mask for each.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import partial

from PIL import BmpImagePlugin

from autotag.images import vips
from autotag.images.frames import open_frames
from autotag.images.levels import scale_numbers
from autotag.images.opened import FIXED_NEED, Decoded, Opened, share
from autotag.images.sent import ImageNotes

RGB, FIELDS, ALPHA_FIELDS = 0, 3, 6  # how the pixels are stored (wingdi.h: BI_RGB, BI_BITFIELDS, BI_ALPHABITFIELDS)
INFO, WITH_ALPHA = 40, 56  # bytes of the basic header, and of the first header version with a mask for the transparency
MASKS = {16: (0x7C00, 0x03E0, 0x001F), 32: (0xFF0000, 0x00FF00, 0x0000FF)}  # if the file has none
KINDS = {16: "ushort", 32: "uint"}


@dataclass(frozen=True)
class Fields:
    """Where the pixels are, and what their bits mean. stride: bytes of a row. masks: red, green, blue, transparency."""

    width: int
    height: int
    upwards: bool
    bits: int
    masks: tuple[int, ...]
    start: int

    @property
    def stride(self) -> int:
        return -(-self.width * self.bits // 32) * 4


def open_bmp(data: bytes, side: int, *, icon: bool = False) -> Opened:
    """Reads the headers of a BMP. In an icon, the bits that no colour uses are transparency."""
    fields = read_fields(data, icon=icon)
    if fields is None:
        return open_frames("BMP", data, side, BmpImagePlugin.BmpImageFile)
    need = FIXED_NEED + 3 * len(data) + fields.width * 16 * 700
    return Opened("BMP", fields.width, fields.height, need, partial(_decode, data, fields))


def read_fields(data: bytes, *, icon: bool) -> Fields | None:
    """The headers, if the pixels are numbers. Transparency is detected as in Chromium."""
    if len(data) < 14 + INFO:
        return None
    start, size, width, height, _, bits, stored = struct.unpack_from("<IIiiHHI", data, 10)
    if size < INFO or bits not in MASKS or stored not in (RGB, FIELDS, ALPHA_FIELDS) or width < 1 or not height:
        return None
    masks = struct.unpack_from("<4I", data.ljust(70, b"\0"), 14 + INFO)
    has_alpha = stored == ALPHA_FIELDS or (size >= WITH_ALPHA and (stored == FIELDS or bits == 32))
    if icon and size < WITH_ALPHA and (bits, stored) == (32, RGB):
        has_alpha, masks = True, (0, 0, 0, 0xFF000000)
    colours = MASKS[bits] if stored == RGB else masks[:3]
    return Fields(width, abs(height), height > 0, bits, (*colours, masks[3] if has_alpha else 0), start)


def _decode(data: bytes, fields: Fields, width: int, height: int) -> Decoded:
    rows = min(fields.height, max(0, len(data) - fields.start) // fields.stride)
    notes = share(rows, fields.height) if rows < fields.height else ImageNotes()
    pixels = data[fields.start : fields.start + rows * fields.stride]
    across = fields.stride * 8 // fields.bits
    numbers = vips.from_memory(pixels, across, rows, KINDS[fields.bits])
    if across > fields.width:
        numbers = numbers("extract_area", left=0, top=0, width=fields.width, height=rows)
    bands = [_band(numbers, mask & (2**fields.bits - 1)) for mask in fields.masks]
    if not fields.masks[3] or not any(bands[3].pixels()):  # some programs leave the transparency empty
        bands = bands[:3]
    image = vips.call("bandjoin", **{"in": bands})("copy", interpretation="srgb")
    if fields.upwards:
        image = image("flip", direction="vertical")
    return Decoded(scale_numbers(lambda: image, width, height), None, notes)


def _band(numbers: vips.Image, mask: int) -> vips.Image:
    """The bits of a mask, from 0 to 255."""
    shift = (mask & -mask).bit_length() - 1 if mask else 0
    shift = max(shift, mask.bit_length() - 16)  # the upper bits are enough, and libvips's constants are signed
    bits = numbers("boolean_const", boolean="rshift", c=[float(shift)])
    bits = bits("boolean_const", boolean="and", c=[float(mask >> shift)])
    return bits("linear", a=[255 / (mask >> shift or 1)], b=[0.5])("cast", format="uchar")
