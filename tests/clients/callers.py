"""Five clients that call an RPC in the same way: supabase-js, supabase-py, postgrest-py, psycopg, pg8000."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jwt
import pg8000.native
import psycopg
from postgrest import AsyncPostgrestClient
from postgrest.exceptions import APIError
from psycopg.rows import tuple_row

from key_types import KeyedStack
from supabase import AsyncClientOptions, acreate_client

HERE = Path(__file__).parent
MAX_LINE = 16_000_000  # bytes of one answer


def types_of(stack: KeyedStack) -> dict[str, str]:
    """The arguments' types, for clients that speak SQL and have to say them."""
    asset, workspace, _ = stack.keys.base
    return {
        "asset_ids": f"{asset}[]", "job_id": "uuid", "image_count": "integer", "workspace_id": workspace, "request_type": "public.tagging_request_type",
        "since": "date", "until": "date", "only_live": "boolean", "before": "timestamptz", "limit": "integer", "webhook_id": "text", "event_type": "text", "batch_id": "text", "profile": "jsonb",
    }  # fmt: skip


@dataclass(frozen=True)
class Answer:
    """The answer to a call: data, or an error with the four fields that every client has."""

    data: Any = None
    error: dict[str, Any] | None = None

    @property
    def code(self) -> str | None:
        """autotag's own code, out of the details; else the sqlstate."""
        if self.error is None:
            return None
        with contextlib.suppress(ValueError, TypeError, KeyError):
            return str(self.detail["code"])
        return str(self.error["code"])

    @property
    def detail(self) -> dict[str, Any]:
        assert self.error is not None
        detail: dict[str, Any] = json.loads(self.error["details"])
        return detail


#: token (empty: anon), function, arguments -> answer
Call = Callable[[str, str, dict[str, Any]], Awaitable[Answer]]


@contextlib.asynccontextmanager
async def supabase_js(stack: KeyedStack) -> AsyncIterator[Call]:
    process = await asyncio.create_subprocess_exec(
        "node", "--no-warnings", str(HERE / "contract.mjs"), limit=MAX_LINE,
        env={"PATH": os.environ["PATH"], "SUPABASE_URL": stack.supabase_url, "SUPABASE_ANON_KEY": stack.anon_key},
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout

    async def call(token: str, function: str, arguments: dict[str, Any]) -> Answer:
        line = json.dumps({"token": token, "function": function, "args": arguments})
        requests.write(line.encode() + b"\n")
        await requests.drain()
        told = json.loads(await answers.readline())
        return Answer(told["data"], told["error"])

    yield call
    requests.close()
    await process.wait()


@contextlib.asynccontextmanager
async def supabase_py(stack: KeyedStack) -> AsyncIterator[Call]:
    async def call(token: str, function: str, arguments: dict[str, Any]) -> Answer:
        options = AsyncClientOptions(headers={"Authorization": f"Bearer {token or stack.anon_key}"})
        client = await acreate_client(stack.supabase_url, stack.anon_key, options)
        return await _posted(client.rpc(function, arguments))

    yield call


@contextlib.asynccontextmanager
async def postgrest_py(stack: KeyedStack) -> AsyncIterator[Call]:
    async with AsyncPostgrestClient(f"{stack.supabase_url}/rest/v1", headers={"apikey": stack.anon_key}) as client:

        async def call(token: str, function: str, arguments: dict[str, Any]) -> Answer:
            return await _posted(client.auth(token or stack.anon_key).rpc(function, arguments))

        yield call


async def _posted(request: Any) -> Answer:
    try:
        return Answer((await request.execute()).data)
    except APIError as error:
        return Answer(error=error.json())


def _claims(stack: KeyedStack, token: str) -> dict[str, Any]:
    return jwt.decode(token or stack.anon_key, options={"verify_signature": False})


def _as_json(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name: json.dumps(value) if isinstance(value, dict) else value for name, value in arguments.items()}


@contextlib.asynccontextmanager
async def psycopg_3(stack: KeyedStack) -> AsyncIterator[Call]:
    async with await psycopg.AsyncConnection.connect(stack.database_url("authenticator"), row_factory=tuple_row) as one:

        async def call(token: str, function: str, arguments: dict[str, Any]) -> Answer:
            claims, arguments = _claims(stack, token), _as_json(arguments)
            passed = ", ".join(f'"{name}" => %({name})s::{types_of(stack)[name]}' for name in arguments)
            try:
                async with one.transaction():
                    await one.execute(
                        "select set_config('request.jwt.claims', %s, true), set_config('role', %s, true)",
                        (json.dumps(claims), claims["role"]),
                    )
                    cursor = await one.execute(f"select to_jsonb(x) from public.{function}({passed}) x", arguments)  # type: ignore[arg-type]
                    return _rows(function, [row[0] for row in await cursor.fetchall()])
            except psycopg.Error as error:
                d = error.diag
                return Answer(error={"code": d.sqlstate, "message": d.message_primary, "hint": d.message_hint,
                                     "details": d.message_detail})  # fmt: skip

        yield call


@contextlib.asynccontextmanager
async def pg_8000(stack: KeyedStack) -> AsyncIterator[Call]:
    parts = urlsplit(stack.database_url("authenticator"))
    one = pg8000.native.Connection(
        parts.username, parts.hostname or "", parts.path[1:], parts.port or 5432, parts.password
    )

    def run(token: str, function: str, arguments: dict[str, Any]) -> Answer:
        claims, arguments = _claims(stack, token), _as_json(arguments)
        passed = ", ".join(f'"{name}" => cast(:{name} as {types_of(stack)[name]})' for name in arguments)
        one.run("begin")
        try:
            one.run(
                "select set_config('request.jwt.claims', :claims, true), set_config('role', :role, true)",
                claims=json.dumps(claims), role=claims["role"],
            )  # fmt: skip
            rows = one.run(f"select to_jsonb(x) from public.{function}({passed}) x", **arguments)
            one.run("commit")
            return _rows(function, [row[0] for row in rows or []])
        except pg8000.native.DatabaseError as error:
            one.run("rollback")
            told = error.args[0]
            return Answer(
                error={"code": told["C"], "message": told["M"], "hint": told.get("H"), "details": told.get("D")}
            )

    async def call(token: str, function: str, arguments: dict[str, Any]) -> Answer:
        return await asyncio.to_thread(run, token, function, arguments)

    yield call
    one.close()


def _rows(function: str, rows: list[Any]) -> Answer:
    return Answer(rows if function in ("tagging_usage", "tagging_jobs") else rows[0])


CALLERS = {
    "supabase-js": supabase_js, "supabase-py": supabase_py, "postgrest-py": postgrest_py, "psycopg": psycopg_3,
    "pg8000": pg_8000,
}  # fmt: skip
