"""PNG files. libvips decodes them by strips. It gets only the chunks that make up the picture."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

from PIL import PngImagePlugin

from autotag.images import exif, vips
from autotag.images.colours import D65, SRGB, by_numbers, by_points
from autotag.images.finish import MAX_ICC
from autotag.images.frames import open_frames
from autotag.images.levels import scale_numbers
from autotag.images.opened import FIXED_NEED, Decoded, Opened, damaged, share, unsupported
from autotag.images.sent import ImageNotes

SIGNATURE = b"\x89PNG\r\n\x1a\n"
SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
DEPTHS = {0: (1, 2, 4, 8, 16), 2: (8, 16), 3: (1, 2, 4, 8), 4: (8, 16), 6: (8, 16)}
CHUNKS = (b"IDAT", b"IEND", b"PLTE", b"tRNS", b"fdAT", b"fcTL")
#: Adam7: the first column and row, and the steps, of each pass.
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
BLOCK = 1 << 20  # bytes


@dataclass
class Chunks:
    """The chunks that are used."""

    header: bytes = b""
    palette: bytes = b""
    transparency: bytes = b""
    pixels: list[memoryview] = field(default_factory=list)
    animation: list[tuple[bytes, memoryview]] = field(default_factory=list)
    icc: bytes | None = None
    numbers: tuple[int, int] | None = None
    srgb: bool = False
    gamma: float | None = None
    points: list[tuple[float, float]] = field(default_factory=list)
    orientation: int = 1

    @property
    def width(self) -> int:
        return int.from_bytes(self.header[:4])

    @property
    def height(self) -> int:
        return int.from_bytes(self.header[4:8])

    @property
    def depth(self) -> int:
        return self.header[8]

    @property
    def colour(self) -> int:
        return self.header[9]

    @property
    def interlaced(self) -> bool:
        return bool(self.header[12])

    @property
    def profile(self) -> bytes | None:
        """Its colour profile, from the first of these sources that the file has (PNG 3, 4.3)."""
        if self.numbers:
            return by_numbers(*self.numbers)
        if self.icc or self.srgb or not self.gamma:
            return self.icc
        white, *corners = self.points or (D65, *SRGB)
        return by_points(white, corners, 1 / self.gamma)

    def row_bytes(self, width: int) -> int:
        """Bytes of a row, including the byte for its filter."""
        return 1 + (width * self.depth * SAMPLES[self.colour] + 7) // 8

    def rows(self) -> list[tuple[int, int]]:
        """Bytes of a row and number of rows, of each pass."""
        if not self.interlaced:
            return [(self.row_bytes(self.width), self.height)]
        sizes = ((-(-(self.width - x) // step_x), -(-(self.height - y) // step_y)) for x, y, step_x, step_y in PASSES)
        return [(self.row_bytes(width), height) for width, height in sizes if width > 0 and height > 0]


def open_png(data: bytes, side: int) -> Opened:
    """Reads the chunks of a PNG.

    Raises:
        TaggingError: it is damaged.
    """
    chunks = read_chunks(data)
    if chunks.animation:
        clean = _written(chunks, chunks.pixels, animation=True)
        opened = open_frames("PNG", clean, side, PngImagePlugin.PngImageFile, chunks.profile)
        return Opened("PNG", chunks.width, chunks.height, opened.need + len(data), opened.decode, chunks.orientation)
    # Interlaced pictures are decoded as a whole. Of others, libvips holds a few hundred rows in several stages.
    row = chunks.width * SAMPLES[chunks.colour] * (2 if chunks.depth == 16 else 1)
    row = max(row, chunks.width * 4)
    area = row * (chunks.height if chunks.interlaced else min(chunks.height, 900))
    need = FIXED_NEED + 3 * len(data) + int(1.5 * area)
    advice = "Save it as a PNG that is not interlaced" if chunks.interlaced else Opened.advice
    decode = partial(_decode, chunks)
    return Opened("PNG", chunks.width, chunks.height, need, decode, chunks.orientation, advice=advice)


def read_chunks(data: bytes) -> Chunks:
    """Finds the chunks that make up the picture. Checksums and all other chunks are ignored."""
    found = Chunks()
    for kind, body in _walk(data):
        if kind == b"IHDR" and not found.header:
            found.header = bytes(body[:13])
        elif kind == b"PLTE" and not found.palette:
            found.palette = bytes(body[: min(len(body), 768) // 3 * 3])
        elif kind == b"tRNS":
            found.transparency = bytes(body[:256])
        elif kind == b"IDAT":
            found.pixels.append(body)
            if found.animation:
                found.animation.append((kind, body))
        elif kind in (b"acTL", b"fcTL", b"fdAT"):
            found.animation.append((kind, body))
        elif kind == b"CgBI":
            raise unsupported("a PNG for iOS apps only (CgBI)")
        else:
            _describe(found, kind, body)
    _check(found)
    return found


def _walk(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    view, at = memoryview(data), len(SIGNATURE)
    while at + 8 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4]), data[at + 4 : at + 8]
        end = at + 8 + length
        following = data[end + 8 : end + 12]
        if kind not in CHUNKS and kind != b"IHDR" and not following.isalpha():  # a wrong length
            end = _next_chunk(data, at + 8) - 4
        yield kind, view[at + 8 : end]
        if kind == b"IEND":
            return
        at = end + 4


def _next_chunk(data: bytes, at: int) -> int:
    """Where the next known chunk begins."""
    found = [position - 4 for kind in CHUNKS if (position := data.find(kind, at + 4)) >= 0]
    return min(found, default=len(data) + 4)


def _describe(found: Chunks, kind: bytes, body: memoryview) -> None:
    """Reads the metadata that is used, if it is valid: colour profile, gamma and orientation."""
    if kind == b"iCCP" and found.icc is None:
        name, _, packed = bytes(body[:MAX_ICC]).partition(b"\0")
        if len(name) < 80:
            try:
                found.icc = zlib.decompressobj().decompress(packed[1:], MAX_ICC)
            except zlib.error:
                found.icc = None
    elif kind == b"sRGB":
        found.srgb = True
    elif kind == b"cICP" and len(body) == 4 and body[2] == 0:
        found.numbers = (body[0], body[1])
    elif kind == b"gAMA" and len(body) == 4 and found.gamma is None:
        found.gamma = int.from_bytes(body) / 100_000
    elif kind == b"cHRM" and len(body) == 32 and not found.points:
        found.points = [(x / 100_000, y / 100_000) for x, y in struct.iter_unpack(">II", body)]
    elif kind == b"eXIf" and found.orientation == 1:
        found.orientation = exif.orientation(bytes(body[:100_000]))


def _check(found: Chunks) -> None:
    if len(found.header) < 13 or not found.pixels:
        raise damaged()
    if found.depth not in DEPTHS.get(found.colour, ()) or found.header[12] > 1:
        raise damaged()
    if found.colour == 3 and not found.palette:
        raise damaged()
    if found.colour != 3:
        found.palette = b""
    wanted = {0: 2, 2: 6, 3: len(found.transparency)}.get(found.colour)
    if len(found.transparency) != wanted:
        found.transparency = b""
    if found.colour == 3:
        found.transparency = found.transparency[: len(found.palette) // 3]


def _written(
    chunks: Chunks, pixels: list[memoryview] | list[bytes], height: int = 0, *, animation: bool = False
) -> bytes:
    """A PNG with only these chunks."""
    header = chunks.header[:4] + (height or chunks.height).to_bytes(4) + chunks.header[8:]
    out = io.BytesIO()
    out.write(SIGNATURE)

    def write(kind: bytes, *parts: bytes | memoryview) -> None:
        check = zlib.crc32(kind)
        out.write(struct.pack(">I4s", sum(map(len, parts)), kind))
        for part in parts:
            out.write(part)
            check = zlib.crc32(part, check)
        out.write(struct.pack(">I", check))

    write(b"IHDR", header[:10] + b"\0\0" + header[12:])
    if chunks.palette:
        write(b"PLTE", chunks.palette)
    if chunks.transparency:
        write(b"tRNS", chunks.transparency)
    if animation:
        if not any(kind == b"IDAT" for kind, _ in chunks.animation):
            write(b"IDAT", *pixels)
        for kind, body in chunks.animation:
            write(kind, body)
    else:
        write(b"IDAT", *pixels)
    write(b"IEND")
    return out.getvalue()


def _decode(chunks: Chunks, width: int, height: int) -> Decoded:
    data = _written(chunks, chunks.pixels)
    notes: ImageNotes = {}
    try:
        image = scale_numbers(lambda: vips.load("png", data, fail_on="error", unlimited=True), width, height)
    except vips.VipsError:
        data, rows = _repaired(chunks)
        if rows < chunks.height:
            notes = share(rows, chunks.height)
        image = scale_numbers(lambda: vips.load("png", data, fail_on="none", unlimited=True), width, height)
    return Decoded(image, chunks.profile, notes)


def _repaired(chunks: Chunks) -> tuple[bytes, int]:
    """A new PNG of the rows that can be read, and their number. Missing data of an interlaced PNG is filled in
    instead."""
    rows = chunks.rows()
    total = sum(size * count for size, count in rows)
    packer = zlib.compressobj(1)
    packed, length = [], 0
    for part in _inflated(chunks.pixels, total):
        packed.append(packer.compress(part))
        length += len(part)
    present = chunks.height * length // total
    if chunks.interlaced:
        height, missing = chunks.height, total - length
    else:
        height = min(present, chunks.height) or 1
        missing = max(0, rows[0][0] * height - length)
    for at in range(0, missing, BLOCK):
        packed.append(packer.compress(bytes(min(BLOCK, missing - at))))
    packed.append(packer.flush())
    return _written(chunks, packed, height), present


def _inflated(pixels: list[memoryview], most: int) -> Iterator[bytes]:
    """The filtered rows, until the data ends or becomes invalid. Window sizes and checksums are not checked."""
    inflater = zlib.decompressobj(-15)
    left, skipped = most, 2  # zlib's header
    for body in pixels:
        skip = min(skipped, len(body))
        skipped -= skip
        rest: bytes | memoryview = body[skip:]
        while len(rest) and left and not inflater.eof:
            try:
                part = inflater.decompress(rest, min(BLOCK, left))
            except zlib.error:
                return
            rest = inflater.unconsumed_tail
            left -= len(part)
            if part:
                yield part
