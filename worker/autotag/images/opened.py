"""What the modules for each kind of file have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from PIL import Image as Pillow

from autotag.errors import TaggingError, image_error
from autotag.images.sent import ImageNotes

#: Bytes that every decoding needs in addition to its pixels: tables of the libraries, the small picture and its JPEG.
FIXED_NEED = 24_000_000
#: Bytes that `finish` needs for each pixel of the picture that is sent: copies before and after scaling, without
#: transparency, and sharpened. `FIXED_NEED` includes the first pixels.
FINISH_PER_PIXEL, FINISH_INCLUDED = 20, 512 * 512
#: A picture that can be decoded in any size is decoded larger than it is sent, for smooth edges: at twice the size, or
#: with this many pixels if that is less.
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
        notes: on its file.
    """

    image: Pillow.Image
    icc: bytes | None = None
    notes: ImageNotes = field(default_factory=ImageNotes)


@dataclass(frozen=True)
class Opened:
    """A file whose headers were read.

    Attributes:
        kind: the kind of file, for people.
        width: in pixels, as the picture is stored.
        height: in pixels, as the picture is stored.
        need: upper bound of the bytes that ``decode`` allocates, including the file.
        decode: decodes the picture, scaled down to at least the given width and height.
        orientation: how to turn the stored picture, as in EXIF (1 to 8).
        cheaper: another way that needs less memory and shows less.
        advice: what its user can do if there is too little memory for it.
        silent: whether its decoder leaves out parts of the picture without an error if it runs out of memory.
        held: bytes of the need that are still allocated after decoding; None: all of them.
    """

    kind: str
    width: int
    height: int
    need: int
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
        """The same file, with the memory that `finish` needs to make a picture of this many pixels."""
        finishing = FINISH_PER_PIXEL * max(0, pixels - FINISH_INCLUDED)
        held = self.need if self.held is None else self.held
        cheaper = self.cheaper and self.cheaper.finished(pixels)
        return replace(self, need=max(self.need, held + finishing), cheaper=cheaper)


def oversampling(width: int, height: int) -> float:
    """How much larger than the sent picture to decode it, if its decoder can decode in any size."""
    return min(2.0, max(1.0, math.sqrt(MAX_BETWEEN / (width * height))))


def damaged() -> TaggingError:
    """The error of a file that is of a known kind, but cannot be decoded."""
    return image_error("damaged_image", "The image file is damaged or incomplete.")


def unsupported(what: str) -> TaggingError:
    """The error of a file of a kind that cannot be tagged: "This is a video (MP4)."."""
    return image_error("unsupported_format", f"This is {what}. Upload a PNG or JPEG instead.")


def share(rows: int, height: int) -> ImageNotes:
    """The note on a truncated file.

    Raises:
        TaggingError: ``damaged_image``: too few of its rows are there.
    """
    if rows < ENOUGH_ROWS * height:
        raise damaged()
    return {"truncated": min(round(rows / height, 4), 0.9999)}
