"""Trouble from uploads: rows that are tagged without a call, and very large uploads."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import psycopg

from lab.chaos.auditor import TAGGED
from lab.chaos.hostilities import ONCE, Hostility
from lab.chaos.tenants import UNSURE


class Automatic(Hostility):
    """Rows are tagged without a call."""

    async def install(self) -> None:
        await self.project.execute("insert into public.hostile_automatic values (%s)", self.tenant.workspace)


class AutomaticStorm(Automatic):
    """Three hundred rows, each in a transaction of its own."""

    name = "300 inserts in automatic mode"
    images = 300
    seconds = ONCE

    @contextlib.asynccontextmanager
    async def happen(self) -> AsyncIterator[None]:
        assets: list[str] = []
        async with self.project.connect() as connection:
            await connection.set_autocommit(True)
            for file in self.tenant.choose(self.images):
                assets += await self.tenant.insert([file], connection)
        self.project.ledger.expect(assets)
        self.note()
        yield


class OpenInsert(Automatic):
    """Rows are inserted in a transaction that is committed much later."""

    name = "an open insert in automatic mode"

    @contextlib.asynccontextmanager
    async def happen(self) -> AsyncIterator[None]:
        async with self.project.connect() as connection:
            assets = await self.tenant.insert(self.tenant.choose(self.images), connection)
            self.note()
            yield
            await connection.commit()
        self.project.ledger.expect(assets)


class OddClaims(Automatic):
    """Rows are inserted with a token that is not one of Supabase's."""

    name = "odd claims in automatic mode"
    CLAIMS = (
        '{"role": "authenticated", "sub": "not-a-uuid"}', '{"role": "authenticated", "sub": 42}', "[]", '"x"', "null",
        '{"role": {}, "sub": null}', "not JSON",
    )  # fmt: skip
    refused = 0  # inserts that were aborted because of their claims

    @contextlib.asynccontextmanager
    async def happen(self) -> AsyncIterator[None]:
        for claims in self.CLAIMS:
            async with self.project.connect() as connection:
                await connection.execute("select set_config('request.jwt.claims', %s, true)", (claims,))
                try:
                    assets = await self.tenant.insert(self.tenant.choose(1), connection)
                    await connection.commit()
                except psycopg.Error:
                    self.refused += 1
                else:
                    # Without a usable claim, autotag may leave the row to enqueue_tagging.
                    self.project.ledger.expect(assets, TAGGED | (UNSURE - {"gone"}))
            self.note()
        yield


class Storm(Hostility):
    """A thousand images at once."""

    name = "an upload of 1,000 images"
    images = 1000
    seconds = ONCE

    @contextlib.asynccontextmanager
    async def happen(self) -> AsyncIterator[None]:
        async with super().happen():
            self.note()
            yield


UPLOADS: tuple[type[Hostility], ...] = (AutomaticStorm, OpenInsert, OddClaims, Storm)
