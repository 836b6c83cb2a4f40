"""Supabase Storage's image transformations, as its imgproxy makes them: limits, kinds, errors, rotation.

Sources: supabase/storage (src/storage/renderer/image.ts, src/http/schemas/transformations.ts), imgproxy's documentation
of its defaults, and Supabase's guide "Image Transformations": 25 MB, 50 megapixels, sides of 1 to 2,500 pixels. The
picture is turned upright by its EXIF, metadata is stripped, and nothing is enlarged. An animation becomes its first
frame. The result has the kind of the source, except that HEIC becomes JPEG and SVG stays as it is.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import pillow_heif
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_BYTES, MAX_PIXELS, MAX_SIDE = 25_000_000, 50_000_000, 2500
#: A file of this name in the edge's folder: the project's plan includes transformations.
TRANSFORMS = "image-transformations"
NOT_ENABLED = "The feature imageTransformation is not enabled for this resource"
RESULTS = {
    "JPEG": "JPEG", "PNG": "PNG", "WEBP": "WEBP", "GIF": "GIF", "AVIF": "AVIF", "BMP": "BMP", "TIFF": "TIFF",
    "HEIF": "JPEG",
}  # fmt: skip

pillow_heif.register_heif_opener()


class NotRendered(Exception):
    """An error reply: the status in its body, Storage's code, and the message."""

    def __init__(self, status: str, code: str, message: str) -> None:
        self.status, self.code, self.message = status, code, message


def render(path: Path, query: Mapping[str, str]) -> tuple[bytes, str]:
    """Scales an image; its bytes and content type.

    Raises:
        NotRendered: the query or the image is refused.
    """
    width, height, quality = (_number(query, name) for name in ("width", "height", "quality"))
    if quality is not None and not 20 <= quality <= 100:
        raise NotRendered("400", "InvalidRequest", "querystring/quality must be >= 20")
    if query.get("resize", "cover") not in ("cover", "contain", "fill"):
        raise NotRendered("400", "InvalidRequest", "querystring/resize must be equal to one of the allowed values")
    if path.stat().st_size > MAX_BYTES:
        raise _refused("Source image file is too big")
    start = path.read_bytes()[:1000]
    if b"<svg" in start:
        return path.read_bytes(), "image/svg+xml"
    try:
        image = Image.open(path, formats=tuple(RESULTS))
        if image.width * image.height > MAX_PIXELS:
            raise _refused("Source image resolution is too big")
        kind = RESULTS[image.format or ""]
        scaled = _scale(ImageOps.exif_transpose(image), width, height, query.get("resize", "cover"))
    except UnidentifiedImageError:
        raise _refused("Source image type not supported") from None
    except (OSError, SyntaxError, ValueError):
        raise _refused("Invalid source image") from None
    out = io.BytesIO()
    scaled.info.clear()
    scaled.save(out, kind, quality=quality or 80)
    return out.getvalue(), f"image/{kind.lower()}"


def _number(query: Mapping[str, str], name: str) -> int | None:
    text = query.get(name)
    if text is None:
        return None
    if not text.isdecimal():
        raise NotRendered("400", "InvalidRequest", f"querystring/{name} must be integer")
    return int(text)


def _scale(image: Image.Image, width: int | None, height: int | None, resize: str) -> Image.Image:
    size = (_side(width, image.width), _side(height, image.height))
    if resize == "contain":
        image.thumbnail(size, Image.Resampling.LANCZOS)
        return image
    return image.resize(size) if resize == "fill" else ImageOps.fit(image, size)


def _side(asked: int | None, there: int) -> int:
    return min(max(asked, 1), MAX_SIDE) if asked else there


def _refused(message: str) -> NotRendered:
    return NotRendered("422", "ImageProcessingError", message)
