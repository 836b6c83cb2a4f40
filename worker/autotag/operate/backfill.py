"""Enqueues existing images in slices (``autotag enqueue``)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from autotag.db import Operator, Refused

SLICE = 1000  # images in one upload: enough for several batches, and few enough to show progress
MAX_WAIT = 60.0  # seconds between tries while the workspace has no room for more live images


@dataclass
class Backfill:
    """What has been enqueued so far.

    Attributes:
        images: number of images.
        jobs: number of uploads that hold them.
        last: id of the last image; a later run continues after it (``--after``). None: no image yet.
    """

    images: int = 0
    jobs: int = 0
    last: str | None = None


async def backfill(
    operator: Operator, workspace: str, *, untagged: bool, outdated: bool = False, after: str | None, limit: int,
    on_progress: Callable[[Backfill, str | None], None],
) -> Backfill:  # fmt: skip
    """Enqueues up to ``limit`` images of a workspace. Waits while the workspace's limits have no room.

    Args:
        operator: the database.
        workspace: the workspace's id.
        untagged: skip images that have tags.
        outdated: skip images that were tagged with the current version of the profile, and those not tagged by autotag.
        after: id of the last image that an earlier run enqueued; None: start with the first image.
        limit: maximum number of images.
        on_progress: called after every slice with the totals and None, and before every wait with the totals and the
            reason.

    Returns:
        The totals.

    Raises:
        Refused: the database refuses, and waiting does not help.
    """
    done = Backfill(last=after)
    while done.images < limit:
        try:
            size = min(SLICE, limit - done.images)
            part = await operator.backfill(workspace, untagged, done.last, size, outdated=outdated)
        except Refused as refused:
            if refused.retry_after is None:
                raise
            on_progress(done, str(refused))
            await asyncio.sleep(min(refused.retry_after, MAX_WAIT))
            continue
        if part["last"] is None:
            break
        done.images += part["images"]
        done.jobs += part["job_id"] is not None and part["images"] > 0
        done.last = part["last"]
        on_progress(done, None)
    return done
