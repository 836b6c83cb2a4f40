"""Derives tags from an image's pixels: the colour of each quarter, the orientation and the brightness."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageStat

#: The RGB values that the names stand for.
PALETTE = {
    "red": (220, 30, 30), "yellow": (235, 220, 40), "green": (30, 160, 50), "cyan": (40, 210, 220),
    "blue": (30, 50, 210), "magenta": (215, 40, 200), "white": (245, 245, 245), "black": (15, 15, 15),
    "gray": (128, 128, 128), "orange": (240, 135, 30), "brown": (110, 70, 40), "pink": (245, 170, 190),
}  # fmt: skip
HEADER = 8192  # characters of base64 (a multiple of 4): enough for most pictures' headers
QUARTERS = ("top left", "top right", "bottom left", "bottom right")


class BadPicture(ValueError):
    """The data is not a picture that the API accepts."""


@dataclass(frozen=True)
class Picture:
    """What the simulator recognised in a picture."""

    width: int
    height: int
    tags: tuple[str, ...]


def nearest_colour(rgb: tuple[float, ...]) -> str:
    """The name of the palette's nearest colour."""
    return min(PALETTE, key=lambda name: sum((a - b) ** 2 for a, b in zip(rgb, PALETTE[name], strict=False)))


def orientation(width: int, height: int) -> str:
    """landscape, portrait or square (within 5 %)."""
    if abs(width - height) <= 0.05 * max(width, height):
        return "square"
    return "landscape" if width > height else "portrait"


def brightness(luminance: float) -> str:
    """dark, medium or bright for a mean luminance of 0–255."""
    return "dark" if luminance < 85 else "bright" if luminance > 170 else "medium"


def _open(url: str, max_characters: int | None = None) -> Image.Image:
    """Opens the picture of a data URL, or of the first ``max_characters`` of its data, without reading its pixels.

    Raises:
        BadPicture: not a data URL, or not a PNG, JPEG, WEBP or still GIF.
    """
    head, comma, encoded = url.partition(",")
    if not comma or not head.startswith("data:image/") or not head.endswith(";base64"):
        raise BadPicture("Invalid image URL.")
    try:
        data = io.BytesIO(base64.b64decode(encoded[:max_characters], validate=True))
        return Image.open(data, formats=("PNG", "JPEG", "WEBP", "GIF"))
    except (binascii.Error, OSError, ValueError, SyntaxError):
        raise BadPicture("You uploaded an unsupported image.") from None


def measure(url: str) -> tuple[int, int]:
    """Width and height of a picture. Decodes only the beginning of the data if that is enough.

    Raises:
        BadPicture: as in `recognise`.
    """
    try:
        return _open(url, HEADER).size
    except BadPicture:
        return _open(url).size


@lru_cache(maxsize=64)
def recognise(url: str) -> Picture:
    """Decodes the picture of a data URL and derives its tags.

    Raises:
        BadPicture: not a data URL, or not a PNG, JPEG, WEBP or still GIF.
    """
    image = _open(url)
    try:
        image.load()
    except (OSError, ValueError, SyntaxError):
        raise BadPicture("You uploaded an unsupported image.") from None
    # Like the real model, the simulator ignores EXIF and does not rotate the image.
    image = image.convert("RGB")
    width, height = image.size
    tags = []
    for i, quarter in enumerate(QUARTERS):
        # Only the middle of the quarter: JPEG compression blurs the edges.
        left, top = (i % 2) * width / 2 + width / 8, (i // 2) * height / 2 + height / 8
        part = image.crop((int(left), int(top), int(left + width / 4) or 1, int(top + height / 4) or 1))
        tags.append(f"{quarter} {nearest_colour(tuple(ImageStat.Stat(part).mean))}")
    tags.append(orientation(width, height))
    tags.append(brightness(ImageStat.Stat(image.convert("L")).mean[0]))
    return Picture(width, height, tuple(tags))
