"""Icons and cursors of Windows: several pictures in one file."""

from __future__ import annotations

from PIL import IcoImagePlugin

from autotag.images.frames import open_frames
from autotag.images.opened import Opened, damaged
from autotag.images.png import open_png


def open_icon(data: bytes, side: int) -> Opened:
    """Opens the largest picture of an icon or cursor."""
    entries = []
    for at in range(6, 6 + 16 * min(int.from_bytes(data[4:6], "little"), 256), 16):
        entry = data[at : at + 16]
        if len(entry) == 16:
            size, start = int.from_bytes(entry[8:12], "little"), int.from_bytes(entry[12:16], "little")
            body = data[start : start + size]
            bits = entry[6] if data[2] == 1 else 32
            if body:
                entries.append(((entry[0] or 256) * (entry[1] or 256), bits, entry, body))
    if not entries:
        raise damaged()
    _, _, entry, body = max(entries, key=lambda found: found[:2])
    if body.startswith(b"\x89PNG"):
        opened = open_png(body, side)
        return Opened("ICO", opened.width, opened.height, opened.cost + len(data), opened.decode, opened.orientation)
    depth = body[14:16] if len(body) > 16 else b"\x20\0"
    size_and_start = len(body).to_bytes(4, "little") + (22).to_bytes(4, "little")
    alone = b"\0\0\1\0\1\0" + entry[:4] + b"\1\0" + depth + size_and_start + body
    return open_frames("ICO", alone, side, IcoImagePlugin.IcoImageFile)
