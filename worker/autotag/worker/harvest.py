"""Harvests batches that have ended: stores their answers, and deletes their files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

import psycopg
import structlog

from autotag.db import Batch, Database, DatabaseSettings, TooSlow
from autotag.db.messages import BatchAnswer
from autotag.errors import TaggingError
from autotag.observability.metrics import count_answers
from autotag.openai.output import read_line
from autotag.openai.prompt import max_tags, may_be_empty
from autotag.openai.provider import Provider
from autotag.redact import safe_message
from autotag.worker.files import Files
from autotag.worker.notices import log_notices
from autotag.worker.slots import BatchSlots

#: If this many single answers cannot be stored in any form, and no other answer was stored, give up on the rest
MAX_LOST = 5
MAX_ANSWERS = 1000  # answers stored in one call; with 500, each answer takes 6 µs longer

#: Exceptions that the contents of a report can cause. The last two mean that it cannot be sent as JSON.
REPORT_ERRORS = (psycopg.Error, TypeError, ValueError)

log = structlog.get_logger(__name__)


class Harvester:
    """Stores the answers of batches that have ended."""

    def __init__(self, db: Database, provider: Provider, files: Files, slots: BatchSlots) -> None:
        self._db = db
        self._provider = provider
        self._files = files
        self._slots = slots

    async def harvest(self, batch: Batch, settings: DatabaseSettings) -> None:
        """Stores all answers of a batch, finishes it, and deletes its files.

        If the batch is busy, the whole harvest is repeated later. That is safe: the provider keeps the answers, and
        storing an answer twice changes nothing. Waiting in the middle of a file would keep the download open.

        Raises:
            TaggingError: a file could not be read.
            NotHeld: another worker holds the batch now.
        """
        await self._slots.retry(lambda: self._store_files(batch, settings))
        await self._slots.retry(lambda: self._db.batch_finish(batch))
        # If this worker ends here, the next poll deletes the files.
        await self._files.delete([f for f in (batch.input_file_id, batch.output_file_id, batch.error_file_id) if f])

    async def _store_files(self, batch: Batch, settings: DatabaseSettings) -> None:
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id:
                await self._store(batch, settings, file_id)

    async def _store(self, batch: Batch, settings: DatabaseSettings, file_id: str) -> None:
        """Stores a file's answers page by page. One page is stored while the next is read."""
        storing: asyncio.Task[bool] | None = None
        slow = False
        try:
            async with aclosing(self._answers(batch, settings, file_id)) as pages:
                async for page in pages:
                    if storing:
                        slow = await storing
                    storing = asyncio.create_task(self._store_page(batch, page, slow))
            if storing:
                await storing
        finally:
            if storing:
                storing.cancel()
                await asyncio.gather(storing, return_exceptions=True)

    async def _store_page(self, batch: Batch, page: list[BatchAnswer], slow: bool) -> bool:
        slow = await store_answers(self._db, batch, page, slow)
        count_answers("batch", page)
        return slow

    async def _answers(
        self, batch: Batch, settings: DatabaseSettings, file_id: str
    ) -> AsyncGenerator[list[BatchAnswer], None]:
        """Yields pages of a file's answers for ``autotag.batch_answers``. Logs the number of unreadable lines."""
        brief = await self._db.briefs.get(batch.brief)
        most, fields = max_tags(settings.question, brief), brief.fields if brief else ()
        page: list[BatchAnswer] = []
        unreadable = 0
        async with aclosing(self._provider.read_file(file_id)) as lines:
            async for line in lines:
                answer = read_line(line, most, fields, may_be_empty=may_be_empty(brief))
                if answer is None:
                    unreadable += 1
                    continue
                page.append(answer)
                if len(page) >= MAX_ANSWERS:
                    yield page
                    page = []
        if page:
            yield page
        if unreadable:
            log.warning("batch_lines_not_read", batch=batch.batch, file=file_id, lines=unreadable)


async def store_answers(db: Database, batch: Batch, answers: list[BatchAnswer], slow: bool = False) -> bool:
    """Stores answers of a batch. If the host's rows are slow, the answers are kept for the store lane.

    Args:
        db: the database.
        batch: the batch, which the worker holds.
        answers: of its images.
        slow: the rows were slow before.

    Returns:
        Whether the rows are slow.

    A bad answer fails only its own image. If a call raises an error, its answers are stored in halves, down to the bad
    answer alone, which is replaced by an error of its image. If that cannot be stored either, the image stays without
    an answer, unless nothing at all could be stored.

    Raises:
        Busy, TooSlow: another transaction holds the batch; nothing was stored.
        psycopg.Error, TypeError, ValueError: no answer could be stored.
    """
    lost: list[Exception] = []
    stored, slow = await _store_parts(db, batch, answers, slow, lost)
    if lost and not stored:
        raise lost[0]
    return slow


async def _store_parts(
    db: Database, batch: Batch, answers: list[BatchAnswer], slow: bool, lost: list[Exception]
) -> tuple[bool, bool]:
    """Stores answers, if necessary in parts. Returns whether any were stored, and whether the rows are slow. Adds to
    ``lost`` the errors of answers that could not even be stored as errors of their images."""
    try:
        return True, await _store_together(db, batch, answers, slow)
    except REPORT_ERRORS as error:
        log.error("answers_not_stored", batch=batch.batch, images=len(answers), error=safe_message(error))
    if len(answers) == 1:
        try:
            return True, await _store_together(db, batch, [_lost_outcome(answers[0])], slow)
        except REPORT_ERRORS as error:
            log.error("report_dropped", task=answers[0]["task"], error=safe_message(error))
            lost.append(error)
            return False, slow
    half = len(answers) // 2
    stored = False
    for part in (answers[:half], answers[half:]):
        if stored or len(lost) < MAX_LOST:
            done, slow = await _store_parts(db, batch, part, slow, lost)
            stored = stored or done
    return stored, slow


def _lost_outcome(answer: BatchAnswer) -> BatchAnswer:
    """The error that replaces an answer which cannot be stored; the same as for single calls."""
    error = TaggingError("transient", "internal_error", "The outcome of this image could not be stored.")
    return {"task": answer["task"], "error": error.as_json()}


async def _store_together(db: Database, batch: Batch, answers: list[BatchAnswer], slow: bool) -> bool:
    """Stores answers in one call; returns whether the rows are slow."""
    try:
        stored = await db.batch_answers(batch, answers, keep=slow)
    except TooSlow:
        if slow:
            raise
        log.warning("batch_slowed", batch=batch.batch, images=len(answers))
        slow = True
        stored = await db.batch_answers(batch, answers, keep=True)
    log_notices(stored.notices)
    return slow
