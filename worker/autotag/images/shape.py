"""Calculates the size of the picture that is sent.

Models count patches of 32 × 32 pixels, so both sides are multiples of 32: a partial patch costs as much as a whole one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

PATCH = 32  # pixels
#: Max change of a picture's proportions, to fit the grid.
MAX_DISTORTION = 0.03
#: Min share of the pixels that must remain after fitting the grid. For small sides, few sizes are on the grid, so some
#: pictures are sent with a size off the grid.
MIN_KEPT = 0.8
#: Max ratio of the sides, and min pixels of the short side. No model can read a strip of 18 × 512, and some refuse it.
MAX_RATIO = 10
MIN_SHORT_SIDE = 64
#: A longer strip is cut into at most this many pieces, which are placed side by side.
MAX_PIECES = 64
MIN_GAP = 4  # pixels between two pieces


@dataclass(frozen=True)
class Shape:
    """How a picture is scaled.

    Attributes:
        width: of the whole picture after scaling.
        height: of the whole picture after scaling.
        pieces: into how many pieces it is cut along its long side.
    """

    width: int
    height: int
    pieces: int = 1


@lru_cache(maxsize=64)  # the search takes up to 3 ms, and each image needs its shape twice
def fit(width: int, height: int, side: int) -> Shape:
    """The shape of a picture for a model that sees at most ``side`` pixels of its longer side."""
    ratio = max(width, height) / min(width, height)
    if ratio > min(MAX_RATIO, max(side / MIN_SHORT_SIDE, 1.5)):
        return _strip(width, height, side)
    if max(width, height) <= side:
        return Shape(width, height)
    return _on_grid(width, height, side) or _scaled(width, height, side)


def layout(shape: Shape) -> tuple[int, int, int]:
    """Width and height of the sheet with all pieces, and the distance from one piece to the next in pixels."""
    vertical = shape.height > shape.width
    across, along = sorted((shape.width, shape.height))
    across_all = _up(shape.pieces * (across + MIN_GAP) - MIN_GAP)
    step = across + (across_all - shape.pieces * across) // (shape.pieces - 1)
    sheet = (across_all, along // shape.pieces)
    return (*(sheet if vertical else sheet[::-1]), step)


def _on_grid(width: int, height: int, side: int) -> Shape | None:
    best, best_score = None, 0.0
    for across in range(1, min(side, width) // PATCH + 1):
        for down in range(1, min(side, height) // PATCH + 1):
            distortion = abs(math.log(across * height / (down * width)))
            score = across * down * (1 - 5 * distortion)
            if distortion <= MAX_DISTORTION and score > best_score:
                best, best_score = Shape(across * PATCH, down * PATCH), score
    whole = _scaled(width, height, side)
    return best if best and best.width * best.height >= MIN_KEPT * whole.width * whole.height else None


def _scaled(width: int, height: int, side: int) -> Shape:
    scale = side / max(width, height)
    return Shape(max(1, round(width * scale)), max(1, round(height * scale)))


def _strip(width: int, height: int, side: int) -> Shape:
    """Cuts a long strip into the number of pieces that makes them largest."""
    across, along = sorted((width, height))

    def scale_of(pieces: int) -> float:
        return min((side - (pieces - 1) * MIN_GAP) / (pieces * across), side * pieces / along)

    pieces = max(range(2, min(MAX_PIECES, side // (2 * MIN_GAP)) + 1), key=scale_of)
    scale = min(1.0, scale_of(pieces))
    smallest = min(pieces * across, along / pieces) * scale
    if smallest < MIN_SHORT_SIDE:
        scale *= min(MIN_SHORT_SIDE / smallest, max(1.0, scale_of(pieces) / scale))
    along_piece = max(1, min(side, round(along * scale / pieces)))
    if along_piece > PATCH:
        along_piece = min(_up(along_piece), side // PATCH * PATCH or side)
    fits = (_down(side) - (pieces - 1) * MIN_GAP) // pieces
    across_piece = max(1, min(round(across * scale), fits))
    strip = (across_piece, along_piece * pieces)
    return Shape(*(strip if height > width else strip[::-1]), pieces)


def _up(pixels: int) -> int:
    return -(-pixels // PATCH) * PATCH


def _down(pixels: int) -> int:
    return pixels // PATCH * PATCH or pixels
