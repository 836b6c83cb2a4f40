"""Counts which tags the images of a library have (``autotag vocabulary import --from-tags``)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from autotag.db import Operator

PAGE = 2000  # images; reading them takes about 50 ms


async def count_tags(
    operator: Operator, workspace: str | None, on_progress: Callable[[int, int], None]
) -> Counter[str]:
    """The tags of all images, each with the number of images that have it.

    Args:
        operator: the database.
        workspace: the workspace's id; None: all workspaces.
        on_progress: called after every page with the number of images and of different tags.
    """
    counts: Counter[str] = Counter()
    images = 0
    last: str | int | None = None
    while True:
        page = await operator.tags_in_use(workspace, last, PAGE)
        if page["last"] is None:
            return counts
        counts.update(page["tags"])
        images += page["images"]
        last = page["last"]
        on_progress(images, len(counts))
