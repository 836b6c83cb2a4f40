"""Shows the stages of batches on their images."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import structlog

from autotag.db import CALL_ERRORS, Busy, Database, TooSlow
from autotag.redact import safe_message
from autotag.waits import backoff

PAGE_SIZE = 500  # images per call of show_batch
RETRY_DELAY = 0.2  # seconds until the next try for an upload whose row is held; doubles each time
MAX_RETRY_DELAY = 30.0  # seconds

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Position:
    """Where to go on with a batch. after: the last task shown. tries: how often in a row the upload's row was held."""

    after: int = 0
    tries: int = 0


class BatchStages:
    """Shows that batches were submitted or are being processed, one batch after another.

    A batch may run for hours. So if another transaction holds the upload's row, it is tried again until the batch is in
    another state or the worker stops. After any other error the rest of the batch is left out: the images' outcomes
    follow.
    """

    def __init__(self, db: Database, follow_up: Callable[[None], None]) -> None:
        """follow_up: see `Stages.follow_up`."""
        self._db = db
        self._follow_up = follow_up
        self._waiting: dict[str, _Position] = {}  # batches in order
        self._delayed: dict[str, asyncio.TimerHandle] = {}
        self._showing: asyncio.Task[None] | None = None

    def show(self, batches: Iterable[str]) -> None:
        """Queues batches whose current stage is to be shown; returns at once."""
        for batch in batches:
            self._queue(batch, _Position())

    async def stop(self) -> None:
        """Drops the batches that are still waiting."""
        self._waiting.clear()
        if self._showing:
            self._showing.cancel()
            await asyncio.gather(self._showing, return_exceptions=True)
        for timer in self._delayed.values():
            timer.cancel()

    def _queue(self, batch: str, position: _Position) -> None:
        timer = self._delayed.pop(batch, None)
        if timer:
            timer.cancel()
        self._waiting[batch] = position
        if self._showing is None or self._showing.done():
            self._showing = asyncio.create_task(self._show_all())

    async def _show_all(self) -> None:
        while self._waiting:
            batch = next(iter(self._waiting))
            left = await self._show(batch, self._waiting.pop(batch))
            if left and batch not in self._waiting:  # otherwise its stage has changed meanwhile
                delay = backoff(RETRY_DELAY, MAX_RETRY_DELAY, left.tries)
                self._delayed[batch] = asyncio.get_running_loop().call_later(delay, self._queue, batch, left)

    async def _show(self, batch: str, position: _Position) -> _Position | None:
        """Shows a batch; returns where to go on later, if the upload's row is held."""
        try:
            while (last := await self._db.show_batch(batch, position.after, PAGE_SIZE)) is not None:
                position = _Position(last)
                self._follow_up(None)
        except Busy:
            return _Position(position.after, position.tries + 1)
        except TooSlow:
            log.info("batch_stage_not_shown", batch=batch)
        except CALL_ERRORS as error:
            log.warning("batch_stage_not_shown", batch=batch, error=safe_message(error))
        except Exception:  # a bug must not delay the other batches
            log.exception("batch_stage_not_shown", batch=batch)
        return None
