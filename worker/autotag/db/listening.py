"""Tests that notifications arrive, and receives them."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable
from typing import Any, TypedDict

import psycopg
import structlog
from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_random_exponential

from autotag.redact import safe_message

MAX_RETRY_DELAY = 5.0  # seconds between retries while the database is unreachable
CONNECT_TIMEOUT = 30.0  # seconds that a starting worker waits for an unreachable database
LISTEN_TEST_TIMEOUT = 5.0  # seconds until the test notification must arrive


class Keepalives(TypedDict):
    """Parameters of libpq."""

    keepalives_idle: int
    keepalives_interval: int
    keepalives_count: int
    tcp_user_timeout: int


#: Detect a lost peer within a minute. Seconds; tcp_user_timeout: milliseconds.
KEEPALIVES = Keepalives(keepalives_idle=30, keepalives_interval=10, keepalives_count=3, tcp_user_timeout=60_000)
CHANNEL = "autotag"

log = structlog.get_logger(__name__)


async def can_listen(url: str) -> bool:
    """Whether notifications arrive. Behind a transaction pooler they do not.

    The test notification is sent from a second connection. A single connection cannot test this: a pooler
    may use the same server connection for LISTEN and NOTIFY, and then the notification arrives by chance.

    Raises:
        psycopg.OperationalError: the database was unreachable for `CONNECT_TIMEOUT` seconds.
    """
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(psycopg.OperationalError),
        wait=wait_random_exponential(0.1, max=MAX_RETRY_DELAY), stop=stop_after_delay(CONNECT_TIMEOUT), reraise=True,
    ):  # fmt: skip
        with attempt:
            return await _test_listen(url)
    raise AssertionError("unreachable: it returns or raises")


async def _test_listen(url: str) -> bool:
    async with await _connect(url) as listener, await _connect(url) as sender:
        await listener.execute(f"listen {CHANNEL}")
        payload = f"hello {uuid.uuid4()}"
        await sender.execute("select pg_notify(%s, %s)", (CHANNEL, payload))
        async for notification in listener.notifies(timeout=LISTEN_TEST_TIMEOUT):
            if notification.payload == payload:
                return True
    return False


async def _connect(url: str) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(
        url, autocommit=True, application_name="autotag listen", prepare_threshold=None, **KEEPALIVES
    )


async def listen(url: str, on_wake: Callable[[str], None]) -> None:
    """Calls ``on_wake`` with the payload of each notification until it is cancelled. Reconnects after a broken
    connection.

    After each connect, it also calls ``on_wake("")``, which wakes all lanes, because earlier notifications are lost.
    """
    delay = 0.1
    while True:
        try:
            async with await _connect(url) as connection:
                await connection.execute(f"listen {CHANNEL}")
                on_wake("")
                delay = 0.1
                async for notification in connection.notifies():
                    on_wake(notification.payload)
        except psycopg.OperationalError as error:
            log.warning("listen_lost", error=safe_message(error), retry_in=delay)
            await asyncio.sleep(delay)
            delay = min(delay * 2, MAX_RETRY_DELAY)
