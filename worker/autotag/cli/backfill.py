"""Existing images brought in, slice by slice (``autotag enqueue``)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from autotag.db import Operator, Refused

SLICE = 1000  # images of one upload: large enough for several batches, small enough to show progress
LONGEST_WAIT = 60.0  # seconds between tries while the database has no room for more


@dataclass
class Backfill:
    """What was done so far; ``last`` is where to go on (``--after``)."""

    images: int = 0
    jobs: int = 0
    last: str | None = None


async def backfill(
    operator: Operator, workspace: str, *, untagged: bool, after: str | None, limit: int,
    told: Callable[[Backfill, str | None], None],
) -> Backfill:  # fmt: skip
    """Enqueues up to ``limit`` images of a workspace; waits where its limits have no room at the moment.

    Args:
        operator: the database.
        workspace: its id.
        untagged: leave out images that have tags.
        after: id of the last image that an earlier run brought in.
        limit: the most images.
        told: hears of every slice, and of every wait (with the reason).

    Raises:
        Refused: for good.
    """
    done = Backfill(last=after)
    while done.images < limit:
        try:
            part = await operator.backfill(workspace, untagged, done.last, min(SLICE, limit - done.images))
        except Refused as refused:
            if refused.retry_after is None:
                raise
            told(done, str(refused))
            await asyncio.sleep(min(refused.retry_after, LONGEST_WAIT))
            continue
        if part["last"] is None:
            break
        done.images += part["images"]
        done.jobs += part["job_id"] is not None and part["images"] > 0
        done.last = part["last"]
        told(done, None)
    return done
