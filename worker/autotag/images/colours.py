"""Colour profiles of files that describe their colours by numbers: ``nclx`` of HEIF, gAMA, cHRM and cICP of PNG.

The numbers are those of ITU-T H.273. They become a small ICC profile, so that the same code converts all colours to
sRGB.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from functools import cache

Point = tuple[float, float]
Vector = tuple[float, float, float]
Matrix = tuple[Vector, Vector, Vector]

D65: Point = (0.3127, 0.3290)
D50: Vector = (0.9642, 1.0, 0.8249)
#: Red, green and blue by H.273's number; all have the white point D65.
PRIMARIES: dict[int, tuple[Point, Point, Point]] = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060)), 9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046)),
    11: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)), 12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060)),
}  # fmt: skip
SRGB = PRIMARIES[1]
LINEAR, PQ, HLG = 8, 16, 18
GAMMAS = {4: 2.2, 5: 2.8, LINEAR: 1.0}
WHITE = 203.0  # cd/m² of white in PQ and HLG (ITU-R BT.2408); brighter values are compressed
PEAK = 1000.0  # cd/m² of HLG's brightest
KNEE = 0.7  # compression begins at this share of white
STEPS = 1024  # of a curve
BRADFORD: Matrix = ((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296))


def by_numbers(primaries: int, transfer: int) -> bytes | None:
    """The ICC profile for H.273's numbers; None: they mean sRGB, or they are unknown."""
    corners = PRIMARIES.get(primaries, SRGB)
    if corners == SRGB and transfer not in (*GAMMAS, PQ, HLG):
        return None
    return _profile((D65, *corners), GAMMAS.get(transfer, -float(transfer)))


def by_points(white: Point, corners: Sequence[Point], gamma: float) -> bytes | None:
    """The ICC profile of a display with these chromaticities and this gamma. None: it is nearly sRGB, or invalid."""
    points = (white, *corners)
    if not 0.5 <= gamma <= 5 or not all(0 <= x < 1 and 0.001 < y < 1 and x + y <= 1.001 for x, y in points):
        return None
    near = all(math.dist(a, b) < 0.01 for a, b in zip(points, (D65, *SRGB), strict=True))
    if near and abs(gamma - 2.2) < 0.15:
        return None
    try:
        return _profile(points, gamma)
    except (ZeroDivisionError, struct.error):
        return None


@cache
def _profile(points: tuple[Point, ...], gamma: float) -> bytes:
    """gamma: an exponent; or minus the number of a transfer function."""
    white, *corners = (((x / y), 1.0, (1 - x - y) / y) for x, y in points)
    red, green, blue = corners
    scale = _times(_inverse(_columns(red, green, blue)), white)
    change = [to / of for to, of in zip(_times(BRADFORD, D50), _times(BRADFORD, white), strict=True)]
    adapted = []
    for colour, share in zip((red, green, blue), scale, strict=True):
        cone = _times(BRADFORD, [part * share for part in colour])
        adapted.append(_times(_inverse(BRADFORD), [part * by for part, by in zip(cone, change, strict=True)]))
    curve = _curve(gamma)
    values = [round(65535 * min(1.0, max(0.0, curve(step / (STEPS - 1))))) for step in range(STEPS)]
    blocks = [b"XYZ \0\0\0\0" + b"".join(map(_fixed, colour)) for colour in adapted]
    blocks.append(struct.pack(f">4s4xI{STEPS}H", b"curv", STEPS, *values))
    return _file(blocks)


def _file(blocks: list[bytes]) -> bytes:
    """A display profile of ICC version 2: three colours and one curve for all."""
    names = ((b"rXYZ", 0), (b"gXYZ", 1), (b"bXYZ", 2), (b"rTRC", 3), (b"gTRC", 3), (b"bTRC", 3))
    start = 128 + 4 + 12 * len(names)
    at = [start + sum(map(len, blocks[:n])) for n in range(len(blocks))]
    table = struct.pack(">I", len(names))
    table += b"".join(struct.pack(">4sII", name, at[n], len(blocks[n])) for name, n in names)
    size = start + sum(map(len, blocks))
    head = struct.pack(">I4xI4s4s4s12x4s28x", size, 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    head += b"".join(map(_fixed, D50))
    return head.ljust(128, b"\0") + table + b"".join(blocks)


def _curve(gamma: float) -> Callable[[float], float]:
    if gamma == -PQ:
        return _pq
    if gamma == -HLG:
        return _hlg
    if gamma <= 0:
        return lambda value: value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
    return lambda value: value**gamma


def _pq(value: float) -> float:
    """SMPTE ST 2084."""
    root = value ** (1 / 78.84375)
    light = max(0.0, root - 0.8359375) / (18.8515625 - 18.6875 * root)
    return _compressed(10_000 / WHITE * light ** (1 / 0.1593017578125))


def _hlg(value: float) -> float:
    """ARIB STD-B67, with the system gamma of a display of `PEAK`."""
    scene = value * value / 3 if value <= 0.5 else (math.exp((value - 0.55991073) / 0.17883277) + 0.28466892) / 12
    return _compressed(PEAK / WHITE * scene**1.2)


def _compressed(light: float) -> float:
    return light if light <= KNEE else 1 - (1 - KNEE) * math.exp(-(light - KNEE) / (1 - KNEE))


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _columns(a: Vector, b: Vector, c: Vector) -> Matrix:
    return ((a[0], b[0], c[0]), (a[1], b[1], c[1]), (a[2], b[2], c[2]))


def _times(matrix: Matrix, vector: Sequence[float]) -> Vector:
    x, y, z = (sum(a * b for a, b in zip(row, vector, strict=True)) for row in matrix)
    return x, y, z


def _inverse(matrix: Matrix) -> Matrix:
    (a, b, c), (d, e, f), (g, h, i) = matrix
    det = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    return (
        ((e * i - f * h) / det, (c * h - b * i) / det, (b * f - c * e) / det),
        ((f * g - d * i) / det, (a * i - c * g) / det, (c * d - a * f) / det),
        ((d * h - e * g) / det, (b * g - a * h) / det, (a * e - b * d) / det),
    )
