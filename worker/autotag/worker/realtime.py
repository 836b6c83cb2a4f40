"""The lane of single calls: claims images and has them tagged."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import psycopg
import structlog

from autotag.db import Database, DatabaseSettings, Image
from autotag.observability.metrics import CLAIMED, CLAIMS, IN_FLIGHT, SECONDS
from autotag.redact import safe_message
from autotag.worker.wake import Wake

RECLAIM_DELAY = 0.05  # seconds that freed hands gather before the next claim, when all were full …
RECLAIM_SHARE = 4  # … unless one in so many of them is free earlier
CLAIM_RETRY = 1.0  # seconds after a claim that failed

log = structlog.get_logger(__name__)


async def run(
    db: Database,
    wake: Wake,
    slots: int,
    tag_image: Callable[[Image, DatabaseSettings], Coroutine[Any, Any, None]],
    deadline: float,
) -> None:
    """The lane, until the worker stops.

    Args:
        db: the database.
        wake: what wakes the lane.
        slots: images in hand at the same time.
        tag_image: tags an image and reports what came of it (`Tagger.tag`).
        deadline: seconds that what is in hand may still take when the worker stops.
    """
    hands = Hands(wake, slots)
    bound: str | None = None
    while not wake.stop.is_set():
        free = slots - len(hands.busy)
        wait: float | None = None
        if free > 0:
            try:
                claim = await db.claim(free)
                wait = claim.wait
                CLAIMS.labels(claim.bound or "nothing").inc()
                if claim.bound == "superseded" != bound:
                    log.warning(
                        "other_workers_are_asked",
                        hint="Workers with another OPENAI_BASE_URL or OPENAI_API_KEY are there. This one gets nothing "
                        "while they are and nothing is wrong with theirs.",
                    )
                bound = claim.bound
            except psycopg.Error as error:
                log.error("claim_failed", error=safe_message(error))
                await wake.pause(CLAIM_RETRY)
                await db.release_unacknowledged(tasks=[image.task for image in hands.busy.values()])
                continue
            CLAIMED.inc(len(claim.images))
            for image in claim.images:
                hands.take(image, tag_image(image, claim.settings))
        await hands.wait(wait)
    await hands.finish(deadline)


class Hands:
    """What a worker tags at the moment; so many images at most."""

    def __init__(self, wake: Wake, slots: int) -> None:
        self.busy: dict[asyncio.Task[None], Image] = {}
        self._wake, self._slots = wake, slots
        self._full = False
        self._gathering: asyncio.TimerHandle | None = None
        self._waited = SECONDS.labels("waited")
        IN_FLIGHT.labels("realtime").set_function(lambda: len(self.busy))

    def take(self, image: Image, tagging: Coroutine[Any, Any, None]) -> None:
        self._waited.observe(image.waited)
        task = asyncio.create_task(tagging)
        self.busy[task] = image
        task.add_done_callback(self._free)

    def _free(self, task: asyncio.Task[None]) -> None:
        self.busy.pop(task)
        if self._full and (self._slots - len(self.busy)) * RECLAIM_SHARE >= self._slots:
            self._full = False
            self._wake.notify("realtime")
        elif self._full and self._gathering is None:
            loop = asyncio.get_running_loop()
            self._gathering = loop.call_later(RECLAIM_DELAY, self._wake.notify, "realtime")

    async def wait(self, seconds: float | None) -> None:
        """Until it is worth claiming again; when all hands are full, until some are free."""
        self._full = len(self.busy) >= self._slots
        await self._wake.wait("realtime", None if self._full else seconds)  # full: a free hand wakes us
        if self._gathering:
            self._gathering.cancel()
            self._gathering = None

    async def finish(self, deadline: float) -> None:
        if not self.busy:
            return
        log.info("finishing", images=len(self.busy), deadline=deadline)
        await asyncio.wait(self.busy, timeout=deadline)
        rest = list(self.busy)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
