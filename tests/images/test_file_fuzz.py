"""Mutated files: with any metadata the picture is shown, and with any pixels only a TaggingError is raised.

AUTOTAG_FUZZ: the number of runs of each fuzzer.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable

import pillow_heif
import pytest

from autotag.errors import TaggingError
from autotag.images.prepare import prepare_bytes
from images.judging import judge
from images.odd_files import COLOURS, chunk, jpeg_with, png_with, quarters, riff_with, saved, segment, tiff_of

RUNS = int(os.environ.get("AUTOTAG_FUZZ", "300"))
LIMIT = 200_000_000
SMALL = quarters(64, 48)
EXIF = (
    b"II*\0\x08\0\0\0\x03\0\x12\x01\x03\0\1\0\0\0\1\0\0\0\x0f\x01\2\0\4\0\0\0abc\0\x69\x87\4\0\1\0\0\0\x40\0\0\0"
    + bytes(40)
)
PNG, JPEG, WEBP, GIF = (
    saved("PNG", SMALL),
    saved("JPEG", SMALL, quality=95),
    saved("WEBP", SMALL, quality=95),
    saved("GIF", SMALL),
)
PIXELS = [v for p in SMALL.get_flattened_data() for v in p]
#: Bodies of metadata that are nearly right, to be mutated.
BODIES = (
    EXIF, b"Exif\0\0" + EXIF, b"a\0\0nonsense", b"ICC_PROFILE\0\1\1" + bytes(200), b"MPF\0" + EXIF,
    b"Photoshop 3.0\0008BIM\4\4\0\0\0\0\0\5hello\0", b"http://ns.adobe.com/xap/1.0/\0<x:xmpmeta/>", b"JFIF\0\1\1\0\0\1\0\1\0\0",
    b"\0\0\xb1\x8f", b"GIMP\0" * 40, b"", b"ducky\0", b"JFXX\0\x10",
)  # fmt: skip
NAMES = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"cHRM", b"gAMA", b"pHYs", b"eXIf", b"sBIT", b"tIME", b"hIST", b"sPLT", b"bKGD",
         b"sRGB", b"cICP", b"mDCV", b"vpAg", b"caBX", b"quuX")  # fmt: skip


def noise(random: random.Random) -> bytes:
    """A body of metadata with random changes."""
    body = bytearray(random.choice(BODIES) or random.randbytes(random.randrange(300)))
    for _ in range(random.randrange(6)):
        if body:
            body[random.randrange(len(body))] = random.choice((0, 0xFF, random.randrange(256)))
    if random.random() < 0.2:
        del body[random.randrange(len(body) + 1) :]
    return bytes(body) * random.choice((1, 1, 1, 50))


def turnless(body: bytes) -> bytes:
    """Replaces the tag of an orientation, which would rightly turn the picture."""
    return body.replace(b"\x12\x01", b"\x13\x01").replace(b"\x01\x12", b"\x01\x13")


def odd_png(random: random.Random) -> bytes:
    def one() -> bytes:
        name, body = random.choice(NAMES), turnless(noise(random))
        if name == b"gAMA":
            body = body[: random.choice((0, 1, 3))]
        if name == b"cHRM" and random.random() < 0.5:
            body = body[:32].ljust(32, b"\1")
        return chunk(name, body, crc=random.choice((None, random.getrandbits(32))))

    data = png_with(*(one() for _ in range(random.randrange(1, 5))), data=PNG)
    return png_with(*(one() for _ in range(random.randrange(3))), data=data, before_pixels=False)


def odd_jpeg(random: random.Random) -> bytes:
    markers = [*range(0xE0, 0xEE), 0xEF, 0xFE]
    segments = (
        segment(random.choice(markers), turnless(noise(random))[:65_000]) for _ in range(random.randrange(1, 6))
    )
    return jpeg_with(*segments, data=JPEG) + random.choice((b"", noise(random)))


def odd_webp(random: random.Random) -> bytes:
    kinds = (b"EXIF", b"XMP ", b"ICCP", b"quux", b"META")
    return riff_with(
        *((random.choice(kinds), turnless(noise(random))) for _ in range(random.randrange(1, 4))), data=WEBP
    )


def odd_gif(random: random.Random) -> bytes:
    def block() -> bytes:
        body = noise(random)[:255]
        kind = random.choice((b"\xfe", b"\xff\x0b" + random.choice((b"NETSCAPE2.0", b"XMP DataXMP", b"quux1234567"))))
        return b"!" + kind + (bytes([len(body)]) + body if body else b"") + b"\0"

    at = 13 + 3 * 2 ** ((GIF[10] & 7) + 1)
    return GIF[:at] + b"".join(block() for _ in range(random.randrange(1, 4))) + GIF[at:]


def odd_tiff(random: random.Random) -> bytes:
    tags = (269, 270, 271, 282, 283, 296, 297, 301, 305, 306, 315, 316, 700, 33723, 33550, 34377, 34675, 34665, 34853, 37724,
            42112, 50341, 65000)  # fmt: skip
    used = random.sample(tags, random.randrange(1, 6))
    more = tuple((tag, random.randrange(20), random.choice((1, 2, 999, 2**31)), random.randbytes(4)) for tag in used)
    return tiff_of("B", PIXELS, 64, 48, bands=3, order=random.choice("<>"), more=more)


ODD: tuple[Callable[[random.Random], bytes], ...] = (odd_png, odd_jpeg, odd_webp, odd_gif, odd_tiff)


def test_metadata_never_matters() -> None:
    for seed in range(RUNS):
        generator = random.Random(seed)
        data = generator.choice(ODD)(generator)
        prepared = prepare_bytes(data, 512, LIMIT)
        assert not judge(prepared.jpeg, {"quarters": COLOURS}), f"seed {seed}"
        assert not prepared.notes, f"seed {seed}"


def heic() -> bytes:
    out = io.BytesIO()
    pillow_heif.from_pillow(SMALL).save(out, quality=80)
    return out.getvalue()


SEEDS = (
    PNG, JPEG, WEBP, GIF, heic(), saved("JPEG", SMALL, progressive=True), saved("BMP", SMALL), saved("AVIF", SMALL),
    saved("TIFF", SMALL, compression="tiff_lzw"), saved("JPEG2000", SMALL), saved("ICO", SMALL), saved("WEBP", SMALL, lossless=True),
    saved("PNG", SMALL, save_all=True, append_images=[quarters(64, 48).convert("L").convert("RGB")]), saved("PDF", SMALL),
    tiff_of("f", [float(v) for v in PIXELS], 64, 48, bands=3, sample_format=3), tiff_of("d", [float(v) for v in PIXELS[::3]], 64, 48, sample_format=3),
)  # fmt: skip


@pytest.mark.parametrize("part", range(4))
def test_damaged_pixels_raise_nothing_else(part: int) -> None:
    for seed in range(part, RUNS, 4):
        generator = random.Random(seed)
        data = bytearray(generator.choice(SEEDS))
        for _ in range(generator.randrange(1, 8)):
            data[generator.randrange(len(data))] = generator.choice((0, 0xFF, 0x7F, generator.randrange(256)))
        if generator.random() < 0.3:
            del data[generator.randrange(len(data)) :]
        try:
            prepared = prepare_bytes(bytes(data), 512, LIMIT)
        except TaggingError as error:
            kind = error.kind
        else:
            kind = "image" if not judge(prepared.jpeg, {}) else None
        assert kind == "image", f"seed {seed}"
