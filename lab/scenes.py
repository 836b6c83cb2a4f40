"""Draws scenes with known small text and thin lines (`lab.openai_sim.reading`)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFont

LETTERS = "ABEFHKNRSX"
SIZES = ((1600, 1200), (900, 1200), (1200, 800), (1024, 1024), (1100, 720))
COLOURS = (("#ffffff", "#101010"), ("#181c28", "#f0f0e0"), ("#f4e8c8", "#503010"), ("#d8e4f0", "#203070"))
SLOT, LINE = 5, 2  # pixels from one place for a line to the next, and of a line's width
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Scene:
    """A drawing.

    Attributes:
        image: the picture.
        letters: the letters and their places.
        lines: for each place on a ruler whether a line is there.
        ruler: the place of the ruler.
    """

    image: Image.Image
    letters: tuple[tuple[str, Box], ...]
    lines: tuple[bool, ...]
    ruler: Box


def scenes(count: int, seed: int = 1) -> Iterator[Scene]:
    """``count`` different scenes."""
    for number in range(count):
        yield _draw(random.Random(f"{seed} {number}"), SIZES[number % len(SIZES)], number)


def _draw(rng: random.Random, size: tuple[int, int], number: int) -> Scene:
    paper, ink = COLOURS[number % len(COLOURS)]
    image = Image.new("RGB", size, paper)
    pen, letters = ImageDraw.Draw(image), list[tuple[str, Box]]()
    for row in range(4):
        height = max(size) * (11 + (number + 3 * row) % 10) // 1600  # 3 to 7 pixels when the longer side is 512
        width, top = height, 60 + row * 60
        for column in range(12):
            letter, left = rng.choice(LETTERS), 40 + rng.randrange(9) + column * (width + 12)
            image.paste(ink, (left, top), glyph(letter, width, height))
            letters.append((letter, (left, top, left + width, top + height)))
    ruler = (40, size[1] // 2, 40 + 60 * SLOT, size[1] // 2 + 80)
    lines = tuple(rng.random() < 0.5 for _ in range(60))
    for place, there in enumerate(lines):
        if there:
            left = ruler[0] + place * SLOT
            pen.rectangle((left, ruler[1], left + LINE - 1, ruler[3]), fill=ink)
    for _ in range(12):  # shapes as a background
        x, y = rng.randrange(size[0]), rng.randrange(size[1] * 2 // 3, size[1])
        pen.ellipse((x, y, x + 90, y + 60), outline=ink, fill=rng.choice(("#c03030", "#30a050", "#3050c0", paper)))
    return Scene(image, tuple(letters), lines, ruler)


@lru_cache(maxsize=500)
def glyph(letter: str, width: int, height: int) -> Image.Image:
    """A letter as large as this, in shades of grey."""
    font = ImageFont.load_default(height * 1.3)
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).text((width / 2, height / 2), letter, fill=255, font=font, anchor="mm")
    return mask
