"""Icons and cursors of Windows: several pictures in one file, each a PNG, or a bitmap with a mask of its visible
part."""

from __future__ import annotations

from functools import partial

from PIL import Image as Pillow

from autotag.images.bmp import FIELDS, INFO, open_bmp
from autotag.images.finish import plain
from autotag.images.opened import Decoded, Opened, damaged, unsupported
from autotag.images.png import open_png


def open_icon(data: bytes, side: int) -> Opened:
    """Opens the largest picture of an icon or cursor."""
    entries = []
    for at in range(6, 6 + 16 * min(_number(data, 4, 2), 256), 16):
        entry = data[at : at + 16]
        if len(entry) == 16:
            size, start = _number(entry, 8, 4), _number(entry, 12, 4)
            body = data[start : start + size]
            bits = entry[6] if data[2] == 1 else 32
            if body:
                entries.append(((entry[0] or 256) * (entry[1] or 256), bits, body))
    if not entries:
        raise damaged()
    _, _, body = max(entries, key=lambda found: found[:2])
    opened = open_png(body, side) if body.startswith(b"\x89PNG") else _open_bitmap(body, side)
    return Opened("ICO", opened.width, opened.height, opened.need + len(data), opened.decode, opened.orientation)


def _open_bitmap(body: bytes, side: int) -> Opened:
    """Opens a BMP without its first header. Its height includes the rows of the mask."""
    header = _number(body, 0, 4)
    if header < INFO:
        raise unsupported("an icon of OS/2") if header in (12, 16) else damaged()
    width, height, bits, stored = (_number(body, at, size) for at, size in ((4, 4), (8, 4), (14, 2), (16, 4)))
    height //= 2
    colours = (_number(body, 32, 4) or 1 << bits) if bits <= 8 else 0
    start = header + 4 * colours + (12 if header == INFO and stored == FIELDS else 0)
    bmp = b"BM" + bytes(8) + (14 + start).to_bytes(4, "little") + body[:8] + height.to_bytes(4, "little") + body[12:]
    opened = open_bmp(bmp, side, icon=True)
    stride = -(-width // 32) * 4
    mask = body[start + -(-width * bits // 32) * 4 * height :][: stride * height]
    if len(mask) < stride * height:  # it is missing
        mask = b""
    return Opened("ICO", width, height, opened.need, partial(_decode, opened, mask))


def _decode(opened: Opened, mask: bytes, width: int, height: int) -> Decoded:
    """The picture. If a bitmap has its own transparency, its mask is not used."""
    decoded = opened.decode(width, height)
    image = plain(decoded.image)
    if mask and image.mode != "RGBA":
        hidden = Pillow.frombytes(
            "1", (opened.width, opened.height), mask, "raw", "1;I", len(mask) // opened.height, -1
        )
        image = image.convert("RGB")
        image.putalpha(hidden.convert("L").resize(image.size))
    return Decoded(image, None, decoded.notes)


def _number(data: bytes, at: int, size: int) -> int:
    return int.from_bytes(data[at : at + size], "little")
