"""WebP files. libvips scales them down while it decodes; Pillow decodes animations."""

from __future__ import annotations

import math
from functools import partial

from PIL import Image as Pillow
from PIL import WebPImagePlugin

from autotag.images import exif, vips
from autotag.images.finish import MAX_ICC
from autotag.images.frames import open_frames
from autotag.images.levels import scale_numbers
from autotag.images.opened import ENOUGH_ROWS, FIXED_NEED, Decoded, Opened, damaged, oversampling
from autotag.images.sent import ImageNotes
from autotag.images.shape import fit

PIXELS = (b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
ICC_FLAG, EXIF_FLAG, XMP_FLAG, ANIMATED_FLAG = 0x20, 0x08, 0x04, 0x02


def open_webp(data: bytes, side: int) -> Opened:
    """Reads the chunks of a WebP.

    Raises:
        TaggingError: it is damaged.
    """
    chunks: list[tuple[bytes, bytes]] = []
    icc, orientation, header, there, at = None, 1, b"", 1.0, 12
    while at + 8 <= len(data):
        kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        body = data[at + 8 : at + 8 + length]
        if kind in PIXELS:
            if len(body) < length and any(earlier == b"ANMF" for earlier, _ in chunks):
                break  # the last frame of an animation; the others count
            if len(body) < length:  # the decoder requires the length in the header
                there = min(there, len(body) / length)
                body += b"\0" * (min(length, 2 * len(body)) - len(body))
            chunks.append((kind, body))
        elif kind == b"VP8X" and not header:
            header = body[:10]
        elif kind == b"ICCP" and length <= MAX_ICC:
            icc = body
        elif kind == b"EXIF":
            orientation = exif.orientation(body)
        at += 8 + length + length % 2
    if there < ENOUGH_ROWS or not chunks:
        raise damaged()
    animated = any(kind == b"ANMF" for kind, _ in chunks)
    clean = _written(chunks, header)
    width, height = _size(header, *chunks[0])
    notes: ImageNotes = {"truncated": round(there, 4)} if there < 1 else {}
    if animated:
        opened = open_frames("WebP", clean, side, WebPImagePlugin.WebPImageFile, icc)
        return Opened("WebP", width, height, opened.need, opened.decode, orientation)
    lossless = any(kind in (b"VP8L", b"ALPH") for kind, _ in chunks)
    shape = fit(*((height, width) if orientation >= 5 else (width, height)), side)
    scaled = min(width * height, math.ceil(shape.width * shape.height * oversampling(shape.width, shape.height) ** 2))
    need = FIXED_NEED + 3 * len(data) + 4 * scaled + (width * height * 5 if lossless else width * 4 * 300)
    return Opened("WebP", width, height, need, partial(_decode, clean, icc, notes, (width, height)), orientation)


def _size(header: bytes, kind: bytes, body: bytes) -> tuple[int, int]:
    """Width and height. A decoder would reserve up to 8 bytes for each pixel to find them, which may be too much
    memory.

    Raises:
        TaggingError: it is damaged.
    """
    if len(header) == 10:
        return 1 + int.from_bytes(header[4:7], "little"), 1 + int.from_bytes(header[7:10], "little")
    if kind == b"VP8L" and body[:1] == b"\x2f" and len(body) >= 5:
        sides = int.from_bytes(body[1:5], "little")
        return 1 + (sides & 0x3FFF), 1 + (sides >> 14 & 0x3FFF)
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a" and len(body) >= 10:
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    raise damaged()


def _written(chunks: list[tuple[bytes, bytes]], header: bytes) -> bytes:
    if len(header) == 10:
        flags = header[0] & ~(ICC_FLAG | EXIF_FLAG | XMP_FLAG)
        chunks = [(b"VP8X", bytes([flags]) + header[1:]), *chunks]
    parts = [kind + len(body).to_bytes(4, "little") + body + b"\0" * (len(body) % 2) for kind, body in chunks]
    return b"RIFF" + (4 + sum(map(len, parts))).to_bytes(4, "little") + b"WEBP" + b"".join(parts)


def _decode(
    data: bytes, icc: bytes | None, notes: ImageNotes, size: tuple[int, int], width: int, height: int
) -> Decoded:
    scale = min(1.0, oversampling(width, height) * max(width / size[0], height / size[1]))
    image: Pillow.Image = scale_numbers(lambda: vips.load("webp", data, scale=scale), width, height)
    if "truncated" in notes:
        image = image.crop((0, 0, image.width, max(1, int(image.height * notes["truncated"]))))
    return Decoded(image, icc, notes)
