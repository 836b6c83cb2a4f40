"""JPEG files. The decoder scales them down while it decodes, so large ones need little memory."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field

from PIL import Image as Pillow
from PIL import ImageChops, ImageFile, JpegImagePlugin

from autotag.errors import image_error
from autotag.images import exif, vips
from autotag.images.finish import MAX_ICC
from autotag.images.opened import ENOUGH_ROWS, FIXED_NEED, Decoded, Opened, damaged, share, unsupported
from autotag.images.sent import ImageNotes
from autotag.images.shape import fit

#: Max scans of a progressive JPEG. Encoders write about ten. A scan can have only a hundred bytes, but decoding it
#: visits every pixel.
MAX_SCANS = 100
#: The decoder scales to at least this multiple of the wanted size. `finish` does the rest, so that text stays sharp.
DRAFT = 1.5
END = b"\xff\xd9"
#: A colour that no decoder produces: rows that still have it were not decoded.
UNTOUCHED = (3, 254, 129, 77)
_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
_HEADER = re.compile(rb"\xff[\xc0-\xcf\xda\xdb\xdd]")
FRAMES = {0xC0, 0xC1, 0xC2, 0xC9, 0xCA}  # Huffman or arithmetic, sequential or progressive
LOSSLESS = {0xC3, 0xC5, 0xC6, 0xC7, 0xCB, 0xCD, 0xCE, 0xCF}  # also hierarchical


@dataclass
class Header:
    """A JPEG's headers.

    Attributes:
        kept: the segments that decoding needs.
        samples: horizontal and vertical sampling of each component.
        start: where the first scan begins.
    """

    width: int = 0
    height: int = 0
    frame: int = 0
    kept: list[bytes] = field(default_factory=list)
    samples: list[tuple[int, int]] = field(default_factory=list)
    adobe: bool = False
    orientation: int = 1
    icc: dict[int, bytes] = field(default_factory=dict)
    icc_parts: int = 0
    start: int = 0
    scans: int = 1
    coefficients: bool = False  # the decoder keeps them all, because there is more than one scan

    @property
    def profile(self) -> bytes | None:
        """The colour profile, if all its parts are there."""
        if not self.icc or any(part not in self.icc for part in range(1, self.icc_parts + 1)):
            return None
        return b"".join(self.icc[part] for part in sorted(self.icc))

    @property
    def unit(self) -> int:
        """Rows that are decoded together."""
        return 8 * max((down for _, down in self.samples), default=1)

    @property
    def memory(self) -> int:
        """Bytes of the coefficients."""
        across = max(a for a, _ in self.samples)
        down = max(d for _, d in self.samples)
        blocks = sum(a * d for a, d in self.samples) / (across * down)
        area = (self.width + 8 * across) * (self.height + 8 * down)
        return int(area * blocks * 2) if self.coefficients else 0


def open_jpeg(data: bytes, side: int) -> Opened:
    """Reads the headers of a JPEG.

    Raises:
        TaggingError: it is damaged, or of a kind that cannot be decoded.
    """
    header = read_header(data)
    turned = header.orientation >= 5
    size = (header.height, header.width) if turned else (header.width, header.height)
    shape = fit(*size, side)
    width, height = (shape.height, shape.width) if turned else (shape.width, shape.height)
    scale = _draft_scale(header, width, height)
    pixels = (header.width // scale + 1) * (header.height // scale + 1) * 4
    # The file and its copy, the coefficients, the scaled picture before and after conversions, and rows of full width.
    need = FIXED_NEED + 2 * len(data) + header.memory + 2 * pixels + header.width * 4 * 64
    return Opened(
        "JPEG", header.width, header.height, need, lambda w, h: _decode(data, header, w, h), header.orientation,
        held=need - pixels,
        advice="Save it as a JPEG that is not progressive" if header.coefficients else Opened.advice,
    )  # fmt: skip


def _draft_scale(header: Header, width: int, height: int) -> int:
    fits = min(header.width / (width * DRAFT), header.height / (height * DRAFT))
    return next((scale for scale in (8, 4, 2) if fits >= scale), 1)


def read_header(data: bytes) -> Header:
    """Reads the segments up to the first scan. Segments that only describe the picture (metadata) are dropped."""
    found = Header()
    at = 2
    while True:
        at = data.find(b"\xff", at)
        if at < 0 or at + 4 > len(data):
            raise damaged()
        marker = data[at + 1]
        if marker in (0xFF, 0x00, 0x01, 0xD8) or 0xD0 <= marker <= 0xD7:
            at += 1
            continue
        if marker == 0xD9:
            raise damaged()
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4])
        if marker >= 0xE0 and data[end : end + 1] != b"\xff":  # a wrong length: continue at the next segment
            known = _HEADER.search(data, at + 2)
            end = known.start() if known else len(data)
        if marker == 0xDA:
            found.start = at
            break
        _segment(found, marker, data[at + 4 : end], data[at:end])
        at = end
    if not found.samples or not found.width:
        raise damaged()
    _count_scans(found, data)
    if not found.height:
        _read_late_height(found, data)
    return found


def _segment(found: Header, marker: int, body: bytes, whole: bytes) -> None:
    if marker in FRAMES and len(body) >= 6:
        precision, found.height, found.width = body[0], int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
        if precision != 8:
            raise unsupported(f"a JPEG of {precision} bits per colour")
        parts = [body[at : at + 3] for at in range(6, 6 + 3 * body[5], 3)]
        found.samples = [(part[1] >> 4, part[1] & 15) for part in parts if len(part) == 3]
        if not all(1 <= value <= 4 for pair in found.samples for value in pair):
            raise damaged()
        found.frame = marker
        found.kept.append(whole)
    elif marker == 0xF7:
        raise unsupported("a JPEG-LS image")
    elif marker in LOSSLESS:
        raise unsupported("a lossless JPEG")
    elif marker in (0xDB, 0xC4, 0xDD, 0xCC):
        found.kept.append(whole)
    elif marker == 0xEE and body[:5] == b"Adobe" and len(body) >= 12:
        found.adobe = True
        found.kept.append(whole)
    elif marker == 0xE0 and body[:5] == b"JFIF\0" and len(body) >= 14:
        found.kept.insert(0, b"\xff\xe0\x00\x10JFIF\0\1\1\0\0\1\0\1\0\0")
    elif marker == 0xE1 and body[:6] == b"Exif\0\0" and found.orientation == 1:
        found.orientation = exif.orientation(body)
    elif marker == 0xE2 and body[:12] == b"ICC_PROFILE\0" and sum(map(len, found.icc.values())) < MAX_ICC:
        found.icc[body[12]], found.icc_parts = body[14:], body[13]


def _count_scans(found: Header, data: bytes) -> None:
    """Counts the scans of a file that may have more than one.

    Raises:
        TaggingError: too many: decoding could take minutes.
    """
    if found.frame not in (0xC2, 0xCA):
        found.coefficients = data[found.start + 4] < len(found.samples)
        return
    found.coefficients = True
    found.scans, at = 0, found.start
    while match := _MARKER.search(data, at):
        if match[1] == b"\xd9":
            break
        found.scans += match[1] == b"\xda"
        at = match.end() + int.from_bytes(data[match.end() : match.end() + 2])
        if found.scans > MAX_SCANS:
            raise image_error(
                "unsupported_format", f"The JPEG has more than {MAX_SCANS} scans; save it again with another program."
            )


def _read_late_height(found: Header, data: bytes) -> None:
    """Reads the height from behind the first scan (DNL), where some encoders write it, but no decoder looks for it."""
    at = data.find(b"\xff\xdc\x00\x04", found.start)
    if at < 0:
        raise damaged()
    late = data[at + 4 : at + 6]
    found.height = int.from_bytes(late)
    found.kept = [s[:5] + late + s[7:] if s[1] == found.frame else s for s in found.kept]


def _decode(data: bytes, header: Header, width: int, height: int) -> Decoded:
    whole = data.rfind(END, header.start) >= 0
    view = memoryview(data)[header.start : None if whole else _last_segment(data, header)]
    clean = b"".join((b"\xff\xd8", *header.kept, view, b"" if whole else END))
    draft = (int(width * DRAFT), int(height * DRAFT))
    notes: ImageNotes = {}
    rows = header.height
    if not whole:
        rows = _rows(header, clean)
        if rows < header.height:
            notes = share(rows, header.height)
        elif _is_short(clean):
            notes = share(max(header.height - header.unit, int(header.height * ENOUGH_ROWS) + 1), header.height)
    image = _opened(clean, header)
    image.draft(None if image.mode in ("L", "CMYK") else "RGB", draft)
    image.load()
    picture: Pillow.Image = image
    if rows < header.height:
        picture = image.crop((0, 0, image.width, max(1, image.height * rows // header.height)))
    return Decoded(picture, header.profile, notes)


def _last_segment(data: bytes, header: Header) -> int:
    """The start of a segment between two scans that the end of the file cuts off; the end of the file if there is
    none."""
    at = header.start
    while header.coefficients and (match := _MARKER.search(data, at)):
        at = match.end() + max(2, int.from_bytes(data[match.end() : match.end() + 2]))
        if at > len(data) or match.end() + 2 > len(data):
            return match.start()
    return len(data)


def _opened(clean: bytes, header: Header) -> ImageFile.ImageFile:
    try:
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(clean))
    except Exception:  # noqa: BLE001 (its parser raises many kinds)
        raise damaged() from None
    if image.size != (header.width, header.height):
        raise damaged()
    return image


def _rows(header: Header, clean: bytes) -> int:
    """The number of rows in a truncated file.

    The decoder stops in the middle of a unit of rows, and may hold back the unit before it. So the file counts as
    complete if only these rows are missing. A progressive file has all its rows once the first scan of every colour is
    complete.
    """
    if header.coefficients:
        last = clean.rfind(b"\xff\xda", 0, -2)
        return header.height if clean.count(b"\xff\xda") > len(header.samples) and last >= 0 else 0
    image = _opened(clean[:-2], header)
    image.draft(None if image.mode in ("L", "CMYK") else "RGB", (image.width // 8 or 1, image.height // 8 or 1))
    decoded = rows_decoded(image)
    present = decoded * header.height // max(1, image.height)
    return header.height if present + 2 * header.unit >= header.height else present


def _is_short(clean: bytes) -> bool:
    """Whether a part of the last rows is missing, not just the end marker."""
    try:
        vips.load("jpeg", clean, fail_on="warning").pixels()
    except vips.VipsError:
        return True
    return False


def rows_decoded(image: ImageFile.ImageFile, *, upwards: bool = False) -> int:
    """Decodes the existing part of a file and returns the number of its rows; the rest has the colour `UNTOUCHED`.
    upwards: the file stores the last row first.
    """
    image.load_prepare()
    image.load_prepare = lambda: None  # type: ignore[method-assign]  # a second call would clear the picture again
    blank = Pillow.new(
        image.mode, image.size, UNTOUCHED[: len(image.getbands())] if image.mode != "L" else UNTOUCHED[0]
    )
    image.im.paste(blank.im, (0, 0, *image.size))
    try:
        image.load()
    except (OSError, SyntaxError, ValueError):
        image.tile = []  # nothing more comes
        partial = blank._new(image.im)
        box = ImageChops.difference(partial, blank).getbbox(alpha_only=False)
        return 0 if box is None else image.height - box[1] if upwards else box[3]
    return image.height
