"""Image files that tests and benchmarks make: ordinary ones, and ones that are large or slow only when decoded."""

from __future__ import annotations

import io
import random
import zlib

from PIL import Image, ImageDraw

#: What the simulator says of `quarters`, upright.
UPRIGHT = ("top left red", "top right green", "bottom left blue", "bottom right yellow", "landscape")


def quarters(size: tuple[int, int] = (800, 600)) -> Image.Image:
    """Red, green, blue and yellow quarters."""
    image = Image.new("RGB", size)
    pen = ImageDraw.Draw(image)
    w, h = size
    for box, colour in (
        ((0, 0, w // 2, h // 2), (220, 30, 30)), ((w // 2, 0, w, h // 2), (30, 160, 50)),
        ((0, h // 2, w // 2, h), (30, 50, 210)), ((w // 2, h // 2, w, h), (235, 220, 40)),
    ):  # fmt: skip
        pen.rectangle(box, fill=colour)
    return image


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    """The image as a file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def photograph(megapixels: float, kind: str = "JPEG", seed: int = 1) -> bytes:
    """A file as large and as slow to decode as a photograph of this size: shapes with noise."""
    width, height = round((megapixels * 1e6 * 4 / 3) ** 0.5), round((megapixels * 1e6 * 3 / 4) ** 0.5)
    noise = Image.effect_noise((512, 512), 24)
    image, rng = quarters((width, height)), random.Random(seed)
    grain = Image.new("L", (width, height))
    for x in range(0, width, 512):
        for y in range(0, height, 512):
            grain.paste(noise.transpose(Image.Transpose(rng.randrange(7))), (x, y))
    image = Image.blend(image, Image.merge("RGB", (grain, grain, grain)), 0.15)
    return encoded(image, kind, quality=88) if kind == "JPEG" else encoded(image, kind)


def flat_png(width: int, height: int, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of nothing but zeros: some kilobytes, however large the picture is."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")

    line = 1 + (width * depth * (3 if colour == 2 else 1) + 7) // 8
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([depth, colour, 0, 0, 0])
    squeezer, body = zlib.compressobj(9), bytearray()
    rows = bytes(line * 64)
    for _ in range(height // 64):
        body += squeezer.compress(rows)
    body += squeezer.compress(bytes(line * (height % 64))) + squeezer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", bytes(body)) + chunk(b"IEND", b"")


def slow_jpeg(side: int, scans: int) -> bytes:
    """A small progressive JPEG whose decoder goes over all pixels once for each scan."""
    data = encoded(Image.new("L", (side, side), 90), "JPEG", progressive=True, quality=50)
    at = data.rindex(b"\xff\xda")  # the last scan, a refinement of nothing
    return data[:at] + data[at:-2] * scans + b"\xff\xd9"
