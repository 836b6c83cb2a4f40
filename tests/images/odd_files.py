"""Builds odd files: intact pictures with wrong or huge metadata, unusual pixels, damaged ends, other kinds."""

from __future__ import annotations

import array
import io
import struct
import zlib

from PIL import Image as Pillow
from PIL import ImageDraw

COLOURS = ((220, 30, 30), (30, 160, 50), (30, 50, 210), (235, 220, 40))
Chunk = tuple[bytes, bytes]


def quarters(width: int = 320, height: int = 240) -> Pillow.Image:
    image = Pillow.new("RGB", (width, height))
    pen = ImageDraw.Draw(image)
    for at, colour in enumerate(COLOURS):
        x, y = at % 2 * width // 2, at // 2 * height // 2
        pen.rectangle((x, y, x + width // 2 - 1, y + height // 2 - 1), fill=colour)
    return image


def saved(kind: str, image: Pillow.Image | None = None, **options: object) -> bytes:
    out = io.BytesIO()
    (image or quarters()).save(out, kind, **options)
    return out.getvalue()


def chunk(kind: bytes, body: bytes, crc: int | None = None, length: int | None = None) -> bytes:
    check = zlib.crc32(kind + body) if crc is None else crc
    return struct.pack(">I", len(body) if length is None else length) + kind + body + struct.pack(">I", check)


def png_with(*extra: bytes, data: bytes | None = None, before_pixels: bool = True) -> bytes:
    """A PNG with more chunks, before or after its pixels."""
    data = data or saved("PNG")
    at = data.index(b"IDAT") - 4 if before_pixels else data.index(b"IEND") - 4
    return data[:at] + b"".join(extra) + data[at:]


def segment(marker: int, body: bytes, length: int | None = None) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2 if length is None else length) + body


def jpeg_with(*segments: bytes, data: bytes | None = None) -> bytes:
    """A JPEG with more segments at its beginning."""
    data = data or saved("JPEG", quality=90)
    return data[:2] + b"".join(segments) + data[2:]


def riff_with(*chunks: Chunk, data: bytes | None = None) -> bytes:
    """A WebP with more chunks at its end."""
    body = (data or saved("WEBP", quality=90))[12:] + b"".join(
        kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2) for kind, content in chunks
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


Tag = tuple[int, int, int, bytes]


def tiff_of(
    code: str, values: list[float], width: int, height: int, *, bands: int = 1, sample_format: int = 1, order: str = "<",
    photometric: int | None = None, more: tuple[Tag, ...] = (),
) -> bytes:  # fmt: skip
    """An uncompressed TIFF of any numbers; ``more``: tags (number, type, count, value)."""
    pixels = struct.pack(f"{order}{len(values)}{code}", *values)
    bits = 8 * array.array(code).itemsize

    def short(tag: int, value: int) -> Tag:
        return tag, 3, 1, struct.pack(order + "HH", value, 0)

    long = order + "I"
    tags: dict[int, Tag] = {
        tag: short(tag, value) for tag, value in (
            (256, width), (257, height), (258, bits), (259, 1), (262, photometric if photometric is not None else 2 if bands > 2 else 1),
            (277, bands), (278, height), (339, sample_format),
        )
    }  # fmt: skip
    tags |= {tag[0]: tag for tag in more}
    tags[273] = (273, 4, 1, b"")
    tags[279] = (279, 4, 1, struct.pack(long, len(pixels)))
    size = 8 + 2 + 12 * len(tags) + 4
    tail = b""
    fields = []
    for tag, kind, count, value in sorted(tags.values()):
        if tag == 273:
            value = struct.pack(long, 0)
        elif len(value) > 4:
            tail, value = tail + value, struct.pack(long, size + len(tail))
        fields.append([tag, kind, count, value.ljust(4, b"\0")])
    for field in fields:
        if field[0] == 273:
            field[3] = struct.pack(long, size + len(tail))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(long, 8) + struct.pack(order + "H", len(fields))
    return (
        head
        + b"".join(struct.pack(order + "HHI", *f[:3]) + f[3] for f in fields)
        + struct.pack(long, 0)
        + tail
        + pixels
    )


def ramp(width: int, height: int, low: float, high: float) -> list[float]:
    """Numbers that grow from left to right."""
    return [low + (high - low) * x / (width - 1) for _ in range(height) for x in range(width)]


def adam7(image: Pillow.Image) -> bytes:
    """An interlaced PNG, which Pillow does not write."""
    data = image.convert("RGB")
    rows = b""
    for x0, y0, dx, dy in (
        (0, 0, 8, 8),
        (4, 0, 8, 8),
        (0, 4, 4, 8),
        (2, 0, 4, 4),
        (0, 2, 2, 4),
        (1, 0, 2, 2),
        (0, 1, 1, 2),
    ):
        for y in range(y0, image.height, dy):
            row = b"".join(bytes(data.getpixel((x, y))) for x in range(x0, image.width, dx))
            rows += b"\0" + row if row else b""
    head = struct.pack(">IIBBBBB", *image.size, 8, 2, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
