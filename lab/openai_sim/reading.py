"""Reads small text and thin lines at known places in a picture.

It simulates how well a model sees: the more a picture was blurred by scaling, or lost lines, the less it can read.
"""

from __future__ import annotations

from functools import lru_cache
from operator import mul

from PIL import Image, ImageStat

from lab.scenes import LETTERS, LINE, SLOT, Box, Scene, glyph

GRID = (8, 10)  # samples of a letter
Vector = tuple[float, ...]


def read(image: Image.Image, scene: Scene) -> int:
    """The number of letters and of places on the ruler that are recognised in a picture of this scene, in any size."""
    grey = image.convert("L")
    letters = sum(_letter(_cell(grey, box, scene), box) == letter for letter, box in scene.letters)
    return letters + sum(seen == there for seen, there in zip(_lines(grey, scene), scene.lines, strict=True))


def _cell(grey: Image.Image, box: Box, scene: Scene) -> Vector:
    across, down = grey.width / scene.image.width, grey.height / scene.image.height
    part = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
    return _direction(grey.resize(GRID, Image.Resampling.BILINEAR, box=part))


def _letter(cell: Vector, box: Box) -> str:
    """The most similar letter, dark on light or light on dark."""
    known = _known(box[2] - box[0], box[3] - box[1])
    return max(LETTERS, key=lambda letter: abs(sum(map(mul, cell, known[letter]))))


@lru_cache(maxsize=50)
def _known(width: int, height: int) -> dict[str, Vector]:
    return {letter: _direction(glyph(letter, width, height).resize(GRID, Image.Resampling.BOX)) for letter in LETTERS}


def _direction(cell: Image.Image) -> Vector:
    values = cell.tobytes()
    mean = sum(values) / len(values)
    length = sum((value - mean) ** 2 for value in values) ** 0.5 or 1.0
    return tuple((value - mean) / length for value in values)


def _lines(grey: Image.Image, scene: Scene) -> list[bool]:
    left, top, right, bottom = scene.ruler
    across, down = grey.width / scene.image.width, grey.height / scene.image.height
    paper = ImageStat.Stat(grey.crop((0, 0, int(30 * across), int(40 * down)))).mean[0]
    seen = []
    for at in range(left, right, SLOT):
        place = (at * across, top * down, (at + LINE) * across, bottom * down)
        seen.append(abs(grey.resize((1, 1), Image.Resampling.BOX, box=place).tobytes()[0] - paper) > CLEAR)
    return seen


#: A difference of grey that a line makes.
CLEAR = 60
