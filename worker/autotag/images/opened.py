"""What the modules of the kinds of files have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from PIL import Image as Pillow

from autotag.errors import TaggingError, image_error

#: Bytes that every decoding takes beside its pixels: tables of the libraries, the small picture and its JPEG.
FIXED_COST = 24_000_000
#: Bytes that a pixel of the sent picture takes while it is finished: before and after scaling, without its
#: transparency, sharpened. `FIXED_COST` has those of the first pixels.
FINISH_PER_PIXEL, FINISH_INCLUDED = 20, 512 * 512
#: Pixels of a large picture between decoding and scaling. Smaller ones are decoded at twice the size, for smooth edges.
MAX_BETWEEN = 6_500_000
#: Min share of a file's rows that must be there.
ENOUGH_ROWS = 0.95


MAX_SIDE = 10_000_000  # pixels of a file's side; a header that says more is damaged


@dataclass(frozen=True)
class Decoded:
    """A picture that was decoded.

    Attributes:
        image: the picture, scaled down to the wanted size or to a larger one.
        icc: its colour profile.
        notes: what a person should know (`sent.Prepared`).
    """

    image: Pillow.Image
    icc: bytes | None = None
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Opened:
    """A file whose headers were read.

    Attributes:
        kind: the kind of file, for people.
        width: in pixels, as the picture is stored.
        height: in pixels, as the picture is stored.
        cost: upper bound of the bytes that ``decode`` allocates, the file included.
        decode: decodes the picture, scaled down to at least the given width and height.
        orientation: how to turn the stored picture, as in EXIF (1 to 8).
        cheaper: another way that needs less memory and shows less.
        advice: what its user can do if there is too little memory for it.
        silent: whether its decoder leaves out what it gets no memory for, and does not say so.
        held: bytes of the cost that are still needed after decoding; None: all of them.
    """

    kind: str
    width: int
    height: int
    cost: int
    decode: Callable[[int, int], Decoded]
    orientation: int = 1
    cheaper: Opened | None = None
    advice: str = "Upload a smaller version of it"
    silent: bool = False
    held: int | None = None

    def __post_init__(self) -> None:
        if not (1 <= self.width <= MAX_SIDE and 1 <= self.height <= MAX_SIDE):
            raise damaged()

    @property
    def upright(self) -> tuple[int, int]:
        """Width and height of the picture as it is shown."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)

    def finished(self, pixels: int) -> Opened:
        """The same with the cost of a picture of so many pixels, which `finish` makes of it."""
        finishing = FINISH_PER_PIXEL * max(0, pixels - FINISH_INCLUDED)
        held = self.cost if self.held is None else self.held
        cheaper = self.cheaper and self.cheaper.finished(pixels)
        return replace(self, cost=max(self.cost, held + finishing), cheaper=cheaper)


def oversampling(width: int, height: int) -> float:
    """How much larger than the sent picture it is decoded, if its decoder can do that in any size."""
    return min(2.0, max(1.0, math.sqrt(MAX_BETWEEN / (width * height))))


def damaged() -> TaggingError:
    """The error of a file that is of a known kind, but cannot be decoded."""
    return image_error("damaged_image", "The image file is damaged or incomplete.")


def unsupported(what: str) -> TaggingError:
    """The error of a file of a kind that cannot be tagged: "This is a video (MP4)."."""
    return image_error("unsupported_format", f"This is {what}. Upload a PNG or JPEG instead.")


def share(rows: int, height: int) -> dict[str, Any]:
    """The note on a truncated file.

    Raises:
        TaggingError: ``damaged_image``: too few of its rows are there.
    """
    if rows < ENOUGH_ROWS * height:
        raise damaged()
    return {"truncated": min(round(rows / height, 4), 0.9999)}
