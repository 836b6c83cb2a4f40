"""The first page of a PDF (PDFium), and SVG drawings (librsvg, by libvips).

Neither library runs scripts or reads other files: this PDFium has no JavaScript, and librsvg gets no base address from
which it could open another file.
"""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from autotag.errors import image_error
from autotag.images import vips
from autotag.images.avif import open_avif
from autotag.images.bmp import open_bmp
from autotag.images.finish import TURNS, scaled, to_srgb
from autotag.images.gif import open_gif
from autotag.images.jpeg import open_jpeg
from autotag.images.kinds import kind_of, without_utf16
from autotag.images.levels import scale_numbers
from autotag.images.opened import FIXED_NEED, Decoded, Opened, damaged, oversampling, unsupported
from autotag.images.png import open_png
from autotag.images.riff import open_webp
from autotag.images.shape import fit

#: Drawings have no pixels. Their size counts as this multiple of the sent size, so that they are never too small.
SHARPER = 4
MAX_OBJECTS = 20_000  # of a page, which are searched for pictures
PDF_NEED, SVG_NEED = 60_000_000, 60_000_000  # bytes in addition to the pictures in them
_UTF16 = re.compile(rb"\sencoding=[\"']utf-16(le|be)?[\"']", re.IGNORECASE)
_ROOT = re.compile(rb"<(\w+:)?svg\s[^>]*")
_SIZE = re.compile(rb"\s(width|height)\s*=\s*(\"[^\"]*\"|'[^']*')")
#: CSS variables, which librsvg does not support: it would draw black instead. Only short values and fallbacks match, so
#: that no drawing grows much.
_VARIABLE = re.compile(rb"(--[\w-]{1,60})\s*:\s*([^;{}<>\"']{1,60})")
_USED = re.compile(rb"var\(\s{0,9}(--[\w-]{1,60})\s{0,9}(?:,\s{0,9}([^()]{0,60}|[\w-]{1,30}\([^()]{0,60}\))\s{0,9})?\)")
#: HTML. librsvg does not draw it, but treats it as supported, and so skips the alternative in a ``switch``.
_HTML = re.compile(rb"<(/?)(?:\w{1,30}:)?foreignObject\b[^<>]*>")
_EMBEDDED = re.compile(rb"data:[\w.+/;= -]{0,99};\s{0,9}base64\s{0,9},([A-Za-z0-9+/=\s]+)")
#: Pictures in drawings that librsvg silently leaves out, although browsers show them.
CONVERTED: dict[str, Callable[[bytes, int], Opened]] = {
    "WebP": open_webp, "GIF": open_gif, "AVIF": open_avif, "BMP": open_bmp,
}  # fmt: skip
SHOWN = {"JPEG": open_jpeg, "PNG": open_png}


def _pdfium() -> Any:
    """PDFium's bindings. Importing them takes 0.1 s, and most processes never get a PDF, so the first PDF imports
    them."""
    import pypdfium2

    return pypdfium2


def open_pdf(data: bytes, side: int) -> Opened:
    """Reads a PDF's first page.

    Raises:
        TaggingError: it is damaged, has no page, or needs a password.
    """
    pdfium = _pdfium()
    try:
        document = pdfium.PdfDocument(data)
    except pdfium.PdfiumError as error:
        if "assword" in str(error):
            raise image_error("unsupported_format", "This is a PDF with a password.") from None
        raise damaged() from None
    try:
        pages = len(document)
        if not pages:
            raise damaged()
        page = document[0]
        across, down = page.get_size()
        size = _nominal(across, down, side)
        pictures = 0
        for number, found in enumerate(page.get_objects(filter=[pdfium.raw.FPDF_PAGEOBJ_IMAGE], max_depth=5)):
            width, height = found.get_px_size()
            pictures += width * height * 8
            if number > MAX_OBJECTS:
                break
        shape = fit(*size, side)
        drawn = math.ceil(shape.width * shape.height * oversampling(shape.width, shape.height) ** 2)
        drawing = FIXED_NEED + 3 * len(data) + 4 * drawn
        need = drawing + PDF_NEED + pictures
        return Opened("PDF", *size, need, partial(_render_page, data, pages), silent=True, held=drawing)
    finally:
        document.close()


def _nominal(width: float, height: float, side: int) -> tuple[int, int]:
    scale = SHARPER * side / max(width, height, 0.001)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _render_page(data: bytes, pages: int, width: int, height: int) -> Decoded:
    document = _pdfium().PdfDocument(data)
    try:
        document.init_forms()
        page = document[0]
        points = page.get_size()
        # drawn larger than it is sent, so that thin lines become smoother
        scale = oversampling(width, height) * max(width / points[0], height / points[1])
        bitmap = page.render(scale=scale, no_smoothtext=False, may_draw_forms=True)
        image = bitmap.to_pil().convert("RGB")
        bitmap.close()
        return Decoded(image, None, {"kind": "PDF", "pages": pages})
    finally:
        document.close()


def open_svg(data: bytes, side: int) -> Opened:
    """Reads an SVG drawing.

    Raises:
        TaggingError: it is damaged.
    """
    data = _UTF16.sub(b"", without_utf16(data), count=1)
    drawn = _without_html(data)
    has_html = drawn != data
    data = _resolved(drawn)
    try:
        image = vips.load("svg", data)
    except vips.VipsError:  # its size may be zero: without a size, it is as large as its content
        data = _ROOT.sub(lambda root: _SIZE.sub(b"", root[0]), data, count=1)
        try:
            image = vips.load("svg", data)
        except vips.VipsError:
            raise damaged() from None
    natural = (image.width, image.height)
    need = FIXED_NEED + SVG_NEED + 20 * len(data) + sum(_need(encoded, side) for encoded in _EMBEDDED.findall(data))
    size = _nominal(image.width, image.height, side)
    return Opened("SVG", *size, need, partial(_draw, data, natural, has_html, side), held=FIXED_NEED + 20 * len(data))


def _without_html(data: bytes) -> bytes:
    """The drawing without its HTML; unchanged if the HTML's tags do not match."""
    kept, at, depth = [], 0, 0
    for tag in _HTML.finditer(data):
        if tag[0].endswith(b"/>"):
            continue
        depth += -1 if tag[1] else 1
        if depth < 0:
            return data
        if depth == 1 and not tag[1]:
            kept.append(data[at : tag.start()])
        at = tag.end()
    return data if depth else b"".join([*kept, data[at:]])


def _resolved(data: bytes) -> bytes:
    """The drawing with its variables replaced by their values. Each variable has its first value everywhere."""
    if b"var(" not in data:
        return data
    values: dict[bytes, bytes] = {}
    for name, value in _VARIABLE.findall(data):
        values.setdefault(name, value.strip())

    def value_of(use: re.Match[bytes]) -> bytes:
        value = values.get(use[1])
        if value and (inner := _USED.fullmatch(value)):  # its value is another variable
            value = values.get(inner[1], inner[2])
        value = use[2] if value is None else value
        return use[0] if value is None else value

    return _USED.sub(value_of, data)


def _picture(encoded: bytes, side: int) -> tuple[Opened | None, bool]:
    """A picture in a drawing, and whether librsvg leaves it out."""
    try:
        inside = base64.b64decode(encoded)
        kind = kind_of(inside)
        opener = (SHOWN | CONVERTED).get(kind)
        return opener(inside, side) if opener else None, kind in CONVERTED
    except Exception:  # noqa: BLE001 (as in `prepare`: it is damaged)
        return None, False


def _need(encoded: bytes, side: int) -> int:
    """Bytes that a picture in a drawing needs."""
    opened, converted = _picture(encoded, side)
    if opened is None:
        return 0
    return (
        opened.need + 20 * min(side, opened.width) * min(side, opened.height)
        if converted
        else 12 * opened.width * opened.height
    )


def _converted(side: int, found: re.Match[bytes]) -> bytes:
    """A picture in a drawing as a PNG, if librsvg would leave it out."""
    opened, converted = _picture(found[1], side)
    if opened is None or not converted:
        return found[0]
    scale = min(1.0, side / max(opened.width, opened.height))
    size = max(1, round(opened.width * scale)), max(1, round(opened.height * scale))
    try:
        decoded = opened.decode(*size)
        image = to_srgb(scaled(decoded.image, size), decoded.icc)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001
        return found[0]
    if opened.orientation in TURNS:
        image = image.transpose(TURNS[opened.orientation])
    out = io.BytesIO()
    image.save(out, "PNG", compress_level=1)
    return b"data:image/png;base64," + base64.b64encode(out.getvalue())


def _draw(data: bytes, natural: tuple[int, int], has_html: bool, side: int, width: int, height: int) -> Decoded:
    data = _EMBEDDED.sub(partial(_converted, side), data)
    scale = max(width / natural[0], height / natural[1])
    image = scale_numbers(lambda: vips.load("svg", data, scale=scale), width, height)
    if has_html and not image.getbbox():
        raise unsupported("an SVG that consists of HTML (foreignObject)")
    return Decoded(image, None, {"kind": "SVG"})
