"""The connections of a worker, divided by purpose, and the retries of its calls."""

from __future__ import annotations

import asyncio
import random
from typing import Any, Literal, TypeVar

import orjson
import psycopg
import structlog
from psycopg.rows import dict_row
from psycopg.types.json import set_json_dumps, set_json_loads
from psycopg_pool import AsyncConnectionPool

from autotag.db.errors import CALL_ERRORS, Busy, Lost, NotHeld, TooSlow, VersionsDiffer, refusal
from autotag.db.listening import KEEPALIVES, MAX_RETRY_DELAY
from autotag.db.readers import Reader, row_value
from autotag.redact import safe_message

Purpose = Literal["lease", "claim", "describe", "settle", "seal", "store", "batch", "stages", "other"]

#: The number of connections that each purpose may use at the same time. A call that writes or reads the host's rows
#: takes as long as the host's triggers and locks take, so no purpose may use the connections of another. Sharing would
#: also be slow: each connection plans the statements of a function once, which takes 0.1 s for a claim.
SHARES: dict[Purpose, int] = {
    "lease": 1, "claim": 1, "describe": 1, "settle": 3, "seal": 1, "store": 2, "batch": 2, "stages": 1, "other": 1,
}  # fmt: skip
#: Triggers, functions and policies of the host's run in the sessions of these purposes. Their callers handle `Busy`,
#: `TooSlow` and `Lost`; the other calls are retried.
FOREIGN_CODE: tuple[Purpose, ...] = ("describe", "settle", "seal", "store", "batch", "stages")
#: These purposes share HOST_SHARE connections, because their calls can wait.
HOST_PURPOSES: tuple[Purpose, ...] = ("store", "batch", "stages")
HOST_SHARE = 3
POOL_SIZE = sum(n for purpose, n in SHARES.items() if purpose not in HOST_PURPOSES) + HOST_SHARE  # 11, if all are busy
FIRST_RETRY_DELAY = 0.2  # max seconds until the first retry; twice as long each time, up to MAX_RETRY_DELAY
MAX_LOSSES = 3  # how often a call may lose a connection that was usable just before, until it raises `Lost`

R = TypeVar("R")

log = structlog.get_logger(__name__)

set_json_dumps(orjson.dumps)
set_json_loads(orjson.loads)


def _log_retry(error: BaseException) -> None:
    log.warning("database_call_retried", error=safe_message(error))


async def _reset(connection: psycopg.AsyncConnection[Any]) -> None:
    """Undoes what the host's code has done to the session: a `statement_timeout`, an advisory lock that it kept because
    an error came in between, a temporary table, a cursor, a `listen`."""
    await connection.execute(
        "reset all; select pg_advisory_unlock_all(); discard temp; close all; unlisten *", prepare=False
    )


class Connections:
    """Pools of connections, which are opened when needed and closed when idle."""

    def __init__(self, url: str, *, prepare: bool = True) -> None:
        """
        Args:
            url: connection URL.
            prepare: use prepared statements (impossible behind a transaction pooler).
        """

        def pool(purpose: Purpose, size: int) -> AsyncConnectionPool:
            return AsyncConnectionPool(
                url,
                min_size=1 if purpose == "lease" else 0,
                max_size=size,
                reset=_reset if purpose in FOREIGN_CODE else None,
                open=False,
                num_workers=1,
                kwargs={
                    "autocommit": True,
                    "row_factory": dict_row,
                    "application_name": "autotag",
                    "prepare_threshold": 5 if prepare else None,
                    **KEEPALIVES,
                },
            )

        host = pool("store", HOST_SHARE)
        self._pools: dict[Purpose, AsyncConnectionPool] = {
            purpose: host if purpose in HOST_PURPOSES else pool(purpose, n) for purpose, n in SHARES.items()
        }
        self._shares = {purpose: asyncio.Semaphore(n) for purpose, n in SHARES.items()}

    async def open(self) -> None:
        """Opens the connection that is always open.

        Raises:
            psycopg_pool.PoolTimeout: no connection within 30 seconds.
        """
        for pool in set(self._pools.values()):
            await pool.open(wait=True)

    async def close(self) -> None:
        """Closes all connections."""
        for pool in set(self._pools.values()):
            await pool.close()

    async def call(
        self, purpose: Purpose, read: Reader[R], statement: str, *arguments: object, within: float | None = None
    ) -> R:
        """Executes one statement and returns what it says. Retries after a broken connection; see `call_once`.

        Raises:
            Busy, TooSlow, Lost: only for the purposes whose callers handle them; the others are retried.
        """
        retried = _is_broken if purpose in FOREIGN_CODE else _is_temporary
        delay = FIRST_RETRY_DELAY
        broken = False  # the last connection was broken, so the next one is tested first
        losses = 0
        while True:
            try:
                return read(await self._call(purpose, statement, arguments, within, check=broken))
            except Lost as error:
                losses += 1
                if losses == MAX_LOSSES and purpose in FOREIGN_CODE:
                    raise
                _log_retry(error)
            except CALL_ERRORS as error:
                if not retried(error):
                    raise
                broken = broken or _is_broken(error)
                _log_retry(error)
            await asyncio.sleep(random.uniform(0, delay))
            delay = min(2 * delay, MAX_RETRY_DELAY)

    async def call_once(
        self, purpose: Purpose, read: Reader[R], statement: str, *arguments: object, within: float | None = None
    ) -> R:
        """Executes one statement and returns what it says.

        Args:
            purpose: whose share of the connections it uses; it waits for a free one.
            read: makes a typed value of the row (`autotag.db.readers`).
            statement: calls one function.
            arguments: of the statement.
            within: seconds that the statement may take. Then it is cancelled in the server, and the connection can be
                used again.

        Raises:
            Busy, TooSlow, NotHeld, VersionsDiffer: see these classes.
            psycopg.Error: any other error.
        """
        return read(await self._call(purpose, statement, arguments, within, check=False))

    async def _call(
        self, purpose: Purpose, statement: str, arguments: tuple[object, ...], within: float | None, *, check: bool
    ) -> object:
        """`call_once` without its reader. check: test the connection first; if the statement then loses it, raise
        `Lost`."""
        async with self._shares[purpose], self._pools[purpose].connection() as connection:
            if check:
                await AsyncConnectionPool.check_connection(connection)
            try:
                async with asyncio.timeout(within):
                    return await _execute(connection, statement, arguments)
            except TimeoutError:
                raise TooSlow(f"The call took longer than {within} seconds.") from None
            except psycopg.DatabaseError as error:
                if check and _is_lost(error, connection):
                    raise Lost(f"The connection was lost: {safe_message(error)}") from None
                meaning = _meaning(error)
                raise (error if meaning is None else meaning) from None


async def _execute(connection: psycopg.AsyncConnection[Any], statement: str, arguments: tuple[object, ...]) -> object:
    """Executes one statement and returns what a reader gets. If the host's code has changed the session's prepared
    statements (`deallocate all`), nothing was done, and it is executed again without them."""
    try:
        cursor = await connection.execute(statement, arguments)
    except (psycopg.errors.InvalidSqlStatementName, psycopg.errors.DuplicatePreparedStatement):
        await connection.execute("deallocate all")  # makes psycopg forget them, too
        cursor = await connection.execute(statement, arguments, prepare=False)
    return row_value(await cursor.fetchone())


def _is_lost(error: psycopg.DatabaseError, connection: psycopg.AsyncConnection[Any]) -> bool:
    """Whether the server has ended the session, or broke off."""
    return connection.closed or error.diag.severity_nonlocalized == "FATAL"


def _meaning(error: psycopg.DatabaseError) -> Exception | None:
    """The exception for an error that callers handle; None: they do not handle it."""
    match (refusal(error) or {}).get("code"):
        case "batch_not_held":
            return NotHeld(str(error))
        case "versions_differ":
            return VersionsDiffer(str(error.diag.message_primary), str(error.diag.message_hint))
        case "busy":
            return Busy(str(error))
    match error.sqlstate:
        case "55P03" | "40P01" | "40001":  # lock_not_available, deadlock, serialization_failure
            return Busy(str(error))
        case "57014":  # query_canceled: the login has a statement_timeout
            return TooSlow(str(error))
    return None


def _is_broken(error: BaseException) -> bool:
    """Whether the connection or the server is the cause; a server that is read only is a standby after a failover.

    Errors of the classes 54 (a limit of a statement) and 55 (a state of an object) are about the statement, or the
    host's code has raised them.
    """
    if isinstance(error, psycopg.OperationalError):
        return (error.sqlstate or "")[:2] not in ("54", "55")
    return isinstance(error, psycopg.errors.ReadOnlySqlTransaction)


def _is_temporary(error: BaseException) -> bool:
    return _is_broken(error) or isinstance(error, Busy | TooSlow)
