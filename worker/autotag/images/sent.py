"""The form in which an image is sent to the model. (Only decoding processes import `prepare`.)"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import TypedDict

#: Max pixels of an image's longer side, by detail; the model scales larger images down (OpenAI's guide "Images and
#: vision"). The setting ``image_side`` overrides it.
MAX_SIDE = {"low": 512, "high": 2048}


class ImageNotes(TypedDict, total=False):
    """What a person should know about an image's file (docs/images.md), in the form that ``autotag.clean_image_notes``
    expects; empty for ordinary files.

    truncated: the share (0 to 1) of the picture's pixel rows that the file contains. pieces: the number of pieces into
    which a long picture was cut. frame, page: the number of the frame or page that was tagged. pages: the number of
    pages. thumbnail: width and height of the thumbnail that was tagged.
    """

    truncated: float
    pieces: int
    frame: int
    page: int
    pages: int
    thumbnail: list[int]
    kind: str


@dataclass(frozen=True)
class Prepared:
    """What is sent to the model.

    Attributes:
        jpeg: the picture: upright, without metadata.
        notes: on its file.
    """

    jpeg: bytes
    notes: ImageNotes = field(default_factory=ImageNotes)


def max_side(detail: str, side: int | None) -> int:
    """Max pixels of an image's longer side, by the question's ``image_detail`` and ``image_side``."""
    return side or MAX_SIDE[detail]


def data_url(jpeg: bytes) -> str:
    """The JPEG as a data URL, as requests contain it."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
