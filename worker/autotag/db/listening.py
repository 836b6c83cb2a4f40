"""Notifications: whether they arrive, and handing them on."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import structlog
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from autotag.redact import safe_message

MAX_RETRY_DELAY = 5.0  # seconds between tries while the database is away
CONNECT_TIMEOUT = 30.0  # seconds that the database may be out of reach when a worker starts
LISTEN_PROOF = 5.0  # seconds that a notification of our own may take to arrive
#: A peer that is gone without a word is noticed within a minute (milliseconds where libpq says so).
KEEPALIVES: dict[str, Any] = {
    "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000,
}  # fmt: skip
CHANNEL = "autotag"

log = structlog.get_logger(__name__)


async def can_listen(url: str) -> bool:
    """Whether a notification reaches a connection that listens; behind a transaction pooler none does.

    The notification comes from a second connection: on a pooler the first one would find itself told by the
    server connection that both statements happened to share.

    Raises:
        psycopg.OperationalError: the database could not be reached for half a minute.
    """
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(psycopg.OperationalError),
        wait=wait_random_exponential(0.1, max=MAX_RETRY_DELAY), stop=stop_after_delay(CONNECT_TIMEOUT), reraise=True,
    ):  # fmt: skip
        with attempt:
            return await _prove_listening(url)
    raise AssertionError("unreachable: it returns or raises")


async def _prove_listening(url: str) -> bool:
    async with await _connect(url) as listener, await _connect(url) as other:
        await listener.execute(f"listen {CHANNEL}")
        proof = f"hello {uuid.uuid4()}"
        await other.execute("select pg_notify(%s, %s)", (CHANNEL, proof))
        async for note in listener.notifies(timeout=LISTEN_PROOF):
            if note.payload == proof:
                return True
    return False


async def _connect(url: str) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(
        url, autocommit=True, application_name="autotag listen", prepare_threshold=None, **KEEPALIVES
    )


async def listen(url: str, on_wake: Callable[[str], None]) -> None:
    """Hands every notification to ``on_wake`` until cancelled; reconnects when the connection breaks.

    After each (re)connect one wake of everything follows, because what was notified meanwhile is lost.
    """
    delay = 0.1
    while True:
        try:
            async with await _connect(url) as connection:
                await connection.execute(f"listen {CHANNEL}")
                on_wake("")
                delay = 0.1
                async for note in connection.notifies():
                    on_wake(note.payload)
        except psycopg.OperationalError as error:
            log.warning("listen_lost", error=safe_message(error), retry_in=delay)
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)
