"""The lane of batches: claims, polls, and has them submitted and harvested.

A batch is in a worker's hands twice: until OpenAI has it (`submit`), and when OpenAI is done with it (`harvest`). In
between it is a row that a poll looks at (`poll`).
"""

from __future__ import annotations

import asyncio

import psycopg
import structlog

from autotag.db import Batch, Database, DatabaseSettings, NotHeld
from autotag.errors import TaggingError
from autotag.images.load import Images
from autotag.observability.metrics import BATCH_SECONDS, IN_FLIGHT, timed
from autotag.openai.errors import classify_batch_error
from autotag.openai.provider import Provider
from autotag.redact import safe_message
from autotag.worker.files import Files
from autotag.worker.harvest import Harvester
from autotag.worker.poll import Poller
from autotag.worker.submit import Submitter
from autotag.worker.wake import Wake

CLAIM_RETRY = 1.0  # seconds after a claim that failed

log = structlog.get_logger(__name__)


class BatchLane:
    """The lane of one worker."""

    def __init__(
        self,
        db: Database,
        wake: Wake,
        images: Images,
        provider: Provider,
        *,
        slots: int,
        fetches: int,
    ) -> None:
        """
        Args:
            db: the database.
            wake: what wakes the lane.
            images: where pictures come from.
            provider: who gets the batches.
            slots: batches in hand at the same time.
            fetches: images that are fetched at the same time.
        """
        self._db = db
        self._wake = wake
        files = Files(db, provider)
        self._submitter = Submitter(db, images, provider, files, fetches=fetches)
        self._poller = Poller(db, provider, files)
        self._harvester = Harvester(db, provider, files)
        self._slots = slots
        self._hands: dict[asyncio.Task[None], Batch] = {}
        IN_FLIGHT.labels("batch").set_function(lambda: len(self._hands))

    async def run(self, deadline: float) -> None:
        """Until the worker stops; then at most ``deadline`` seconds more for what is in hand."""
        polling: asyncio.Task[None] | None = None
        while not self._wake.stop.is_set():
            try:
                claim = await self._db.claim_batches(self._slots - len(self._hands))
            except psycopg.Error as error:
                log.error("claim_batches_failed", error=safe_message(error))
                await self._wake.pause(CLAIM_RETRY)
                await self._db.release_unacknowledged(batches=[batch.batch for batch in self._hands.values()])
                continue
            for batch in claim.batches:
                task = asyncio.create_task(self._work(batch, claim.settings))
                self._hands[task] = batch
                task.add_done_callback(self._free_hand)
            if (claim.poll or claim.files or claim.look_up) and (polling is None or polling.done()):
                polling = asyncio.create_task(self._poller.look(claim))
            full = len(self._hands) >= self._slots
            await self._wake.wait("batch", None if full else claim.wait)
        if polling:
            polling.cancel()
        if self._hands:
            await asyncio.wait(self._hands, timeout=deadline)
            rest = list(self._hands)
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

    def _free_hand(self, task: asyncio.Task[None]) -> None:
        self._hands.pop(task)
        self._wake.notify("batch")

    async def _work(self, batch: Batch, settings: DatabaseSettings) -> None:
        """Takes one batch as far as it goes now; trouble is reported to the database, which decides."""
        logger = log.bind(batch=batch.batch, openai_batch=batch.openai_batch_id)
        try:
            if batch.state == "harvesting":
                with timed(BATCH_SECONDS, "harvest"):
                    await self._harvester.harvest(batch, settings)
                logger.info("batch_harvested")
            else:
                with timed(BATCH_SECONDS, "submit"):
                    await self._submitter.submit(batch, settings)
        except NotHeld:
            logger.warning("batch_not_held")
        except TaggingError as error:
            trouble = classify_batch_error(error)
            logger.error("report_batch_failure", kind=trouble.kind, code=trouble.code, message=trouble.message)
            await self._report_trouble(batch, trouble)
        except Exception as error:
            # A defect of ours, or a disk that is full: the batch goes back and is tried again, with delays
            # that grow, instead of staying in a hand that will never move.
            logger.exception("batch_failed")
            await self._report_trouble(batch, TaggingError("transient", "internal_error", type(error).__name__))

    async def _report_trouble(self, batch: Batch, error: TaggingError) -> None:
        try:
            await self._db.report_batch_failure(batch, error.as_json())
        except NotHeld:
            log.warning("batch_not_held", batch=batch.batch)
