"""Runs SQL with a caller's role and JWT claims, in a separate transaction."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

from psycopg import AsyncConnection, sql
from psycopg_pool import AsyncConnectionPool

ROLES = ("anon", "authenticated", "service_role")


@asynccontextmanager
async def as_caller(
    pool: AsyncConnectionPool[AsyncConnection[Any]], claims: dict[str, Any], headers: Mapping[str, str] | None = None
) -> AsyncIterator[AsyncConnection[Any]]:
    """A transaction with the role and claims of a verified token and the headers of the request. An unknown role
    becomes anon."""
    role = claims.get("role") if claims.get("role") in ROLES else "anon"
    # In a pipeline, the beginning of the transaction and the role are sent together with the first statement.
    async with pool.connection() as connection, connection.pipeline(), connection.transaction():
        await connection.execute(
            sql.SQL(
                "select set_config('request.jwt.claims', %s, true), set_config('request.headers', %s, true),"
                " set_config('role', %s, true)"
            ),
            (json.dumps(claims), json.dumps(dict(headers or {})), role),
        )
        yield connection
