"""The lane of single calls: claims images and tags them."""

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

RECLAIM_DELAY = 0.05  # seconds from the first free slot to the next claim, if all slots were busy …
RECLAIM_SHARE = 4  # … or earlier, when one in RECLAIM_SHARE slots is free
CLAIM_RETRY = 1.0  # seconds to wait after a failed claim

log = structlog.get_logger(__name__)


async def run(
    db: Database,
    wake: Wake,
    slots: int,
    tag_image: Callable[[Image, DatabaseSettings], Coroutine[Any, Any, None]],
    deadline: float,
) -> None:
    """Runs the lane until the worker stops.

    Args:
        db: the database.
        wake: wakes the lane.
        slots: max single calls in flight.
        tag_image: tags an image and reports the outcome (`Tagger.tag`).
        deadline: seconds that calls in flight have to finish when the worker stops.
    """
    calls = Slots(wake, slots)
    bound: str | None = None
    while not wake.stop.is_set():
        free = slots - len(calls.busy)
        wait: float | None = None
        if free > 0:
            try:
                claim = await db.claim(free)
                wait = claim.wait
                CLAIMS.labels(claim.bound or "nothing").inc()
                if claim.bound == "superseded" != bound:
                    log.warning(
                        "worker_superseded",
                        hint="Another worker has another OPENAI_BASE_URL or OPENAI_API_KEY. This worker gets no images "
                        "while that one runs and its key works.",
                    )
                bound = claim.bound
            except psycopg.Error as error:
                log.error("claim_failed", error=safe_message(error))
                await wake.pause(CLAIM_RETRY)
                await db.release_unacknowledged(tasks=[image.task for image in calls.busy.values()])
                continue
            CLAIMED.inc(len(claim.images))
            for image in claim.images:
                calls.start(image, tag_image(image, claim.settings))
        await calls.wait(wait)
    await calls.finish(deadline)


class Slots:
    """The single calls in flight of one worker, and when to claim more."""

    def __init__(self, wake: Wake, slots: int) -> None:
        self.busy: dict[asyncio.Task[None], Image] = {}
        self._wake, self._slots = wake, slots
        self._full = False
        self._timer: asyncio.TimerHandle | None = None
        self._waited = SECONDS.labels("waited")
        IN_FLIGHT.labels("realtime").set_function(lambda: len(self.busy))

    def start(self, image: Image, tagging: Coroutine[Any, Any, None]) -> None:
        """Starts a single call in a free slot."""
        self._waited.observe(image.waited)
        task = asyncio.create_task(tagging)
        self.busy[task] = image
        task.add_done_callback(self._free)

    def _free(self, task: asyncio.Task[None]) -> None:
        self.busy.pop(task)
        if self._full and (self._slots - len(self.busy)) * RECLAIM_SHARE >= self._slots:
            self._full = False
            self._wake.notify("realtime")
        elif self._full and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(RECLAIM_DELAY, self._wake.notify, "realtime")

    async def wait(self, seconds: float | None) -> None:
        """Waits until the next claim: ``seconds``, a notification, or free slots if all are busy."""
        self._full = len(self.busy) >= self._slots
        await self._wake.wait(
            "realtime", None if self._full else seconds
        )  # if all are busy, a free slot wakes the lane
        if self._timer:
            self._timer.cancel()
            self._timer = None

    async def finish(self, deadline: float) -> None:
        """Waits for the calls in flight, at most ``deadline`` seconds; then cancels the rest."""
        if not self.busy:
            return
        log.info("shutdown_started", images=len(self.busy), deadline=deadline)
        await asyncio.wait(self.busy, timeout=deadline)
        unfinished = list(self.busy)
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
