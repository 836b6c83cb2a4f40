"""Kinds of odd files: what a browser shows is tagged, and the message for the others names their kind."""

from __future__ import annotations

import base64
import gzip
import io
import re
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pillow_heif
import pytest
from PIL import Image as Pillow
from PIL import ImageCms, ImageDraw

from autotag.errors import TaggingError
from autotag.images.prepare import measure, prepare
from images.judging import judge
from images.odd_files import (
    COLOURS,
    adam7,
    chunk,
    jpeg_with,
    png_with,
    quarters,
    ramp,
    riff_with,
    saved,
    segment,
    tiff_of,
)  # fmt: skip

SHOWN = {"quarters": COLOURS}
GRADIENT = {"gradient": True}
NAN, INF = float("nan"), float("inf")
ZEROS = zlib.compress(bytes(20_000_000))


def heic(*images: Pillow.Image, **options: Any) -> bytes:
    out, file = io.BytesIO(), pillow_heif.HeifFile()
    for image in images:
        file.add_from_pillow(image)
    file.save(out, quality=80, **options)
    return out.getvalue()


def exif(orientation: int) -> bytes:
    made = Pillow.Exif()
    made[0x0112] = orientation
    return made.tobytes()


def turned() -> Pillow.Image:
    return quarters(240, 320).resize((320, 240)).transpose(Pillow.Transpose.ROTATE_90)


def with_odd_profile(kind: str) -> bytes:
    """A picture whose colour profile has such different colours that the conversion shows."""
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = (
        lab.replace(b"rXYZ", b"tXYZ")
        .replace(b"gXYZ", b"rXYZ")
        .replace(b"tXYZ", b"gXYZ")
        .replace(b"s\0R\0G\0B", b"o\0d\0d\0!")
        .replace(b"sRGB", b"odd!")
    )
    red, green, blue = quarters().split()
    return saved(kind, Pillow.merge("RGB", (green, red, blue)), icc_profile=swapped)


def linear(image: Pillow.Image | None = None) -> Pillow.Image:
    """A picture with values in proportion to the light, which looks too dark unless the file says so."""
    return (image or quarters()).point([round(255 * (value / 255) ** 2.2) for value in range(256)] * 3)


def linear_png(*extra: bytes) -> bytes:
    return png_with(*extra, data=saved("PNG", linear()))


def linear_16_bit_png() -> bytes:
    pixels = [round(65535 * (v / 255) ** 2.2) for p in quarters(64, 48).get_flattened_data() for v in p]
    rows = b"".join(b"\0" + struct.pack(">192H", *pixels[at : at + 192]) for at in range(0, len(pixels), 192))
    head = struct.pack(">IIBBBBB", 64, 48, 16, 2, 0, 0, 0)
    parts = (chunk(b"IHDR", head), chunk(b"gAMA", struct.pack(">I", 100_000)), chunk(b"IDAT", zlib.compress(rows)))
    return PNG[:8] + b"".join(parts) + chunk(b"IEND", b"")


def linear_avif() -> bytes:
    return saved("AVIF", linear(), quality=95).replace(b"nclx\0\1\0\x0d", b"nclx\0\1\0\x08")


def linear_by_profile() -> bytes:
    """A profile that is called sRGB, but has no gamma: "Linear sRGB"."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    curve = profile.index(b"para\0\0\0\0\0\3") + 12
    profile[curve : curve + 20] = struct.pack(">5i", 65536, 65536, 0, 65536, 0)
    return saved("PNG", linear(), icc_profile=bytes(profile))


def swapped_primaries() -> bytes:
    """A PNG whose first colour is green, as its chromaticities say."""
    red, green, blue = quarters().split()
    points = (31270, 32900, 30000, 60000, 64000, 33000, 15000, 6000)
    more = (chunk(b"gAMA", struct.pack(">I", 45_455)), chunk(b"cHRM", struct.pack(">8I", *points)))
    return png_with(*more, data=saved("PNG", Pillow.merge("RGB", (green, red, blue))))


def bmp(share: float) -> bytes:
    data = saved("BMP")
    return data[: round(len(data) * share)]


def offset_gif() -> bytes:
    """A GIF whose frame is smaller than its canvas, which is transparent around the frame."""
    data = saved("GIF", quarters().quantize(8), transparency=7)
    return data[:6] + struct.pack("<HH", 322, 242) + data[10:]


def strip(width: int, height: int) -> bytes:
    return saved("PNG", quarters(width, height))


def logo(colour: str) -> bytes:
    image = Pillow.new("RGBA", (300, 200), (0, 0, 0, 0))
    ImageDraw.Draw(image).ellipse((90, 60, 210, 140), fill=colour)
    return saved("PNG", image)


def animation(kind: str) -> bytes:
    blank = Pillow.new("RGB", (320, 240), "white")
    return saved(kind, blank, save_all=True, append_images=[blank.point(lambda v: v - 1), quarters()], duration=100)


def archive(name: str, **content: bytes) -> bytes:
    out = io.BytesIO()
    if name == "tar":
        with tarfile.open(fileobj=out, mode="w") as tar:
            tar.addfile(tarfile.TarInfo("a"))
    else:
        with zipfile.ZipFile(out, "w") as zipped:
            zipped.writestr(name, "x")
    return out.getvalue()


def raw() -> bytes:
    """A camera's RAW file: a small sensor, and a preview in a directory of its own."""
    preview = saved("JPEG", quality=90, exif=exif(1))
    sensor = tiff_of("H", [1] * 64, 8, 8, photometric=32803, more=((50706, 1, 4, b"\1\4\0\0"),))
    return sensor + bytes(100) + saved("JPEG", quarters(32, 24)) + preview


def pages() -> bytes:
    small = quarters(80, 60).convert("L").convert("RGB")
    return saved("TIFF", small, save_all=True, append_images=[quarters(), small])


def icon() -> bytes:
    return saved("ICO", quarters(256, 256), sizes=[(16, 16), (256, 256)])


def bmp_icon() -> bytes:
    return saved("ICO", quarters(64, 64), sizes=[(16, 16), (64, 64)], bitmap_format="bmp")


SHADES = (87, 108, 61, 203)
HTML = (
    b'<foreignObject width="40" height="30"><div xmlns="http://www.w3.org/1999/xhtml" style="background:red">Hello</div>'
    b"</foreignObject>"
)


def flat_shades() -> bytes:
    rows = (struct.pack("<160H", *[257 * SHADES[at + side] for side in (0, 1) for _ in range(80)]) for at in (0, 2))
    return saved("PNG", Pillow.frombytes("I;16", (160, 120), b"".join(row * 60 for row in rows)))


def variables(drawing: bytes) -> bytes:
    """The drawing with variables for its colours: of a style, of another variable, and as fallbacks."""
    colours = re.findall(rb'fill="([^"]+)"', drawing)
    for number, colour in enumerate(colours):
        use = (b"var(--c%d)", b"var( --c%d , black)", b"var(--again%d)", b"var(--none%d, " + colour + b")")[number % 4]
        drawing = drawing.replace(b'"' + colour + b'"', b'"' + use % number + b'"')
    defined = b"".join(b"--c%d: %s; --again%d: var(--c%d);" % (n, c, n, n) for n, c in enumerate(colours))
    return drawing.replace(b"<rect", b"<style>:root{" + defined + b"} @media print{:root{--c0:red}}</style><rect", 1)


def with_picture(kind: str, label: str) -> bytes:
    """A drawing that shows only a picture."""
    inside = base64.b64encode(saved(kind, quarters(400, 300))).decode()
    label = label if label.endswith((";", "; ")) else label + ";"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="320" height="240">'
        f'<image width="320" height="240" href="data:{label}base64,{inside}"/></svg>'
    ).encode()


def svg(more: str = "", size: str = 'width="32" height="24"') -> bytes:
    rectangles = "".join(
        f'<rect x="{at % 2 * 16}" y="{at // 2 * 12}" width="16" height="12" fill="rgb{colour}"/>' for at, colour in enumerate(COLOURS)
    )  # fmt: skip
    return f'<?xml version="1.0"?><!-- a --><svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 32 24">{rectangles}{more}</svg>'.encode()


JPEG, PNG, WEBP, GIF = (saved(kind) for kind in ("JPEG", "PNG", "WEBP", "GIF"))
PROGRESSIVE = saved("JPEG", progressive=True, quality=95)
BIG = Path("/etc/hostname")
TABLE: list[tuple[str, str, Callable[[], bytes], Any]] = [
    # kind, oddity, file, what is to be seen (or the error's code and a word of its sentence)
    ("PNG", "zTXt bomb", lambda: png_with(chunk(b"zTXt", b"a\0\0" + ZEROS)), SHOWN),
    ("PNG", "iCCP bomb", lambda: png_with(chunk(b"iCCP", b"a\0\0" + ZEROS)), SHOWN),
    ("PNG", "iCCP of nonsense", lambda: png_with(chunk(b"iCCP", b"a\0\0nonsense")), SHOWN),
    ("PNG", "iTXt too short", lambda: png_with(chunk(b"iTXt", b"a")), SHOWN),
    ("PNG", "eXIf of nonsense", lambda: png_with(chunk(b"eXIf", b"II*\0\xff\xff\xff\xff")), SHOWN),
    ("PNG", "eXIf turns it", lambda: png_with(chunk(b"eXIf", exif(3)[6:]), data=saved("PNG", quarters().transpose(Pillow.Transpose.ROTATE_180))), SHOWN),
    ("PNG", "pHYs, sBIT, tIME, hIST wrong", lambda: png_with(*(chunk(k, b"\xff") for k in (b"pHYs", b"sBIT", b"tIME", b"hIST"))), SHOWN),
    ("PNG", "wrong checksums everywhere", lambda: png_with(chunk(b"tEXt", b"a\0b", crc=1), chunk(b"gAMA", b"\0\0\xb1\x8f", crc=1)), SHOWN),
    ("PNG", "length too large", lambda: png_with(chunk(b"tEXt", b"a\0b", length=70_000)), SHOWN),
    ("PNG", "length too small", lambda: png_with(chunk(b"tEXt", b"a\0" + b"b" * 50, length=9)), SHOWN),
    ("PNG", "gamma of zero", lambda: png_with(chunk(b"gAMA", bytes(4))), SHOWN),
    ("PNG", "tRNS of a wrong length", lambda: png_with(chunk(b"tRNS", b"\1\2\3")), SHOWN),
    ("PNG", "PLTE in RGB", lambda: png_with(chunk(b"PLTE", b"\1\2\3" * 9 + b"\1")), SHOWN),
    ("PNG", "wrong checksum of IDAT", lambda: PNG[:-16] + b"\0\0\0\0" + PNG[-12:], SHOWN),
    ("PNG", "wrong Adler-32", lambda: PNG.replace(PNG[-20:-16], b"\1\2\3\4"), SHOWN),
    ("PNG", "no IEND", lambda: PNG[:-12], SHOWN),
    ("PNG", "data behind its end", lambda: PNG + b"x" * 5000, SHOWN),
    ("PNG", "2 % missing", lambda: (lambda d: d[: len(d) * 98 // 100])(saved("PNG", compress_level=0)), SHOWN),
    ("PNG", "half of it missing", lambda: saved("PNG", compress_level=0)[:100_000], ("damaged_image", "damaged")),
    ("PNG", "interlaced", lambda: adam7(quarters()), SHOWN),
    ("PNG", "palette with transparency", lambda: saved("PNG", quarters().quantize(8), transparency=7), SHOWN),
    ("PNG", "16-bit grey with a shade far from all others", flat_shades, {"quarters": [(shade,) * 3 for shade in SHADES]}),
    ("PNG", "16-bit grey with little contrast", lambda: saved("PNG", Pillow.frombytes("I;16", (160, 120), struct.pack("<19200H", *map(int, ramp(160, 120, 100, 900))))), GRADIENT),
    ("PNG", "animation with a blank first frame", lambda: animation("PNG"), SHOWN),
    ("PNG", "profile with other primaries", lambda: with_odd_profile("PNG"), SHOWN),
    ("PNG", "gamma of 1", lambda: linear_png(chunk(b"gAMA", struct.pack(">I", 100_000))), SHOWN),
    ("PNG", "16 bits with a gamma of 1", linear_16_bit_png, SHOWN),
    ("PNG", "other primaries by cHRM", swapped_primaries, SHOWN),
    ("PNG", "cHRM of nonsense", lambda: png_with(chunk(b"gAMA", struct.pack(">I", 45_455)), chunk(b"cHRM", bytes(32))), SHOWN),
    ("PNG", "linear light by cICP", lambda: linear_png(chunk(b"cICP", b"\1\x08\0\1")), SHOWN),
    ("PNG", "linear light by a profile named sRGB", linear_by_profile, SHOWN),
    ("PNG", "dark logo", lambda: logo("black"), {"contrast_at_least": 60}),
    ("PNG", "grey logo", lambda: logo("#808080"), {"contrast_at_least": 60}),
    ("PNG", "tall strip", lambda: strip(30, 3000), {"shortest_side_at_least": 64, "aspect_at_most": 10}),
    ("PNG", "wide strip", lambda: strip(6000, 100), {"shortest_side_at_least": 64, "aspect_at_most": 10}),
    ("PNG", "a line", lambda: strip(3000, 2), {"shortest_side_at_least": 64, "aspect_at_most": 10}),
    ("JPEG", "EXIF of nonsense", lambda: jpeg_with(segment(0xE1, b"Exif\0\0II*\0\xff\xff\xff\x7f")), SHOWN),
    ("JPEG", "EXIF with endless directories", lambda: jpeg_with(segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\1\0" + bytes(12) + b"\x08\0\0\0")), SHOWN),
    ("JPEG", "EXIF turns it", lambda: saved("JPEG", quarters().transpose(Pillow.Transpose.ROTATE_90), exif=exif(6)), SHOWN),
    ("JPEG", "ICC of nonsense", lambda: jpeg_with(segment(0xE2, b"ICC_PROFILE\0\1\1" + b"x" * 500)), SHOWN),
    ("JPEG", "ICC with a missing part", lambda: jpeg_with(segment(0xE2, b"ICC_PROFILE\0\2\3" + b"x" * 500)), SHOWN),
    ("JPEG", "MPF of nonsense", lambda: jpeg_with(segment(0xE2, b"MPF\0II*\0\x08\0\0\0\xff\xff")), SHOWN),
    ("JPEG", "Photoshop of nonsense", lambda: jpeg_with(segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\xff\xff")), SHOWN),
    ("JPEG", "XMP of 64 kB, 30 times", lambda: jpeg_with(*[segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + b"x" * 65_000)] * 30), SHOWN),
    ("JPEG", "Adobe too short", lambda: jpeg_with(segment(0xEE, b"Adobe\0")), SHOWN),
    ("JPEG", "JFIF too short", lambda: jpeg_with(segment(0xE0, b"JFIF\0")), SHOWN),
    ("JPEG", "wrong length of a segment", lambda: jpeg_with(segment(0xE5, b"x" * 40, length=30)), SHOWN),
    ("JPEG", "a film behind it", lambda: JPEG + b"\0\0\0\x18ftypmp42" + bytes(5000), SHOWN),
    ("JPEG", "progressive", lambda: PROGRESSIVE, SHOWN),
    ("JPEG", "progressive, end missing", lambda: PROGRESSIVE[:-10], SHOWN),
    ("JPEG", "CMYK of Adobe", lambda: saved("JPEG", quarters().convert("CMYK"), quality=95), SHOWN),
    ("JPEG", "profile with other primaries", lambda: with_odd_profile("JPEG"), SHOWN),
    ("JPEG", "half of it missing", lambda: JPEG[: len(JPEG) // 2], ("damaged_image", "damaged")),
    ("TIFF", "infinity", lambda: tiff_of("f", [INF, *ramp(80, 60, -5, 900)[1:]], 80, 60, sample_format=3), GRADIENT),
    ("TIFF", "64-bit numbers", lambda: tiff_of("d", [NAN, *ramp(80, 60, -5, 900)[1:]], 80, 60, sample_format=3), GRADIENT),
    ("TIFF", "64-bit numbers, big-endian", lambda: tiff_of("d", ramp(80, 60, -5, 900), 80, 60, sample_format=3, order=">"), GRADIENT),
    ("TIFF", "GDAL's nodata", lambda: tiff_of("f", [-9999.0] * 4 + ramp(80, 60, 0, 90)[4:], 80, 60, sample_format=3, more=((42113, 2, 6, b"-9999\0"),)), GRADIENT),
    ("TIFF", "nodata that nobody names", lambda: tiff_of("f", [-3.4e38] * 4 + ramp(80, 60, 0, 90)[4:], 80, 60, sample_format=3), GRADIENT),
    ("TIFF", "signed 16 bits", lambda: tiff_of("h", list(map(int, ramp(80, 60, -500, 900))), 80, 60, sample_format=2), GRADIENT),
    ("TIFF", "12 bits in 16", lambda: tiff_of("H", list(map(int, ramp(80, 60, 0, 4095))), 80, 60), GRADIENT),
    ("TIFF", "32-bit integers", lambda: tiff_of("I", list(map(int, ramp(80, 60, 1e6, 4e6))), 80, 60), GRADIENT),
    ("TIFF", "16-bit RGB keeps its look", lambda: tiff_of("H", [v * 257 for p in quarters(80, 60).get_flattened_data() for v in p], 80, 60, bands=3), SHOWN),
    ("TIFF", "float RGB", lambda: tiff_of("f", [v / 255 for p in quarters(80, 60).get_flattened_data() for v in p], 80, 60, bands=3, sample_format=3), SHOWN),
    ("TIFF", "tags of nonsense", lambda: tiff_of("B", [v for p in quarters(80, 60).get_flattened_data() for v in p], 80, 60, bands=3, more=((282, 5, 1, b"\xff\xff\xff\x7f"), (305, 2, 2**31, b"\xff\xff\xff\x7f"), (34665, 4, 1, b"\xff\xff\xff\x7f"), (34675, 7, 900, b"\1\0\0\0"), (60000, 99, 5, b"abcd"))), SHOWN),
    ("TIFF", "LAB", lambda: saved("TIFF", ImageCms.profileToProfile(quarters(), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB")), SHOWN),
    ("TIFF", "CMYK", lambda: saved("TIFF", quarters().convert("CMYK"), compression="tiff_lzw"), SHOWN),
    ("TIFF", "the largest page", pages, SHOWN),
    ("TIFF", "JPEG inside", lambda: saved("TIFF", compression="jpeg", quality=95), SHOWN),
    ("WebP", "EXIF and XMP of nonsense", lambda: riff_with((b"EXIF", b"x" * 99), (b"XMP ", b"\xff" * 99), (b"JUNK", b"x")), SHOWN),
    ("WebP", "wrong RIFF length", lambda: WEBP[:4] + b"\xff\xff\xff\x7f" + WEBP[8:], SHOWN),
    ("WebP", "transparency", lambda: saved("WEBP", quarters().convert("RGBA"), lossless=True), SHOWN),
    ("WebP", "animation with a blank first frame", lambda: animation("WEBP"), SHOWN),
    ("GIF", "animation with a blank first frame", lambda: animation("GIF"), SHOWN),
    ("GIF", "no end", lambda: GIF[:-2], SHOWN),
    ("GIF", "transparency, smaller than its canvas", offset_gif, SHOWN),
    ("AVIF", "linear light by nclx", linear_avif, SHOWN),
    ("AVIF", "turned", lambda: saved("AVIF", quarters().transpose(Pillow.Transpose.ROTATE_90), exif=exif(6), quality=95), SHOWN),
    ("HEIC", "linear light by nclx", lambda: heic(linear(), color_primaries=1, transfer_characteristics=8), SHOWN),
    ("AVIF", "animation with a blank first frame", lambda: animation("AVIF"), SHOWN),
    ("HEIC", "primary is the third", lambda: heic(Pillow.new("RGB", (64, 64)), Pillow.new("RGB", (64, 64)), quarters(), primary_index=2), SHOWN),
    ("HEIC", "half of it missing", lambda: (lambda d: d[: len(d) // 2])(heic(quarters())), ("damaged_image", "damaged")),
    ("BMP", "2 % missing", lambda: bmp(0.98), SHOWN),
    ("BMP", "half of it missing", lambda: bmp(0.5), ("damaged_image", "damaged")),
    ("TIFF", "lossless rubbish in a strip", lambda: tiff_of("B", [7] * 4800, 80, 60, more=((259, 3, 1, b"\x08\0\0\0"),)), ("damaged_image", "damaged")),
    ("TIFF", "10 bits", lambda: tiff_of("B", [7] * 6000, 80, 60, more=((258, 3, 1, b"\x0a\0\0\0"),)), ("unsupported_format", "10 bits")),
    ("TIFF", "64-bit integers", lambda: tiff_of("Q", [7] * 4800, 80, 60), ("unsupported_format", "64 bits")),
    ("TIFF", "64-bit RGB", lambda: tiff_of("d", [v / 255 for p in quarters(80, 60).get_flattened_data() for v in p], 80, 60, bands=3, sample_format=3), SHOWN),
    ("TIFF", "32-bit integers keep their look", lambda: tiff_of("I", [v * 16843009 for p in quarters(80, 60).get_flattened_data() for v in p], 80, 60, bands=3), SHOWN),
    ("BMP", "32 bits", lambda: saved("BMP", quarters().convert("RGBA")), SHOWN),
    ("ICO", "PNG inside", icon, SHOWN),
    ("ICO", "bitmap inside", bmp_icon, SHOWN),
    ("JPEG 2000", "ordinary", lambda: saved("JPEG2000", quarters(1600, 1200)), {**SHOWN, "size": (512, 384)}),
    ("RAW", "preview", raw, SHOWN),
    ("PDF", "a page", lambda: saved("PDF"), SHOWN),
    ("PDF", "damaged", lambda: b"%PDF-1.7\nxyz", ("damaged_image", "damaged")),
    ("SVG", "variables of CSS", lambda: variables(svg()), SHOWN),
    ("SVG", "HTML with something else in its place", lambda: svg().replace(b"<rect", b"<switch>" + HTML + b"<g><rect", 1).replace(b"</svg>", b"</g></switch></svg>"), SHOWN),
    ("SVG", "HTML alone", lambda: re.sub(rb"<rect.*/>", HTML, svg()), ("unsupported_format", "foreignObject")),
    *(("SVG", f"{kind} in it as {label}", lambda kind=kind, label=label: with_picture(kind, label), SHOWN)
      for kind, label in [("WEBP", "image/webp;"), ("GIF", "image/gif;"), ("AVIF", "image/avif;"), ("BMP", "image/bmp;"),
                          ("WEBP", ""), ("PNG", "image/png;charset=utf-8;"), ("JPEG", ";"), ("GIF", "image/gif; ")]),
    ("SVG", "small", svg, {**SHOWN, "size": (512, 384)}),
    ("SVG", "asks for other files", lambda: svg(f'<image href="file://{Path(__file__).parent}/cases/scan-1-bit.png" width="32" height="24"/><script>alert(1)</script>'), SHOWN),
    ("SVG", "external entity", lambda: svg().replace(b"<!-- a -->", b'<!DOCTYPE svg [<!ENTITY x SYSTEM "file:///etc/passwd">]>'), SHOWN),
    ("SVG", "UTF-16", lambda: svg().replace(b'"1.0"', b'"1.0" encoding="UTF-16"').decode().encode("utf-16"), SHOWN),
    ("SVG", "behind a long comment", lambda: svg().replace(b"<!-- a -->", b"<!--" + b"x" * 9000 + b"-->"), SHOWN),
    ("SVG", "size of zero", lambda: svg(size='width="0" height="0"'), SHOWN),
    ("SVG", "no size", lambda: svg(size=""), SHOWN),
    ("SVG", "huge", lambda: svg(size='width="900000" height="675000"'), SHOWN),
    ("other", "Word", lambda: archive("word/document.xml"), ("unsupported_format", "Word")),
    ("other", "ZIP", lambda: archive("a.jpg"), ("unsupported_format", "ZIP")),
    ("other", "TAR", lambda: archive("tar"), ("unsupported_format", "TAR")),
    ("other", "GZip", lambda: gzip.compress(b"hello"), ("unsupported_format", "GZip")),
    ("other", "error page", lambda: b"\n<!DOCTYPE html><html><body>404</body></html>", ("unsupported_format", "web page")),
    ("other", "XML", lambda: b"<?xml version='1.0'?><Error><Code>NoSuchKey</Code></Error>", ("unsupported_format", "XML")),
    ("other", "JSON", lambda: b'{"error": "not found"}', ("unsupported_format", "JSON")),
    ("other", "text", lambda: b"hello, world\n" * 50, ("unsupported_format", "text")),
    ("other", "text that begins with BM", lambda: b"BMW is not a bitmap", ("unsupported_format", "text")),
    ("other", "many comments", lambda: b"<!---->" * 500 + b"<x/>", ("unsupported_format", "XML")),
    ("other", "Targa", lambda: saved("TGA"), ("unsupported_format", "Targa")),
    ("other", "Targa with RLE", lambda: saved("TGA", compression="tga_rle"), ("unsupported_format", "Targa")),
    ("other", "LFS pointer", lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", ("unsupported_format", "LFS")),
    ("other", "data URL", lambda: b"data:image/png;base64," + base64.b64encode(PNG), ("unsupported_format", "data URL")),
    ("other", "WebM", lambda: b"\x1aE\xdf\xa3" + bytes(50), ("unsupported_format", "video")),
    ("other", "AVI", lambda: b"RIFF\0\0\0\0AVI LIST", ("unsupported_format", "video (AVI)")),
    ("other", "MP3", lambda: b"ID3\4" + bytes(50), ("unsupported_format", "sound")),
    ("other", "font", lambda: b"wOF2" + bytes(50), ("unsupported_format", "font")),
    ("other", "EPS", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n", ("unsupported_format", "EPS")),
    ("other", "AppleDouble", lambda: b"\0\x05\x16\x07\0\2\0\0Mac OS X", ("unsupported_format", "AppleDouble")),
    ("other", "JPEG XL in a box", lambda: b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14ftypjxl ", ("unsupported_format", "JPEG XL")),
    ("other", "zeros", lambda: bytes(5000), ("not_an_image", "not an image")),
    ("other", "nothing", lambda: b"", ("empty_file", "empty")),
    ("TIFF", "one tile of 22,000²", lambda: tiff_of("B", [0], 22_000, 22_000, more=((322, 3, 1, struct.pack("<HH", 22_000, 0)), (323, 3, 1, struct.pack("<HH", 22_000, 0)), (324, 4, 1, struct.pack("<I", 200)), (325, 4, 1, struct.pack("<I", 1)), (259, 3, 1, b"\x08\0\0\0"))), ("image_too_large", "22000")),
    ("GIF", "a canvas of 65,000²", lambda: GIF[:6] + struct.pack("<HH", 65_000, 65_000) + GIF[10:], ("image_too_large", "65000")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "oddity", "build", "result"), TABLE, ids=[f"{kind}: {oddity}" for kind, oddity, *_ in TABLE]
)
def test_odd_file(tmp_path: Path, kind: str, oddity: str, build: Callable[[], bytes], result: Any) -> None:
    path = tmp_path / "misleading.name"
    path.write_bytes(build())
    if isinstance(result, dict):
        measured = measure(path, 512)
        assert measured.kind == kind
        assert measured.need < 300_000_000
        assert not judge(prepare(path, 512, measured.need).jpeg, result)
    else:
        with pytest.raises(TaggingError) as caught:
            prepare(path, 512, 300_000_000)
        assert (caught.value.kind, caught.value.code) == ("image", result[0])
        assert result[1] in caught.value.message


def test_there_are_many() -> None:
    assert len({(kind, oddity) for kind, oddity, *_ in TABLE}) == len(TABLE) > 60
