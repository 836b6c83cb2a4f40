"""Draws pictures whose correct tags are known: four coloured quarters in a landscape, portrait or square frame.

The tags are derived from the colours and the shape, not from the file. If they are in a row, then this picture was
tagged, upright and with the correct colours.
"""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, product

from PIL import Image, ImageDraw

from lab.openai_sim.vision import PALETTE, QUARTERS, brightness

COLOURS = ("red", "yellow", "green", "cyan", "blue", "magenta", "white", "black")
#: Slightly larger than what the model gets (512 pixels), so that the worker has to scale each picture down.
SIZES = {"landscape": (576, 384), "portrait": (384, 576), "square": (540, 540)}
FORMATS = ("JPEG", "PNG", "WEBP")
ROTATED_EVERY = 7  # every seventh picture, if it is a JPEG, is stored rotated, with the rotation in its EXIF
MIN_MARGIN = 10  # luminance between a picture's mean and the limits of brightness(); compression changes it slightly
ORIENTATION_TAG, ROTATED_LEFT = 0x0112, 6


@dataclass(frozen=True)
class Drawing:
    """A picture file and its correct tags."""

    name: str
    content_type: str
    data: bytes
    tags: frozenset[str]


def draw(count: int, seed: int = 1, shrink: int = 1) -> Iterator[Drawing]:
    """``count`` different pictures (up to about 10,000), whose sides are ``shrink`` times shorter than usual."""
    clear = (plan for plan in _plans(seed) if _is_clear(plan[1]))
    for number, (shape, colours) in enumerate(islice(clear, count)):
        yield _draw(number, shape, colours, shrink)


@lru_cache(maxsize=4)
def _plans(seed: int) -> list[tuple[str, tuple[str, ...]]]:
    """All shapes and colours in the order of a seed. Shuffling the 12,288 takes 12 ms."""
    plans = list(product(SIZES, product(COLOURS, repeat=4)))
    random.Random(seed).shuffle(plans)
    return plans


def _luminance(colours: tuple[str, ...]) -> float:
    """Mean luminance of four equal quarters (ITU-R 601, as Pillow's mode L)."""
    weights = (0.299, 0.587, 0.114)
    return sum(sum(w * c for w, c in zip(weights, PALETTE[colour], strict=True)) for colour in colours) / 4


def _is_clear(colours: tuple[str, ...]) -> bool:
    return all(abs(_luminance(colours) - limit) > MIN_MARGIN for limit in (85, 170))


@lru_cache(maxsize=2000)
def _draw(number: int, shape: str, colours: tuple[str, ...], shrink: int) -> Drawing:
    width, height = (side // shrink for side in SIZES[shape])
    image = Image.new("RGB", (width, height))
    pen = ImageDraw.Draw(image)
    for i, colour in enumerate(colours):
        left, top = (i % 2) * width // 2, (i // 2) * height // 2
        pen.rectangle((left, top, left + width // 2 - 1, top + height // 2 - 1), fill=PALETTE[colour])
    kind = FORMATS[number % len(FORMATS)]
    out = io.BytesIO()
    if kind == "JPEG" and number % ROTATED_EVERY == 0:
        exif = Image.Exif()
        exif[ORIENTATION_TAG] = ROTATED_LEFT
        image.transpose(Image.Transpose.ROTATE_90).save(out, kind, quality=90, exif=exif)
    else:
        image.save(out, kind, quality=90, method=0)  # method: the fastest for WebP
    tags = {f"{quarter} {colour}" for quarter, colour in zip(QUARTERS, colours, strict=True)}
    return Drawing(
        f"picture-{number:04}.{kind.lower()}", f"image/{kind.lower()}", out.getvalue(),
        frozenset(tags | {shape, brightness(_luminance(colours))}),
    )  # fmt: skip
