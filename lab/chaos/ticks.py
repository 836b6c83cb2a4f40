"""The scheduler's part, more often than pg_cron would do it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import psycopg


@contextlib.asynccontextmanager
async def ticking(tick: Callable[[], Awaitable[object]], seconds: float) -> AsyncIterator[None]:
    """Calls ``tick`` all the time, with pauses of ``seconds``. Errors of the database are part of the chaos."""

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
