"""The batch lane: claims batches, submits and harvests them, and polls.

A worker holds a batch twice: until it is created at OpenAI (`submit`), and after it has ended (`harvest`). In between,
polls check it (`poll`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import psycopg
import structlog

from autotag.db import Batch, Database, DatabaseSettings, Lost, NotHeld
from autotag.errors import TaggingError
from autotag.images.load import Images
from autotag.observability.metrics import BATCH_SECONDS, IN_FLIGHT, timed
from autotag.openai.errors import classify_batch_error
from autotag.openai.provider import Provider
from autotag.redact import safe_message
from autotag.worker.claims import Claims
from autotag.worker.files import Files
from autotag.worker.harvest import Harvester
from autotag.worker.poll import Poller
from autotag.worker.show import BatchStages
from autotag.worker.slots import BatchSlots
from autotag.worker.submit import Submitter
from autotag.worker.wake import Wake

CLAIM_RETRY = 1.0  # seconds to wait after a failed claim

log = structlog.get_logger(__name__)


class BatchLane:
    """The batch lane of one worker."""

    def __init__(
        self,
        db: Database,
        wake: Wake,
        claims: Claims,
        images: Images,
        provider: Provider,
        *,
        slots: int,
        fetches: int,
        follow_up: Callable[[None], None],
    ) -> None:
        """
        Args:
            db: the database.
            wake: wakes the lane.
            claims: numbers the claims.
            images: loads the images.
            provider: runs the batches.
            slots: max batches that are built or harvested concurrently.
            fetches: max images that are fetched concurrently, for all batches.
            follow_up: see `Stages.follow_up`.
        """
        self._db = db
        self._wake = wake
        self._claims = claims
        self._slots = BatchSlots(wake, slots)
        self._follow_up = follow_up
        self._stages = BatchStages(db, follow_up)
        files = Files(db, provider)
        self._submitter = Submitter(db, images, provider, files, self._slots, self._stages, fetches=fetches)
        self._poller = Poller(db, provider, files, self._stages)
        self._harvester = Harvester(db, provider, files, self._slots)
        self._running: dict[asyncio.Task[None], int] = {}  # each with the number of its batch's claim
        self._cancelling: set[asyncio.Task[None]] = set()
        IN_FLIGHT.labels("batch").set_function(lambda: len(self._running))

    async def run(self, deadline: float) -> None:
        """Runs until the worker stops. Batches in progress then have ``deadline`` seconds to finish."""
        polling: asyncio.Task[None] | None = None
        while not self._wake.stop.is_set():
            number, free = self._claims.number(), self._slots.free
            try:
                claim = await self._db.claim_batches(number, free)
            except psycopg.Error as error:
                log.error("claim_batches_failed", error=safe_message(error))
                await self._wake.pause(CLAIM_RETRY)
                continue
            self._claims.receive(len(claim.batches))
            for batch in claim.batches:
                self._slots.take()
                task = asyncio.create_task(self._work(batch, claim.settings))
                self._running[task] = number
                task.add_done_callback(self._end)
            if claim.cancel:
                cancelling = asyncio.create_task(self._poller.cancel(claim.cancel))
                self._cancelling.add(cancelling)
                cancelling.add_done_callback(self._cancelling.discard)
            if (claim.poll or claim.files or claim.unrecorded or claim.look_up) and (polling is None or polling.done()):
                polling = asyncio.create_task(self._poller.poll(claim))
            await self._wake.wait("batch", claim.wait if self._slots.free else None)
        for task in (*self._cancelling, *([polling] if polling else [])):
            task.cancel()
        if self._running:
            await asyncio.wait(self._running, timeout=deadline)
            unfinished = list(self._running)
            for task in unfinished:
                task.cancel()
            await asyncio.gather(*unfinished, return_exceptions=True)
        await self._stages.stop()

    def _end(self, task: asyncio.Task[None]) -> None:
        self._claims.drop(self._running.pop(task))
        self._slots.leave()

    async def _work(self, batch: Batch, settings: DatabaseSettings) -> None:
        """Submits or harvests one batch. Errors are reported to the database, which decides what follows."""
        async with self._slots:
            await self._do(batch, settings)

    async def _do(self, batch: Batch, settings: DatabaseSettings) -> None:
        logger = log.bind(batch=batch.batch, openai_batch=batch.openai_batch_id)
        try:
            if batch.state == "harvesting":
                with timed(BATCH_SECONDS, "harvest"):
                    await self._harvester.harvest(batch, settings)
                self._follow_up(None)
                logger.info("batch_harvested")
            else:
                with timed(BATCH_SECONDS, "submit"):
                    await self._submitter.submit(batch, settings)
        except NotHeld:
            logger.warning("batch_not_held")
        except TaggingError as error:
            failure = classify_batch_error(error)
            logger.error("batch_step_failed", kind=failure.kind, code=failure.code, message=failure.message)
            await self._report_failure(batch, failure)
        except Exception as error:
            # A bug, a full disk, or a row that ends the session. Report it, so that the batch is retried with backoff
            # instead of staying claimed until the worker ends.
            logger.exception("batch_failed")
            await self._report_failure(batch, TaggingError("transient", "internal_error", type(error).__name__))

    async def _report_failure(self, batch: Batch, error: TaggingError) -> None:
        try:
            await self._slots.retry(lambda: self._db.report_batch_failure(batch, error.as_json()))
        except NotHeld:
            log.warning("batch_not_held", batch=batch.batch)
        except (psycopg.Error, Lost) as problem:
            # The next heartbeat will not list the batch, so the database takes it back.
            log.error("failure_not_reported", batch=batch.batch, error=safe_message(problem))
