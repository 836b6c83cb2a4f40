"""Workspaces that share one table, and a ledger of how each of their images should end.

The code that uploads, deletes and refuses images writes the ledger. The auditor compares it with the database and with
the provider's request log, which are independent of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg_pool import AsyncConnectionPool

from lab.chaos.auditor import ANYTHING, TAGGED
from lab.chaos.ticks import ticking
from lab.openai_sim.limits import Limits
from lab.pictures import Drawing
from lab.stack import WORKER_ROLE, Member, Stack

STATEMENT_TIMEOUT = 20_000  # milliseconds, after which a tenant that has locked itself out gives up
CONNECTIONS = 8
TICK = 0.5  # seconds between ticks, instead of pg_cron's minute
UPLOADS_AT_ONCE = 8  # files
#: The possible ends of an image whose insert or upload may not have happened.
UNSURE = frozenset({"gone", "untouched"})

#: Settings with which uploads of every strategy end within seconds.
SETTINGS = {
    "realtime_max_images": 5, "chunk_max_images": 12, "batch_max_images": 200, "batch_split_images": 100,
    "express_images": 5, "chunk_delay": "0.1 s", "retry_delay": "0.05 s", "retry_delay_max": "1 s",
    "batch_poll_interval": "0.3 s", "batch_create_grace": "0.5 s", "lease": "4 s", "account_probe_interval": "0.3 s",
    "realtime_requests_per_minute": 100_000, "realtime_tokens_per_minute": 2_000_000_000, "max_failures": 1000,
    "batch_batches_per_hour": 100_000, "batch_images_per_hour": 10_000_000, "broadcast_interval": "0.2 s",
    "upload_quiet": "0.3 s", "upload_longest": "3 s",
}  # fmt: skip
#: The objects in the hostile tenants' project: who is hostile at the moment, which images are refused, a table to write
#: to, counters, a trigger of automatic mode for some workspaces, and a realtime.send() that raises errors for some
#: topics.
HOST = """
    create table public.hostile_now (workspace_id uuid primary key, silent boolean not null default false);
    create table public.hostile_images (asset_id uuid primary key, workspace_id uuid not null);
    create table public.hostile_automatic (workspace_id uuid primary key);
    create table public.hostile_counters (workspace_id uuid primary key, n bigint not null default 0);
    create table public.hostile_log (asset_id uuid not null, what text not null, at timestamptz not null default now());
    -- autotag's own trigger (collect_inserted), for the rows of some workspaces only. Its name says that automatic mode
    -- is on: workers look for uploads every upload_quiet, and not once a minute.
    create function public.hostile_collect() returns trigger language plpgsql as $$
    begin
      perform autotag.collect(array_agg(a.id), array_agg(a.workspace_id))
      from added a join public.hostile_automatic h using (workspace_id) having count(*) > 0;
      return null;
    exception when others or assert_failure then
      raise warning 'autotag could not collect new images: %', sqlerrm;
      return null;
    end $$;
    create trigger autotag_collect after insert on public.assets
      referencing new table as added for each statement execute function public.hostile_collect();
    alter function realtime.send(jsonb, text, text, boolean) rename to send_quietly;
    create function realtime.send(payload jsonb, event text, topic text, private boolean default true)
    returns void language plpgsql as $$
    begin
      if exists (select from public.hostile_now h where h.silent and send.topic = 'tagging:' || h.workspace_id) then
        perform nextval('public.hostile_silenced');
        raise exception 'no partition of relation "messages" found for row';
      end if;
      perform realtime.send_quietly(payload, event, topic, private);
    end $$;
    create sequence public.hostile_silenced;
    do $$
    declare v_table text;
    begin
      foreach v_table in array array['now', 'images', 'automatic', 'counters', 'log'] loop
        execute format('alter table public.hostile_%s owner to postgres', v_table);
      end loop;
      alter sequence public.hostile_silenced owner to postgres;
      alter function public.hostile_collect() owner to postgres;
    end $$"""


@dataclass
class Ledger:
    """The uploaded images, and how each of them should end (`lab.chaos.auditor`)."""

    truth: dict[str, frozenset[str]] = field(default_factory=dict)
    ends: dict[str, frozenset[str]] = field(default_factory=dict)
    pictures: Counter[frozenset[str]] = field(default_factory=Counter)

    def add(self, asset: str, picture: frozenset[str]) -> None:
        """Adds an image that is about to be inserted. Until `expect`, it may not exist."""
        self.truth[asset] = picture
        self.pictures[picture] += 1
        self.ends[asset] = TAGGED | UNSURE

    def expect(self, assets: Iterable[str], ends: frozenset[str] = TAGGED) -> None:
        """Notes that these images must end in one of these ways."""
        for asset in assets:
            self.ends[asset] = ends

    def forget(self, asset: str) -> None:
        """Notes that it is unknown which picture a row names."""
        self.ends[asset] = ANYTHING

    def replace(self, asset: str, picture: frozenset[str]) -> None:
        """Notes that a row now names another picture."""
        self.truth[asset] = picture
        self.pictures[picture] += 1


@dataclass
class Project:
    """One Supabase project: its stack, the owner's connections, and the ledger of all its images."""

    stack: Stack
    pool: AsyncConnectionPool[psycopg.AsyncConnection[Any]]
    ledger: Ledger = field(default_factory=Ledger)

    async def execute(self, statement: str, *arguments: object) -> list[tuple[Any, ...]]:
        """Executes one statement as the owner, in its own transaction."""
        async with self.pool.connection() as connection:
            cursor = await connection.execute(statement.encode(), arguments)
            return await cursor.fetchall() if cursor.description else []

    async def live(self) -> int:
        """The number of uploads, batches and collections of new rows that have not ended."""
        [(count,)] = await self.execute("""
            select (select count(*) from autotag.jobs where finished_at is null)
              + (select count(*) from autotag.batches where state not in ('done', 'cancelled'))
              + (select count(*) from autotag.arrivals)""")
        return int(count)

    async def calm(self) -> None:
        """Ends trouble that a hostile tenant could not end itself, because the server was restarted."""
        await self.execute("delete from public.hostile_now where workspace_id is not null")
        async with self.connect("supabase_admin") as admin:
            await admin.execute(f"alter role {WORKER_ROLE} reset all".encode())
            await admin.commit()

    def ticks(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Does the scheduler's work, more often than the scheduler would."""
        return ticking(lambda: self.execute("select autotag.tick()"), TICK)

    @contextlib.asynccontextmanager
    async def connect(self, user: str = "postgres") -> AsyncIterator[psycopg.AsyncConnection[Any]]:
        """A connection with an open transaction, which is rolled back at the end unless it was committed."""
        connection = await psycopg.AsyncConnection.connect(
            self.stack.database_url(user), options=f"-c statement_timeout={STATEMENT_TIMEOUT}"
        )
        try:
            yield connection
        finally:
            await connection.close()


def widen(stack: Stack) -> None:
    """Sets limits that nothing here reaches, and makes uploads of every strategy end within seconds."""
    with psycopg.connect(stack.database_url("supabase_admin"), autocommit=True) as admin:
        admin.execute("""
            update autotag.provider_limits set requests_per_minute = 100000, tokens_per_minute = 500000000,
              queued_batch_tokens = 100000000, requests_per_day = null,
              requests_left = 100000, tokens_left = 500000000""")
    stack.configure(**SETTINGS)
    stack.prove()
    stack.simulator.limits = Limits.of(100_000, 500_000_000, None)
    stack.simulator.plan.queued_batch_tokens = 100_000_000


@contextlib.asynccontextmanager
async def open_project(stack: Stack) -> AsyncIterator[Project]:
    """A project that is ready for hostile tenants."""
    with psycopg.connect(stack.database_url("supabase_admin"), autocommit=True) as admin:
        admin.execute(HOST)
    pool = AsyncConnectionPool(
        stack.database_url(), min_size=2, max_size=CONNECTIONS, open=False,
        kwargs={"autocommit": True, "options": f"-c statement_timeout={STATEMENT_TIMEOUT}"},
    )  # fmt: skip
    async with pool:
        yield Project(stack, pool)


class Tenant:
    """A workspace with a member and some pictures."""

    def __init__(self, project: Project, rng: random.Random) -> None:
        self.project = project
        self.member: Member = project.stack.add_member()
        self.files: list[tuple[str, frozenset[str]]] = []
        self.rng = rng

    @property
    def workspace(self) -> str:
        """The workspace's id."""
        return self.member.workspace

    async def store(self, drawings: Sequence[Drawing]) -> None:
        """Stores the pictures that uploads are chosen from."""
        bucket, gate = self.project.stack.storage().from_("assets"), asyncio.Semaphore(UPLOADS_AT_ONCE)

        async def store_one(drawing: Drawing) -> tuple[str, frozenset[str]]:
            path = f"{self.workspace}/{drawing.name}"
            async with gate:
                await bucket.upload(path, drawing.data, {"content-type": drawing.content_type})
            return path, drawing.tags

        self.files += await asyncio.gather(*(store_one(drawing) for drawing in drawings))

    def choose(self, count: int) -> list[tuple[str, frozenset[str]]]:
        """Files for the next upload: different ones as long as there are enough."""
        if count <= len(self.files):
            return self.rng.sample(self.files, count)
        return self.rng.choices(self.files, k=count)

    async def insert(
        self, files: Sequence[tuple[str, frozenset[str]]], connection: psycopg.AsyncConnection[Any] | None = None
    ) -> list[str]:
        """Inserts rows in one statement; the images may be untouched until `Ledger.expect`."""
        assets = [str(uuid.uuid4()) for _ in files]
        for asset, (_, picture) in zip(assets, files, strict=True):
            self.project.ledger.add(asset, picture)
        statement = """
            insert into public.assets (id, workspace_id, storage_path)
            select u.id, %s, u.path from unnest(%s::uuid[], %s::text[]) u (id, path)"""
        arguments = (self.workspace, assets, [path for path, _ in files])
        if connection:
            await connection.execute(statement, arguments)
        else:
            await self.project.execute(statement, *arguments)
        return assets

    async def act_as_member(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Gives the connection's transaction the member's claims."""
        claims = json.dumps({"role": "authenticated", "sub": self.member.user})
        await connection.execute("select set_config('request.jwt.claims', %s, true)", (claims,))

    async def enqueue(
        self, assets: Sequence[str], ends: frozenset[str] = TAGGED, *, as_server: bool = False
    ) -> dict[str, Any]:
        """Enqueues images, which must then end in one of these ways, unless the ledger already says how."""
        async with self.project.pool.connection() as connection, connection.transaction():
            if not as_server:
                await self.act_as_member(connection)
            cursor = await connection.execute("select to_jsonb(public.enqueue_tagging(%s::uuid[]))", (list(assets),))
            row = await cursor.fetchone()
        ledger = self.project.ledger
        ledger.expect((asset for asset in assets if ledger.ends[asset] == TAGGED | UNSURE), ends)
        assert row is not None
        answer: dict[str, Any] = row[0]
        return answer

    async def upload(self, count: int, ends: frozenset[str] = TAGGED) -> list[str]:
        """Inserts images and enqueues them."""
        assets = await self.insert(self.choose(count))
        await self.enqueue(assets, ends)
        return assets
