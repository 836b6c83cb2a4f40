"""Draws the uploads of a day from a seed: time, workspace and number of images."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

DAY = 86_400.0  # seconds
#: uploads by hour from midnight: high during working hours, a peak in the afternoon, a lower one in the evening
HOURS = (1, 1, 1, 1, 1, 2, 3, 5, 8, 10, 11, 10, 8, 9, 12, 15, 12, 9, 7, 8, 9, 7, 4, 2)
PEAK = HOURS.index(max(HOURS))
#: images of an upload -> percent of the uploads
SIZES = {1: 22, 3: 26, 5: 12, 15: 18, 40: 12, 120: 6, 300: 3, 1000: 1}
SKEW = 0.6  # the n-th busiest workspace uploads 1 / n ** SKEW as often as the busiest


@dataclass(frozen=True, slots=True)
class Upload:
    """One click on "upload"."""

    at: float  # seconds of the day
    workspace: int
    images: int


def draw_day(images: int, workspaces: int, seed: int = 1) -> list[Upload]:
    """Uploads with ``images`` images in total, ordered by time. Each workspace has one if there are enough images."""
    rng = random.Random(seed)
    busy = list(itertools.accumulate((rank + 1) ** -SKEW for rank in range(workspaces)))
    hours = list(itertools.accumulate(HOURS))
    unseen = rng.sample(range(workspaces), workspaces)
    uploads: list[Upload] = []
    while images > 0:
        size = min(images, rng.choices(list(SIZES), list(SIZES.values()))[0])
        workspace = unseen.pop() if unseen else rng.choices(range(workspaces), cum_weights=busy)[0]
        at = (rng.choices(range(24), cum_weights=hours)[0] + rng.random()) * 3600
        uploads.append(Upload(at, workspace, size))
        images -= size
    return sorted(uploads, key=lambda upload: upload.at)
