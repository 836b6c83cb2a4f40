"""Trouble that a tenant makes in its own workspace: transactions that stay open, rows that disappear, huge uploads.

Each kind is a class; an instance belongs to one tenant. Trouble begins and ends with `Hostility.happen`, and the tenant
uploads images meanwhile. `Hostility.happened` says how often it really had an effect: a row was locked while its image
was being tagged, a trigger fired. `hostile_uploads` has the kinds that are uploads, `hostile_triggers` those that need
triggers and constraints.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Callable
from typing import Any, ClassVar

import psycopg

from lab.chaos.auditor import TAGGED
from lab.chaos.tenants import Tenant
from lab.stack import WORKER_ROLE

ONCE = (3600.0, 3600.0)  # seconds: for the whole run
LOCKED = 1.0  # seconds that the whole table is locked
UNDER_WAY = "('queued', 'preparing', 'submitted', 'processing', 'completing')"


class Hostility:
    """One kind of trouble, and the tenant that makes it."""

    name: ClassVar[str]
    images: int = 4  # uploaded each time it happens
    seconds: tuple[float, float] = (1.5, 4.0)  # how long it lasts

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.project = tenant.project
        self._count = 0

    def note(self, times: int = 1) -> None:
        """Notes that the trouble had an effect."""
        self._count += times

    async def happened(self) -> int:
        """How often it really happened."""
        return self._count

    async def install(self) -> None:
        """Creates the objects in the host's schema that the trouble needs."""

    async def remove(self) -> None:
        """Undoes `install`."""

    @contextlib.asynccontextmanager
    async def happen(self) -> AsyncIterator[None]:
        """Makes trouble while the context is open."""
        await self.tenant.upload(self.images)
        yield


async def happen_often(
    hostility: Hostility, rng: random.Random, ending: asyncio.Event, *, pause: tuple[float, float],
    on_error: Callable[[str], None],
) -> None:  # fmt: skip
    """Makes the trouble happen at random moments until the end. ``on_error`` gets errors of the tenant's own calls."""
    hostility.tenant.rng = rng
    while not await wait_for(ending, rng.uniform(*pause)):
        try:
            async with hostility.happen():
                await wait_for(ending, rng.uniform(*hostility.seconds))
        except psycopg.Error as error:
            on_error(f"{hostility.name}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")


async def wait_for(ending: asyncio.Event, seconds: float) -> bool:
    """Waits for the end, at most this long; returns whether it has come."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await ending.wait()
    return ending.is_set()


class Friendly(Hostility):
    """A tenant that uploads as much as a hostile one, and nothing else."""

    name = "none"

    def __init__(self, tenant: Tenant, instead_of: type[Hostility]) -> None:
        super().__init__(tenant)
        self.images, self.seconds = instead_of.images, instead_of.seconds


class OpenTransaction(Hostility):
    """A transaction that does something and stays open."""

    async def before(self) -> list[str]:
        """The tenant's upload; the images that the transaction is about."""
        return await self.tenant.upload(self.images)

    async def do(self, connection: psycopg.AsyncConnection[Any], assets: list[str]) -> bool:
        """The work of the transaction; returns whether it did anything."""
        raise NotImplementedError

    def commits(self) -> bool:
        """Whether it is committed at the end."""
        return False

    @contextlib.asynccontextmanager
    async def happen(self) -> AsyncIterator[None]:
        assets, commits = await self.before(), self.commits()
        async with self.project.connect() as connection:
            self.note(await self.do(connection, assets))
            yield
            if commits:
                await connection.commit()
        self.ended(assets, committed=commits)

    def ended(self, assets: list[str], *, committed: bool) -> None:
        """Called after the transaction has ended."""


class HeldRow(OpenTransaction):
    """One image's row is locked while the image is being tagged."""

    name = "a transaction holds the row of an image"
    rows: ClassVar[int] = 1

    async def do(self, connection: psycopg.AsyncConnection[Any], assets: list[str]) -> bool:
        cursor = await connection.execute(
            f"select id from public.assets where id = any (%s::uuid[]) and tagging_stage in {UNDER_WAY}"
            " order by id limit %s for update",
            (assets, self.rows),
        )
        return cursor.rowcount > 0


class HeldRows(HeldRow):
    """All rows of the workspace are locked."""

    name = "a transaction holds all rows of a workspace"
    rows = 1_000_000


class OpenEnqueue(OpenTransaction):
    """An upload is enqueued in a transaction that is committed much later."""

    name = "enqueue_tagging in an open transaction"

    async def before(self) -> list[str]:
        await super().before()
        return await self.tenant.insert(self.tenant.choose(3))

    async def do(self, connection: psycopg.AsyncConnection[Any], assets: list[str]) -> bool:
        await self.tenant.act_as_member(connection)
        await connection.execute("select public.enqueue_tagging(%s::uuid[])", (assets,))
        return True

    def commits(self) -> bool:
        return True

    def ended(self, assets: list[str], *, committed: bool) -> None:
        self.project.ledger.expect(assets)


class OpenCancel(OpenTransaction):
    """An upload is cancelled in a transaction that is rolled back, or committed, much later."""

    name = "cancel_tagging in an open transaction"
    images = 12

    async def before(self) -> list[str]:
        return await self.tenant.upload(self.images, TAGGED | {"cancelled"})

    async def do(self, connection: psycopg.AsyncConnection[Any], assets: list[str]) -> bool:
        await self.tenant.act_as_member(connection)
        cursor = await connection.execute(
            "select (public.cancel_tagging(j.id)).cancelled <> 0 from autotag.jobs j"
            " where j.workspace_id = %s order by j.created_at desc limit 1",
            (self.tenant.workspace,),
        )
        row = await cursor.fetchone()
        return bool(row and row[0])

    def commits(self) -> bool:
        return self.tenant.rng.random() < 0.5

    def ended(self, assets: list[str], *, committed: bool) -> None:
        if not committed:
            self.project.ledger.expect(assets)


class OpenRateLimit(OpenTransaction):
    """The project's server takes the allowance of a workspace and does not commit."""

    name = "check_rate_limit in an open transaction"

    async def do(self, connection: psycopg.AsyncConnection[Any], assets: list[str]) -> bool:
        await connection.execute("select public.check_rate_limit(%s, 'realtime', 1)", (self.tenant.workspace,))
        return True


class LongSnapshot(OpenTransaction):
    """A report reads from one snapshot for as long as it can."""

    name = "a snapshot that stays open"
    seconds = ONCE

    async def do(self, connection: psycopg.AsyncConnection[Any], assets: list[str]) -> bool:
        await connection.set_isolation_level(psycopg.IsolationLevel.REPEATABLE_READ)
        await connection.execute("select count(*) from public.assets")
        return True


class WholeTable(Hostility):
    """A migration of the project locks the whole table for a second, once it gets the lock."""

    name = "alter table locks the table"
    seconds = (6.0, 10.0)

    @contextlib.asynccontextmanager
    async def happen(self) -> AsyncIterator[None]:
        await self.tenant.upload(self.images)
        with contextlib.suppress(psycopg.errors.LockNotAvailable):
            async with self.project.connect() as connection:
                await connection.execute("set local lock_timeout = '0.5 s'")
                await connection.execute("alter table public.assets alter column created_at set default now()")
                self.note()
                await asyncio.sleep(LOCKED)
                await connection.commit()
        yield


class Vanishing(Hostility):
    """Changes rows while their images are being tagged."""

    images = 8

    @contextlib.asynccontextmanager
    async def happen(self) -> AsyncIterator[None]:
        assets = await self.tenant.insert(self.tenant.choose(self.images))
        await self.tenant.enqueue(assets, as_server=True)
        for asset in assets[::2]:
            await self.change(asset)
            await asyncio.sleep(self.tenant.rng.uniform(0, 0.1))
        yield

    async def change(self, asset: str) -> None:
        """Changes one row."""
        raise NotImplementedError


class Deleted(Vanishing):
    """Rows are deleted."""

    name = "rows are deleted"

    async def change(self, asset: str) -> None:
        self.project.ledger.expect([asset], TAGGED | {"gone"})
        [(stage,)] = await self.project.execute(
            "delete from public.assets where id = %s returning tagging_stage", asset
        )
        self.note(stage != "completed")


class Moved(Vanishing):
    """Rows move to another workspace."""

    name = "rows move to another workspace"

    def __init__(self, tenant: Tenant) -> None:
        super().__init__(tenant)
        self._other = self.project.stack.add_member().workspace

    async def change(self, asset: str) -> None:
        self.project.ledger.expect([asset], TAGGED | {"moved"})
        [(stage,)] = await self.project.execute(
            "update public.assets set workspace_id = %s where id = %s returning tagging_stage", self._other, asset
        )
        self.note(stage != "completed")


class Replaced(Vanishing):
    """Rows name another picture."""

    name = "pictures are replaced"

    async def change(self, asset: str) -> None:
        path, picture = self.tenant.rng.choice(
            [file for file in self.tenant.files if file[1] != self.project.ledger.truth[asset]]
        )
        try:
            changed = await self.project.execute(
                "update public.assets set storage_path = %s"
                f" where id = %s and tagging_stage in {UNDER_WAY} returning 1",
                path, asset,
            )  # fmt: skip
        except psycopg.Error:
            self.project.ledger.pictures[picture] += 1
            self.project.ledger.forget(asset)
            raise
        if changed:
            self.project.ledger.replace(asset, picture)
            self.note()


class SmallTimeouts(Hostility):
    """The project sets timeouts for the workers' login that are too short for some statements."""

    name = "statement_timeout and lock_timeout of the login are small"
    _since: tuple[Any, ...] | None = None
    TIMEOUTS: ClassVar = {"statement_timeout": "100ms", "lock_timeout": "10ms"}

    @contextlib.asynccontextmanager
    async def happen(self) -> AsyncIterator[None]:
        await self.tenant.upload(self.images)
        async with self.project.connect("supabase_admin") as admin:
            await admin.set_autocommit(True)
            began = await admin.execute("select clock_timestamp()")
            self._since = await began.fetchone()
            for setting, value in self.TIMEOUTS.items():
                await admin.execute(f"alter role {WORKER_ROLE} set {setting} = '{value}'".encode())
            try:
                yield
            finally:
                for setting in self.TIMEOUTS:
                    await admin.execute(f"alter role {WORKER_ROLE} reset {setting}".encode())
                self.note(await self._sessions())
                self._since = None

    async def happened(self) -> int:
        """Sessions of workers that began with these settings."""
        return await super().happened() + await self._sessions()

    async def _sessions(self) -> int:
        if self._since is None:
            return 0
        [(new,)] = await self.project.execute(
            "select count(*) from pg_stat_activity where usename = %s and backend_start > %s", WORKER_ROLE, *self._since
        )
        return int(new)


class SilentTopic(Hostility):
    """realtime.send raises an error for the workspace's topic, as it does if today's partition is missing."""

    name = "realtime.send raises"
    _before: int | None = None

    @contextlib.asynccontextmanager
    async def happen(self) -> AsyncIterator[None]:
        workspace = self.tenant.workspace
        await self.project.execute("insert into public.hostile_now values (%s, true)", workspace)
        self._before = await self._raised()
        try:
            await self.tenant.upload(self.images)
            yield
        finally:
            await self.project.execute("delete from public.hostile_now where workspace_id = %s", workspace)
            self.note(await self._raised() - self._before)
            self._before = None

    async def happened(self) -> int:
        """Broadcasts that were refused."""
        now = 0 if self._before is None else await self._raised() - self._before
        return await super().happened() + now

    async def _raised(self) -> int:
        [(last,)] = await self.project.execute(
            "select case when is_called then last_value else 0 end from public.hostile_silenced"
        )
        return int(last)


KINDS: tuple[type[Hostility], ...] = (
    HeldRow, HeldRows, OpenEnqueue, OpenCancel, OpenRateLimit, LongSnapshot, WholeTable, Deleted, Moved, Replaced,
    SmallTimeouts, SilentTopic,
)  # fmt: skip
