"""The form in which an image is sent to the model. (Only decoding processes import `prepare`.)"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

#: Max pixels of an image's longer side, by detail; the model scales larger images down (OpenAI's guide "Images and
#: vision"). The setting ``image_side`` overrides it.
MAX_SIDE = {"low": 512, "high": 2048}


@dataclass(frozen=True)
class Prepared:
    """What is sent to the model.

    Attributes:
        jpeg: the picture: upright, without metadata.
        notes: what a person should know about the file (docs/images.md); empty for ordinary files.
    """

    jpeg: bytes
    notes: dict[str, Any] = field(default_factory=dict)


def max_side(detail: str, side: int | None) -> int:
    """Max pixels of an image's longer side, as the question to the model has it (``image_detail``, ``image_side``)."""
    return side or MAX_SIDE[detail]


def data_url(jpeg: bytes) -> str:
    """The JPEG as a data URL, as requests contain it."""
    return "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
