"""Every kind of trouble that a tenant can make (`lab.chaos.hostilities`), while another tenant only uploads.

While it lasts, the quiet tenant's images are tagged, single calls and a batch. When it is over, everything has ended as
the ledger says: an image that was refused has failed alone with `not_stored`, and the others are tagged and paid for once.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import pytest
import pytest_asyncio

from conftest import TEMPLATE, copied_database
from lab.chaos.crew import Crew, terminate
from lab.chaos.forks import Forks, fork_server
from lab.chaos.hostile_triggers import ALL_KINDS
from lab.chaos.hostile_uploads import OddClaims
from lab.chaos.hostilities import Hostility, SmallTimeouts
from lab.chaos.tenants import Project, Tenant, open_project, widen
from lab.pictures import Drawing, draw
from lab.postgres import LocalPostgres
from lab.proxy import Proxy
from lab.stack import local_stack

pytestmark = pytest.mark.asyncio(loop_scope="module")

WORKERS = 2
SINGLES, BATCH = 4, 16  # images of the quiet tenant's uploads
FILES = 10  # pictures of each tenant
SHRINK = 6  # small pictures: their preparation is not what is tested
LATENCY, BATCH_LATENCY = (0.2, 0.3), (0.2, 0.3)  # seconds: an image is under way long enough for trouble to begin
LEASE = "10 s"  # a worker that lives keeps it, also on a machine that is busy with other things
PATIENCE = 60.0  # seconds; only a broken promise takes so long


@dataclass
class Street:
    """A project with its workers, and with drawings for as many tenants as a test needs."""

    project: Project
    crew: Crew
    rng: random.Random = field(default_factory=lambda: random.Random(1))
    _drawings: Iterator[Drawing] = field(default_factory=lambda: draw(10_000, shrink=SHRINK))

    async def tenant(self) -> Tenant:
        """A new workspace."""
        tenant = Tenant(self.project, self.rng)
        await tenant.store(list(islice(self._drawings, FILES)))
        return tenant

    async def tagged(self, assets: list[str]) -> bool:
        """Whether all these images have their tags."""
        [(count,)] = await self.project.execute(
            "select count(*) from public.assets where id = any (%s::uuid[]) and tagging_stage = 'completed'", assets
        )
        return int(count) == len(assets)

    async def asked(self) -> bool:
        """Whether a single call is in flight."""
        return self.project.stack.simulator.in_flight > 0

    async def ended(self, after: str) -> None:
        """Waits until everything has ended, and checks that the auditor finds nothing."""

        async def idle() -> bool:
            return not await self.project.live() and not self.project.stack.simulator.files

        await until(idle, f"all uploads to end after: {after}")
        assert await asyncio.to_thread(self.crew.audit) == []


class Streets:
    """Keeps one street running. After a failed test, the next one gets a new street."""

    def __init__(self, server: LocalPostgres, forks: Forks, log: Path) -> None:
        self._server, self._forks, self._log = server, forks, log
        self._open = contextlib.AsyncExitStack()
        self._street: Street | None = None

    @contextlib.asynccontextmanager
    async def visit(self) -> AsyncIterator[Street]:
        """Lends the street to one test."""
        street = self._street = self._street or await self._build()
        try:
            yield street
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """Stops the street."""
        self._street = None
        await self._open.aclose()

    async def _build(self) -> Street:
        enter = self._open.enter_async_context
        database = self._open.enter_context(copied_database(self._server, TEMPLATE))
        stack = await enter(local_stack(self._server, database))
        stack.simulator.plan.latency, stack.simulator.plan.batch_latency = LATENCY, BATCH_LATENCY
        widen(stack)
        stack.configure(lease=LEASE)
        project = await enter(open_project(stack))
        proxy = await enter(Proxy(stack.database_url()).serve())
        crew = Crew(self._forks, project, self._log, WORKERS, proxy)
        await enter(project.ticks())
        await enter(crew.work())
        return Street(project, crew)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def streets(postgres: LocalPostgres, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Streets]:
    """One project with two workers for all tests of this file, as long as they pass."""
    async with fork_server() as forks:
        streets = Streets(postgres, forks, tmp_path_factory.mktemp("workers") / "log")
        try:
            yield streets
        finally:
            await streets.close()


async def until(condition: Callable[[], Awaitable[object]], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not await condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE:g} s for {what}"
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("kind", ALL_KINDS, ids=lambda kind: kind.name)
async def test_a_neighbour_neither_stops_nor_harms_anybody(streets: Streets, kind: type[Hostility]) -> None:
    async with streets.visit() as street:
        quiet, hostility = await street.tenant(), kind(await street.tenant())
        await hostility.install()
        async with hostility.happen():
            if kind is SmallTimeouts:  # a setting of a login concerns sessions that begin later
                street.crew.kill(street.rng)
            await until(hostility.happened, f"this to happen: {kind.name}")
            assets = await quiet.upload(SINGLES) + await quiet.upload(BATCH)
            await until(lambda: street.tagged(assets), f"the quiet tenant's images; meanwhile: {kind.name}")
        await street.ended(kind.name)
        if isinstance(hostility, OddClaims):
            assert hostility.refused == 0, "an INSERT of the project was aborted"
        await hostility.remove()


async def kill(street: Street) -> None:
    street.crew.kill(street.rng)


async def end_session(street: Street) -> None:
    assert await asyncio.to_thread(terminate, street.project.stack, street.rng)


async def lose_reply(street: Street) -> None:
    lost, asked_at = street.crew.proxy.cuts, -math.inf

    async def happened() -> bool:
        nonlocal asked_at
        if time.monotonic() - asked_at > 2:  # seconds; a connection that was picked may have nothing more to say
            asked_at = time.monotonic()
            assert street.crew.proxy.lose_reply(street.rng)
        return street.crew.proxy.cuts > lost

    await until(happened, "a reply to be lost")


async def drop_bytes(street: Street) -> None:
    assert street.crew.proxy.drop_bytes(street.rng)


async def reset(street: Street) -> None:
    assert street.crew.proxy.reset(street.rng)


async def stall(street: Street) -> None:
    assert await street.crew.proxy.stall(street.rng, seconds=1)


BREAKS = {
    "a worker is killed": kill, "a session is terminated": end_session, "a reply is lost": lose_reply,
    "bytes are dropped": drop_bytes, "a connection is reset": reset, "a connection stalls": stall,
}  # fmt: skip


@pytest.mark.parametrize("what", BREAKS)
async def test_what_breaks_loses_nothing_and_pays_nothing_twice(streets: Streets, what: str) -> None:
    async with streets.visit() as street:
        tenants = [await street.tenant() for _ in range(2)]
        assets = [asset for tenant in tenants for n in (SINGLES, BATCH) for asset in await tenant.upload(n)]
        await until(street.asked, "a call to be under way")
        for _ in range(3):
            await BREAKS[what](street)
        await until(lambda: street.tagged(assets), f"the images after: {what}")
        await street.ended(what)
