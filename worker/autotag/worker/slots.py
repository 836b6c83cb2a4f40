"""The slots of the batch lane."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from autotag.db import Busy, Lost, TooSlow
from autotag.redact import safe_message
from autotag.worker.wake import Wake

BUSY_DELAY = 0.5  # seconds until a batch that was busy is tried again; doubles each time
MAX_BUSY_DELAY = 30.0  # seconds

T = TypeVar("T")

log = structlog.get_logger(__name__)


class BatchSlots:
    """Limits the batches that are built or harvested concurrently. While another transaction has locked a batch's rows,
    the batch gives up its slot, so that other batches can use it."""

    def __init__(self, wake: Wake, slots: int) -> None:
        """
        Args:
            wake: wakes the batch lane when a slot is free.
            slots: max batches that are built or harvested concurrently.
        """
        self._wake = wake
        self._turns = asyncio.Semaphore(slots)
        self._free = slots

    @property
    def free(self) -> int:
        """How many batches to claim now."""
        return max(0, self._free)

    def take(self) -> None:
        """Counts a claimed batch."""
        self._free -= 1

    def leave(self) -> None:
        """Notes that this worker is done with a batch."""
        self._free += 1
        self._wake.notify("batch")

    async def __aenter__(self) -> None:
        """Waits for a slot: a batch that was busy may have taken it back."""
        await self._turns.acquire()

    async def __aexit__(self, *_: object) -> None:
        self._turns.release()

    async def retry(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeats a call until the batch is not busy; returns the result. The caller holds a slot, which is free while
        this waits.

        Raises:
            Lost: the call ends its connection each time.
        """
        delay = BUSY_DELAY
        while True:
            try:
                return await call()
            except Lost:
                raise
            except (Busy, TooSlow) as error:
                log.warning("batch_postponed", retry_in=delay, error=safe_message(error))
            self._turns.release()
            self.leave()
            try:
                await asyncio.sleep(delay)
            finally:
                self.take()
                await self._turns.acquire()
            delay = min(2 * delay, MAX_BUSY_DELAY)
