"""A day's uploads: when, whose, and how many images; drawn from a seed."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

DAY = 86_400.0  # seconds
#: uploads by hour, from midnight: people at work, a peak in the afternoon, a second, lower one in the evening
HOURS = (1, 1, 1, 1, 1, 2, 3, 5, 8, 10, 11, 10, 8, 9, 12, 15, 12, 9, 7, 8, 9, 7, 4, 2)
PEAK = HOURS.index(max(HOURS))
#: images of an upload, and how many uploads of a hundred have so many
SIZES = {1: 22, 3: 26, 5: 12, 15: 18, 40: 12, 120: 6, 300: 3, 1000: 1}
TOP_HEAVY = 0.6  # the n-th busiest workspace uploads n to this power less often than the busiest


@dataclass(frozen=True, slots=True)
class Upload:
    """One click on "upload"."""

    at: float  # seconds of the day
    workspace: int
    images: int


def draw_day(images: int, workspaces: int, seed: int = 1) -> list[Upload]:
    """Uploads of so many images together, in the order of their coming; every workspace has one at least, as far as
    the images go."""
    dice = random.Random(seed)
    busy = list(itertools.accumulate((rank + 1) ** -TOP_HEAVY for rank in range(workspaces)))
    hours = list(itertools.accumulate(HOURS))
    first = dice.sample(range(workspaces), workspaces)
    uploads: list[Upload] = []
    while images > 0:
        size = min(images, dice.choices(list(SIZES), list(SIZES.values()))[0])
        whose = first.pop() if first else dice.choices(range(workspaces), cum_weights=busy)[0]
        at = (dice.choices(range(24), cum_weights=hours)[0] + dice.random()) * 3600
        uploads.append(Upload(at, whose, size))
        images -= size
    return sorted(uploads, key=lambda upload: upload.at)
