"""GIF files. Their comments and extensions are removed, because Pillow fails on some of them."""

from __future__ import annotations

from PIL import GifImagePlugin

from autotag.images.frames import open_frames
from autotag.images.opened import Opened

GRAPHIC_CONTROL = 0xF9


def open_gif(data: bytes, side: int) -> Opened:
    """Opens a GIF.

    Raises:
        TaggingError: it is damaged.
    """
    return open_frames("GIF", _cleaned(data), side, GifImagePlugin.GifImageFile)


def _cleaned(data: bytes) -> bytes:
    """The header, the palettes, the frames and their display options. From the first invalid byte on, everything is
    kept."""
    at = 13 + (3 << (data[10] & 7) + 1 if data[10] & 0x80 else 0)
    parts = [data[:at]]
    while at < len(data):
        start = at
        if data[at] == 0x21 and at + 1 < len(data):
            at = _end_of_blocks(data, at + 2)
            if data[start + 1] == GRAPHIC_CONTROL:
                parts.append(data[start:at])
        elif data[at] == 0x2C and at + 9 < len(data):
            flags = data[at + 9]
            at = _end_of_blocks(data, at + 11 + (3 << (flags & 7) + 1 if flags & 0x80 else 0))
            parts.append(data[start:at])
        else:
            parts.append(data[at:])
            break
    return b"".join(parts)


def _end_of_blocks(data: bytes, at: int) -> int:
    while at < len(data) and data[at]:
        at += data[at] + 1
    return min(at + 1, len(data))
