"""Does the scheduler's work, more often than pg_cron would."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import psycopg


@contextlib.asynccontextmanager
async def ticking(tick: Callable[[], Awaitable[object]], seconds: float) -> AsyncIterator[None]:
    """Calls ``tick`` repeatedly, with pauses of ``seconds``. Errors of the database are expected here."""

    async def forever() -> None:
        while True:
            with contextlib.suppress(psycopg.Error):
                await tick()
            await asyncio.sleep(seconds)

    task = asyncio.create_task(forever())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
