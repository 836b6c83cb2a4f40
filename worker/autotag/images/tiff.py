"""TIFF files, and camera RAW files, which have the same structure. libvips decodes TIFFs by strips or tiles."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import partial

from PIL import TiffImagePlugin

from autotag.errors import TaggingError
from autotag.images import vips
from autotag.images.exif import Directory, directories, directory
from autotag.images.finish import MAX_ICC
from autotag.images.frames import open_frames
from autotag.images.jpeg import open_jpeg
from autotag.images.levels import scale_numbers
from autotag.images.opened import FIXED_NEED, Decoded, Opened, damaged, share, unsupported
from autotag.images.sent import ImageNotes

SUBFILE, WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC = 254, 256, 257, 258, 259, 262
SAMPLES, STRIP_ROWS, PLANES, TILE_WIDTH, TILE_HEIGHT = 277, 278, 284, 322, 323
OFFSETS, LENGTHS = (273, 324), (279, 325)  # of strips and tiles
PREDICTOR, EXTRA, FORMAT = 317, 338, 339
CHILDREN, ICC, NODATA, DNG = 330, 34675, 42113, 50706
#: The tags that decoding needs. All others are dropped, so that wrong values in them do no harm.
NEEDED = frozenset({
    254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 280, 281, 284, 290, 291, 292, 293, 317, 318, 319, 320,
    322, 323, 324, 325, 326, 328, 332, 333, 334, 338, 339, 347, 512, 513, 514, 515, 517, 518, 519, 520, 521, 529, 530,
    531, 532, 50674,
})  # fmt: skip
REDUCED, MASK = 1, 4  # bits of SUBFILE: a thumbnail, a mask
RAW_PHOTOMETRICS = {32803, 34892}  # a sensor's raw colour-filter data, and the linear picture made from it
RAW_COMPRESSIONS = {32767, 34713, 65000, 65535}  # Sony, Nikon, Kodak, Pentax
PALETTE, CMYK, YCBCR, LAB = 3, 5, 6, 8
FLOAT = 3  # of FORMAT
ALPHAS = {1, 2}  # values of EXTRA for transparency; with other values, a band is not transparency
#: Compressions that libvips decodes, and further ones that Pillow decodes.
BY_VIPS = {1, 2, 3, 4, 5, 6, 7, 8, 32771, 32773, 32809, 32946, 34676, 34677, 50001}
BY_PILLOW = {34925, 50000}  # LZMA, Zstandard
PACKINGS = {
    22610: "JPEG XR", 33003: "JPEG 2000", 33004: "JPEG 2000", 33005: "JPEG 2000", 34712: "JPEG 2000", 34887: "LERC",
    34661: "JBIG", 34892: "lossy DNG", 34933: "PNG", 34934: "JPEG XR", 50002: "JPEG XL", 52546: "JPEG XL",
}  # fmt: skip


def open_tiff(data: bytes, side: int) -> Opened:
    """Reads the directories of a TIFF, or of a camera's RAW file.

    Raises:
        TaggingError: it is damaged.
    """
    pages = list(directories(data))
    if not pages:
        raise damaged()
    if data[8:10] == b"CR" or any(map(_is_raw, _all(pages))):
        return open_raw(data, side)
    number, page = _best(pages)
    width, height = page.number(WIDTH), page.number(HEIGHT)
    _check(page)
    if _is_pillows(page):
        opened = open_frames("TIFF", _cleaned(data, page), side, TiffImagePlugin.TiffImageFile)
        need = opened.need + width * height * 12
        return Opened("TIFF", width, height, need, opened.decode, page.orientation)
    icc = page.block(ICC, MAX_ICC) or None
    return Opened(
        "TIFF", width, height, FIXED_NEED + 3 * len(data) + _memory(page),
        partial(_decode, data, page, number, len(pages), icc), page.orientation,
    )  # fmt: skip


def _is_pillows(page: Directory) -> bool:
    """Whether Pillow must decode it, because libvips cannot, or not in the right colours."""
    packing, colours, bits = (page.number(tag, 1) for tag in (COMPRESSION, PHOTOMETRIC, BITS))
    return (
        packing in BY_PILLOW
        or (colours == LAB and bits == 8)
        or (colours == YCBCR and packing not in (6, 7, 50001))
        or bits == 12
    )


def _check(page: Directory) -> None:
    """Refuses a page that no decoder here can read, with the reason, so that an intact file is not called damaged.

    Raises:
        TaggingError: ``unsupported_format``.
    """
    packing, bits, samples = page.number(COMPRESSION, 1), page.number(BITS, 1), page.number(SAMPLES, 1)
    if packing not in BY_VIPS | BY_PILLOW:
        raise unsupported(f"a TIFF with {PACKINGS.get(packing, f'number {packing}')} compression")
    if (
        bits not in (1, 2, 4, 8, 12, 16, 32, 64)
        or (bits in (2, 4, 12) and samples > 1)
        or (bits == 64 and not _is_double(page))
    ):
        raise unsupported(f"a TIFF with an unusual kind of numbers ({bits} bits per colour)")
    if packing in BY_PILLOW and bits not in (1, 8, 16):
        raise unsupported(f"a TIFF with Zstandard or LZMA compression of {bits} bits per colour")


def open_raw(data: bytes, side: int) -> Opened:
    """Opens the preview that a camera put into its RAW file: the largest JPEG in it.

    Raises:
        TaggingError: ``unsupported_format``: it has none.
    """
    best = None
    for preview in _previews(data):
        try:
            opened = open_jpeg(preview, side)
        except TaggingError:
            continue
        if best is None or opened.width * opened.height > best.width * best.height:
            best = opened
    if best is None:
        raise unsupported("a camera's RAW file without a preview")
    turn = best.orientation if best.orientation > 1 else next((d.orientation for d in directories(data)), 1)
    held = best.held and best.held + len(data)
    return Opened("RAW", best.width, best.height, best.need + len(data), best.decode, turn, held=held)


def _previews(data: bytes) -> Iterator[bytes]:
    """Every JPEG in a file. Each extends to the end of the file, because bytes after a JPEG do no harm."""
    at, found = -1, 0
    while (at := data.find(b"\xff\xd8\xff", at + 1)) >= 0 and found < 20:
        if data[at + 3] in (0xDB, 0xC4, 0xE0, 0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xDD, 0xC0):
            found += 1
            yield data[at:]


def _all(pages: list[Directory]) -> Iterator[Directory]:
    """The directories and those that they contain."""
    for page in pages:
        yield page
        for at in page.numbers(CHILDREN)[:20]:
            child = directory(page.data, int(at), page.big, page.order)
            if child:
                yield child


def _is_raw(page: Directory) -> bool:
    return (
        page.number(PHOTOMETRIC, 1) in RAW_PHOTOMETRICS or page.number(COMPRESSION) in RAW_COMPRESSIONS
        or DNG in page.entries
    )  # fmt: skip


def _best(pages: list[Directory]) -> tuple[int, Directory]:
    """The page to show and its number: the largest one that is not a mask or a thumbnail; the first if several are
    equal."""
    shown = [(n, page) for n, page in enumerate(pages) if page.number(WIDTH) > 0 and page.number(HEIGHT) > 0]
    if not shown:
        raise damaged()
    whole = [(n, page) for n, page in shown if not page.number(SUBFILE) & (REDUCED | MASK)]
    return max(whole or shown, key=lambda found: (found[1].number(WIDTH) * found[1].number(HEIGHT), -found[0]))


def _memory(page: Directory) -> int:
    """Bytes that decoding a page needs: its tiles or strips, and the rows that libvips holds."""
    width, height = page.number(WIDTH), page.number(HEIGHT)
    bits = sum(int(value) for value in page.numbers(BITS)) or 1
    pixel = max(1, bits // 8, page.number(SAMPLES, 1) if bits >= 8 else 1)
    tile_width, tile_height = page.number(TILE_WIDTH), page.number(TILE_HEIGHT)
    if tile_width and tile_height:
        row_of_tiles = (width + 2 * tile_width) * tile_height * pixel
        return 3 * tile_width * tile_height * pixel + 3 * row_of_tiles + _rows(width, height, pixel)
    strip = min(page.number(STRIP_ROWS, height) or height, height)
    planes = page.number(SAMPLES, 1) if page.number(PLANES, 1) == 2 else 1
    whole = planes * 3 * width * strip * pixel if page.number(COMPRESSION, 1) != 1 or planes > 1 else 0
    return whole + _rows(width, height, pixel)


def _rows(width: int, height: int, pixel: int) -> int:
    return int(1.3 * width * max(pixel, 8) * min(height, 700))


def _cleaned(data: bytes, page: Directory) -> bytes:
    """The file with a single directory at its end, which has only the needed tags."""
    raw = {tag: page.raw[tag] for tag in sorted(page.raw) if tag in NEEDED}
    if _is_double(page):  # libvips cannot read 64-bit numbers, so each becomes two 32-bit numbers
        form = page.order + ("HHQH6x" if page.big else "HHIH2x")
        halves = ((BITS, 32), (SAMPLES, 2 * page.number(SAMPLES, 1)), (FORMAT, 1))
        raw |= {tag: struct.pack(form, tag, 3, 1, value) for tag, value in halves}
    entries = list(dict(sorted(raw.items())).values())
    code = "Q" if page.big else "H"
    end = struct.pack(page.order + ("Q" if page.big else "I"), 0)
    at = len(data) + len(data) % 2
    head = bytearray(data[:16])
    struct.pack_into(page.order + ("Q" if page.big else "I"), head, 8 if page.big else 4, at)
    count = struct.pack(page.order + code, len(entries))
    return b"".join((head, memoryview(data)[16:], b"\0" * (at - len(data)), count, *entries, end))


def _is_double(page: Directory) -> bool:
    one_plane = page.number(PLANES, 1) == 1 or page.number(SAMPLES, 1) == 1
    floats = set(page.numbers(BITS)) == {64} and page.number(FORMAT, 1) == FLOAT
    return floats and one_plane and page.number(PREDICTOR, 1) == 1


def _loaded(clean: bytes, page: Directory, fail_on: str) -> vips.Image:
    """Opens the page, with the bands that are shown."""
    image = vips.load("tiff", clean, fail_on=fail_on)
    shown = _bands(page)
    if _is_double(page):
        bands = [_doubles(image, page, band) for band in range(min(shown, page.number(SAMPLES, 1)))]
        return bands[0] if len(bands) == 1 else vips.call("bandjoin", **{"in": bands})("copy", interpretation="srgb")
    return image("extract_band", band=0, n=shown) if image.bands > shown else image


def _bands(page: Directory) -> int:
    """The number of bands that are shown: the colours, and transparency if the file says that a band is transparency.
    (A satellite's near infrared or a microscope's second colour is not.)
    """
    samples, photometric = page.number(SAMPLES, 1), page.number(PHOTOMETRIC, 1)
    if photometric == PALETTE:
        return 4  # of what it stands for
    colours = 4 if photometric == CMYK else 1 if photometric in (0, 1) and samples < 3 else 3
    extra = page.number(EXTRA)
    return colours + (samples > colours and extra in ALPHAS)


def _doubles(image: vips.Image, page: Directory, band: int) -> vips.Image:
    # The upper half has the sign, 11 bits of exponent and 20 bits of the fraction, which is enough to see.
    upper = image("extract_band", band=2 * band + (page.order == "<"))
    fraction = upper("boolean_const", boolean="and", c=[0xFFFFF])("linear", a=[2.0**-20], b=[1.0])
    exponent = upper("boolean_const", boolean="rshift", c=[20])("boolean_const", boolean="and", c=[0x7FF])
    power = exponent("linear", a=[1.0], b=[-1023.0])("math2_const", math2="wop", c=[2.0])
    sign = upper("boolean_const", boolean="rshift", c=[31])("linear", a=[-2.0], b=[1.0])
    size = vips.call("multiply", left=fraction, right=power)
    return vips.call("multiply", left=size, right=sign)("cast", format="float")("copy", interpretation="b-w")


def _decode(
    data: bytes, page: Directory, number: int, pages: int, icc: bytes | None, width: int, height: int
) -> Decoded:
    clean = _cleaned(data, page)
    notes: ImageNotes = {}
    if pages > 1 and (number or _equal(page)):
        notes = {"page": number + 1, "pages": pages}
    rows = _rows_there(data, page)
    if rows < page.number(HEIGHT):
        notes |= share(rows, page.number(HEIGHT))
    text = page.block(NODATA).split(b"\0")[0].strip()
    try:
        nodata = float(text) if text else None
    except ValueError:
        nodata = None
    try:
        image = scale_numbers(lambda: _loaded(clean, page, "error"), width, height, nodata)
    except vips.VipsError:
        image = scale_numbers(lambda: _loaded(clean, page, "none"), width, height, nodata)
        if all(low == high for low, high in (band.getextrema() for band in image.split())):
            raise damaged() from None  # the decoder produced only a blank picture
    if "truncated" in notes:
        image = image.crop((0, 0, image.width, max(1, int(image.height * notes["truncated"]))))
    return Decoded(image, icc, notes)


def _equal(page: Directory) -> bool:
    """Whether the next page has the same size. Then the file is a document with several pages, not a picture with
    thumbnails."""
    following = directory(
        page.data, int.from_bytes(page.next, "little" if page.order == "<" else "big"), page.big, page.order
    )
    return following is not None and following.number(WIDTH) == page.number(WIDTH)


def _rows_there(data: bytes, page: Directory) -> int:
    """The rows whose strips or tiles lie inside the file."""
    height = page.number(HEIGHT)
    tiled = TILE_WIDTH in page.entries
    offsets, lengths = page.numbers(OFFSETS[tiled]), page.numbers(LENGTHS[tiled])
    if not offsets or len(offsets) != len(lengths):
        return height
    there = sum(1 for at, length in zip(offsets, lengths, strict=True) if at + length <= len(data))
    if len(offsets) > 1:
        return height * there // len(offsets)
    return height if there else int(height * max(0, len(data) - offsets[0]) / max(1, lengths[0]))
