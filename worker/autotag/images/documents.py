"""The first page of a PDF (PDFium), and SVG drawings (librsvg, by libvips).

Neither runs scripts nor reads anything but the file: this PDFium has no JavaScript, and librsvg gets no address from
which it could open another file.
"""

from __future__ import annotations

import base64
import math
import re
from functools import partial
from typing import Any

from autotag.errors import TaggingError, image_error
from autotag.images import vips
from autotag.images.jpeg import open_jpeg
from autotag.images.kinds import kind_of, without_utf16
from autotag.images.levels import scale_numbers
from autotag.images.opened import FIXED_COST, Decoded, Opened, damaged, oversampling, unsupported
from autotag.images.png import open_png
from autotag.images.shape import fit

#: Drawings have no pixels. Their size counts as this multiple of what is sent, so that they are never too small.
SHARPER = 4
MAX_OBJECTS = 20_000  # of a page, that are looked at for pictures
PDF_COST, SVG_COST = 60_000_000, 60_000_000  # bytes beside the pictures in them
_UTF16 = re.compile(rb"\sencoding=[\"']utf-16(le|be)?[\"']", re.IGNORECASE)
_ROOT = re.compile(rb"<(\w+:)?svg\s[^>]*")
_SIZE = re.compile(rb"\s(width|height)\s*=\s*(\"[^\"]*\"|'[^']*')")
#: Variables of CSS, which librsvg does not know: it would draw black instead. Their values and fallbacks are short, so
#: that no drawing grows much.
_VARIABLE = re.compile(rb"(--[\w-]{1,60})\s*:\s*([^;{}<>\"']{1,60})")
_USED = re.compile(rb"var\(\s{0,9}(--[\w-]{1,60})\s{0,9}(?:,\s{0,9}([^()]{0,60}|[\w-]{1,30}\([^()]{0,60}\))\s{0,9})?\)")
#: HTML, which librsvg does not draw; but it takes it for drawn, and leaves out what a ``switch`` has in its place.
_HTML = re.compile(rb"<(/?)(?:\w{1,30}:)?foreignObject\b[^<>]*>")
_EMBEDDED = re.compile(rb"data:image/[\w.+-]*;base64,([A-Za-z0-9+/=\s]+)")


def _pdfium() -> Any:
    """PDFium's bindings. They are imported with the first PDF: that takes 0.1 s, and most processes never see one."""
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
        held = FIXED_COST + PDF_COST + 3 * len(data) + pictures + 4 * drawn
        return Opened("PDF", *size, held + 4 * drawn, partial(_render_page, data, pages), silent=True, held=held)
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
        # larger than it is sent: thin lines become smoother
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
    except vips.VipsError:  # perhaps it has a size of zero: without one, it is as large as what it shows
        data = _ROOT.sub(lambda root: _SIZE.sub(b"", root[0]), data, count=1)
        try:
            image = vips.load("svg", data)
        except vips.VipsError:
            raise damaged() from None
    natural = (image.width, image.height)
    cost = FIXED_COST + SVG_COST + 20 * len(data) + sum(map(_pixels, _EMBEDDED.findall(data))) * 12
    size = _nominal(image.width, image.height, side)
    return Opened("SVG", *size, cost, partial(_draw, data, natural, has_html))


def _without_html(data: bytes) -> bytes:
    """The drawing without the HTML in it; as it is, if the tags of that do not fit together."""
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
    """The drawing with the values of its variables, each of which has its first one everywhere."""
    if b"var(" not in data:
        return data
    values: dict[bytes, bytes] = {}
    for name, value in _VARIABLE.findall(data):
        values.setdefault(name, value.strip())

    def value_of(use: re.Match[bytes]) -> bytes:
        value = values.get(use[1])
        if value and (inner := _USED.fullmatch(value)):  # one that stands for another one
            value = values.get(inner[1], inner[2])
        value = use[2] if value is None else value
        return use[0] if value is None else value

    return _USED.sub(value_of, data)


def _pixels(encoded: bytes) -> int:
    """The pixels of a picture in a drawing."""
    try:
        inside = base64.b64decode(encoded)
        kind = kind_of(inside)
        opener: Any = {"JPEG": open_jpeg, "PNG": open_png}.get(kind)
        opened = opener(inside, 512) if opener else None
    except (TaggingError, ValueError):
        return 0
    return opened.width * opened.height if opened else 0


def _draw(data: bytes, natural: tuple[int, int], has_html: bool, width: int, height: int) -> Decoded:
    scale = max(width / natural[0], height / natural[1])
    image = scale_numbers(lambda: vips.load("svg", data, scale=scale), width, height)
    if has_html and not image.getbbox():
        raise unsupported("an SVG that consists of HTML (foreignObject)")
    return Decoded(image, None, {"kind": "SVG"})
