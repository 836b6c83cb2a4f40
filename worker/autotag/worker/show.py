"""Shows the stages of batches on their images."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

import structlog

from autotag.db import CALL_ERRORS, Database, TooSlow
from autotag.redact import safe_message

PAGE_SIZE = 500  # images per call of show_batch

log = structlog.get_logger(__name__)


class BatchStages:
    """Shows that batches were submitted or are being processed, one after the other. Best effort, like `Stages`."""

    def __init__(self, db: Database, follow_up: Callable[[None], None]) -> None:
        """follow_up: of `Stages`."""
        self._db = db
        self._follow_up = follow_up
        self._waiting: dict[str, None] = {}  # batches in order
        self._showing: asyncio.Task[None] | None = None

    def show(self, batches: Iterable[str]) -> None:
        """Shows the present stage of batches; returns at once."""
        self._waiting |= dict.fromkeys(batches)
        if self._waiting and (self._showing is None or self._showing.done()):
            self._showing = asyncio.create_task(self._show_all())

    async def stop(self) -> None:
        """Drops the rest."""
        if self._showing:
            self._showing.cancel()
            await asyncio.gather(self._showing, return_exceptions=True)

    async def _show_all(self) -> None:
        while self._waiting:
            batch = next(iter(self._waiting))
            del self._waiting[batch]
            last: int | None = 0
            try:
                while last is not None:
                    last = await self._db.show_batch(batch, last, PAGE_SIZE)
            except TooSlow:
                log.info("batch_stage_not_shown", batch=batch)
            except CALL_ERRORS as error:  # best effort: the images' outcomes say more
                log.warning("batch_stage_not_shown", batch=batch, error=safe_message(error))
            self._follow_up(None)
