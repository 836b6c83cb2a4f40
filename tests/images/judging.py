"""Compares a picture that the provider received with what a person expects of it (cases/expected.json)."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image as Pillow
from PIL import ImageStat


def judge(jpeg: bytes, expectation: dict[str, Any]) -> list[str]:
    """Everything that is wrong with a picture; empty if it is as expected.

    Args:
        jpeg: what was sent.
        expectation: ``quarters`` (colours), ``dark_lines_at_least``, ``mean_grey_at_least``, ``contrast_at_least``,
            ``gradient``, ``shortest_side_at_least``, ``aspect_at_most``, ``size``.
    """
    image = Pillow.open(io.BytesIO(jpeg))
    wrong = [] if image.format == "JPEG" and image.mode == "RGB" else [f"{image.format} {image.mode}"]
    if image.getexif() or "icc_profile" in image.info:
        wrong.append("it has metadata")
    grey, size = image.convert("L"), image.size
    low, high = grey.getextrema()
    checks = {
        "quarters": lambda value: all(map(_near, quarters(image), value)),
        "dark_lines_at_least": lambda value: dark_lines(grey) >= value,
        "mean_grey_at_least": lambda value: ImageStat.Stat(grey).mean[0] >= value,
        "contrast_at_least": lambda value: high - low >= value,
        "gradient": lambda _: is_gradient(grey),
        "shortest_side_at_least": lambda value: min(size) >= value,
        "aspect_at_most": lambda value: max(size) / min(size) <= value,
        "size": lambda value: size == tuple(value),
    }
    wrong += [f"{name}: {value}" for name, value in expectation.items() if name in checks and not checks[name](value)]
    return wrong


def _near(colour: tuple[float, ...], wanted: tuple[int, ...]) -> bool:
    return all(abs(a - b) <= 30 for a, b in zip(colour, wanted, strict=True))


def quarters(image: Pillow.Image) -> list[tuple[float, ...]]:
    """The colours in the middle of each quarter."""
    w, h = image.size
    boxes = [
        (x + w // 8, y + h // 8, x + w * 3 // 8 or 1, y + h * 3 // 8 or 1) for y in (0, h // 2) for x in (0, w // 2)
    ]
    return [tuple(ImageStat.Stat(image.crop(box)).mean) for box in boxes]


def dark_lines(grey: Pillow.Image) -> int:
    """The lines that are darker than what is above and below them, in the middle column."""
    column = [grey.getpixel((grey.width // 2, y)) for y in range(grey.height)]
    return sum(
        1
        for y in range(1, len(column) - 1)
        if column[y] < 240 and column[y] < column[y - 1] and column[y] <= column[y + 1]
    )


def is_gradient(grey: Pillow.Image) -> bool:
    """Whether the picture gets steadily lighter from one side to the other."""
    for size in ((16, 1), (1, 16)):
        small = list(grey.resize(size, Pillow.Resampling.BOX).get_flattened_data())
        if small in (sorted(small), sorted(small, reverse=True)) and abs(small[0] - small[-1]) > 150:
            return True
    return False
