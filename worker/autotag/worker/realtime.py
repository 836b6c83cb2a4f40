"""The lane of single calls: claims images, reads their descriptions, and tags them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import psycopg
import structlog

from autotag.db import CALL_ERRORS, Claim, Database, DatabaseSettings, Image, Lost
from autotag.observability.metrics import CLAIMED, CLAIMS, IN_FLIGHT, SECONDS
from autotag.redact import safe_message
from autotag.waits import backoff
from autotag.worker.claims import Claims
from autotag.worker.stages import Stages
from autotag.worker.wake import Wake

RECLAIM_DELAY = 0.05  # seconds from the first free slot to the next claim, if all slots were busy
RECLAIM_SHARE = 4  # the next claim comes earlier if one in this many slots is free
CLAIM_RETRY = 1.0  # seconds to wait after a failed claim
DESCRIBE_RETRY = 0.5  # seconds to wait after a failed call of describe_tasks; doubles each time
MAX_DESCRIBE_RETRY = 10.0  # seconds
#: After this many failures, each half of the images is described in a call of its own, without a wait
WHOLE_DESCRIPTIONS = 3
UNCHECKED = "unchecked"  # `Image.refused`: policies took too long for the other images; ask again

log = structlog.get_logger(__name__)

TagImage = Callable[[Image, DatabaseSettings], Coroutine[Any, Any, None]]


async def run(
    db: Database, wake: Wake, claims: Claims, stages: Stages, slots: int, tag_image: TagImage, deadline: float
) -> None:
    """Runs the lane until the worker stops.

    Args:
        db: the database.
        wake: wakes the lane.
        claims: numbers the claims.
        stages: report calls that are dropped.
        slots: max single calls in flight.
        tag_image: tags an image and reports the outcome (`Tagger.tag`).
        deadline: seconds that calls in flight have to finish when the worker stops.
    """
    calls = Slots(wake, slots)
    descriptions = Descriptions(db, claims, stages, calls, tag_image)
    bound: str | None = None
    while not wake.stop.is_set():
        wait: float | None = None
        if calls.free > 0:
            number = claims.number()
            try:
                claim = await db.claim(number, calls.free)
            except psycopg.Error as error:
                log.error("claim_failed", error=safe_message(error))
                await wake.pause(CLAIM_RETRY)
                continue
            claims.receive(len(claim.tasks))
            wait = claim.wait
            CLAIMS.labels(claim.bound or "nothing").inc()
            if claim.bound == "superseded" != bound:
                log.warning(
                    "worker_superseded",
                    hint="Another worker has another OPENAI_BASE_URL or OPENAI_API_KEY. This worker gets no images "
                    "while that one runs and its key works.",
                )
            bound = claim.bound
            if claim.tasks:
                CLAIMED.inc(len(claim.tasks))
                descriptions.start(number, claim)
        await calls.wait(wait)
    descriptions.cancel()
    await calls.finish(deadline)


class Slots:
    """The single calls in flight of one worker. Decides when to claim more."""

    def __init__(self, wake: Wake, slots: int) -> None:
        self._busy: set[asyncio.Task[None]] = set()
        self._reserved = 0  # slots for claimed images that are not described yet
        self._wake, self._slots = wake, slots
        self._full = False
        self._timer: asyncio.TimerHandle | None = None
        self._waited = SECONDS.labels("waited")
        IN_FLIGHT.labels("realtime").set_function(lambda: len(self._busy))

    @property
    def free(self) -> int:
        """Free slots."""
        return self._slots - len(self._busy) - self._reserved

    def reserve(self, images: int) -> None:
        """Reserves slots for claimed images."""
        self._reserved += images

    def cancel(self, images: int) -> None:
        """Frees the reserved slots of images that no longer exist."""
        self._reserved -= images
        self._offer()

    def start(self, image: Image, tagging: Coroutine[Any, Any, None]) -> None:
        """Starts a single call in a reserved slot."""
        self._reserved -= 1
        self._waited.observe(image.waited)
        task = asyncio.create_task(tagging)
        self._busy.add(task)
        task.add_done_callback(self._free)

    def _free(self, task: asyncio.Task[None]) -> None:
        self._busy.discard(task)
        self._offer()

    def _offer(self) -> None:
        if self._full and self.free * RECLAIM_SHARE >= self._slots:
            self._full = False
            self._wake.notify("realtime")
        elif self._full and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(RECLAIM_DELAY, self._wake.notify, "realtime")

    async def wait(self, seconds: float | None) -> None:
        """Waits until the next claim: for ``seconds``, for a notification, or for free slots if all are busy."""
        self._full = self.free <= 0
        await self._wake.wait(
            "realtime", None if self._full else seconds
        )  # if all are busy, a free slot wakes the lane
        if self._timer:
            self._timer.cancel()
            self._timer = None

    async def finish(self, deadline: float) -> None:
        """Waits for the calls in flight, at most ``deadline`` seconds; then cancels the rest."""
        if not self._busy:
            return
        log.info("shutdown_started", images=len(self._busy), deadline=deadline)
        await asyncio.wait(self._busy, timeout=deadline)
        unfinished = list(self._busy)
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)


class Descriptions:
    """Reads the descriptions of claimed images (where they are, what to ask), and starts tagging them.

    This reads the host's tables, so a transaction that locks a whole table delays it. Meanwhile the lane continues.
    """

    def __init__(self, db: Database, claims: Claims, stages: Stages, calls: Slots, tag_image: TagImage) -> None:
        self._db, self._claims, self._stages, self._calls, self._tag_image = db, claims, stages, calls, tag_image
        self._running: set[asyncio.Task[None]] = set()

    def start(self, number: int, claim: Claim) -> None:
        """Describes the images of the claim with this number and starts them. Reserves their slots at once."""
        self._calls.reserve(len(claim.tasks))
        task = asyncio.create_task(self._describe(number, claim.tasks, claim.settings))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    def cancel(self) -> None:
        """Drops the images that are not described yet. The database releases them when the lease ends."""
        for task in self._running:
            task.cancel()

    async def _describe(self, number: int, tasks: list[int], settings: DatabaseSettings, failures: int = 0) -> None:
        while True:
            try:
                images = await self._db.describe_tasks(number, tasks)
                break
            except CALL_ERRORS as error:
                failures += 1
                log.error("describe_failed", images=len(tasks), failures=failures, error=safe_message(error))
                lost = isinstance(error, Lost)
            if lost and len(tasks) == 1:
                await self._db.report_unreadable(tasks)
                self._drop(number, 1)
                return
            if len(tasks) == 1 or (failures < WHOLE_DESCRIPTIONS and not lost):
                await asyncio.sleep(backoff(DESCRIBE_RETRY, MAX_DESCRIBE_RETRY, failures))
            else:
                half = len(tasks) // 2
                await asyncio.gather(*(
                    self._describe(number, part, settings, failures) for part in (tasks[:half], tasks[half:])
                ))  # fmt: skip
                return
        unchecked = [image.task for image in images if image.refused == UNCHECKED]
        for image in images:
            if image.refused != UNCHECKED:
                self._calls.start(image, self._tag_image(image, settings))
        missing = len(tasks) - len(images)  # their uploads were cancelled meanwhile
        if missing:
            self._drop(number, missing)
        if unchecked:
            await self._describe(number, unchecked, settings)

    def _drop(self, number: int, images: int) -> None:
        self._claims.drop(number, images)
        self._calls.cancel(images)
        self._stages.drop(images)
