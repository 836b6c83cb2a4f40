"""A call that takes too long is cancelled, and costs neither its connection nor those of other purposes."""

from __future__ import annotations

import asyncio
import json
import random
import uuid
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest

import autotag
from autotag.db import Busy, Database, Lost, NotHeld, TooSlow, VersionsDiffer
from autotag.db.connections import (
    FOREIGN_CODE,
    HOST_PURPOSES,
    HOST_SHARE,
    MAX_LOSSES,
    POOL_SIZE,
    SHARES,
    Connections,
    Purpose,
    _is_broken,
)
from autotag.db.messages import Registered
from autotag.db.readers import nothing
from lab.proxy import Proxy
from support import PATIENCE, Library, until

SLEEPERS = "select count(*) as n from pg_stat_activity where state = 'active' and query like 'select pg_sleep%%'"


@pytest.fixture
async def connections(library: Library) -> AsyncIterator[Connections]:
    made = Connections(library.stack.database_url())
    await made.open()
    yield made
    await made.close()


async def backend(connections: Connections, purpose: Purpose) -> int:
    return await connections.call_once(purpose, int, "select pg_backend_pid()")


async def test_a_cancelled_statement_ends_in_the_server_and_leaves_the_connection_usable(
    library: Library, connections: Connections
) -> None:
    before = await backend(connections, "describe")
    for _ in range(3):
        with pytest.raises(TooSlow):
            await connections.call_once("describe", nothing, "select pg_sleep(%s)", PATIENCE, within=0.1)
        assert library.sql(SLEEPERS)[0]["n"] == 0, "the server goes on with it"
        assert await backend(connections, "describe") == before, "the connection was given up"


async def test_errors_that_callers_handle_have_names(library: Library, connections: Connections) -> None:
    await connections.call_once("claim", nothing, "select set_config('statement_timeout', '50ms', false)")
    with pytest.raises(TooSlow):
        await connections.call_once("claim", nothing, "select pg_sleep(%s)", PATIENCE)
    await connections.call_once("claim", nothing, "select set_config('lock_timeout', '20ms', false)")
    assets = library.insert(["a.jpg"])
    with psycopg.connect(library.stack.database_url()) as other:
        other.execute("select from public.assets where id = %s for update", (assets[0],))
        with pytest.raises(Busy):
            await connections.call_once("claim", nothing, "select id from public.assets for update")


@pytest.mark.parametrize("purpose", FOREIGN_CODE)
async def test_what_foreign_code_sets_for_a_session_is_undone(connections: Connections, purpose: Purpose) -> None:
    for _ in range(2 * SHARES[purpose]):
        await connections.call_once(purpose, nothing, "select set_config('statement_timeout', '1ms', false)")
    for _ in range(2 * SHARES[purpose]):
        assert await connections.call_once(purpose, str, "select current_setting('statement_timeout')") == "0"


async def test_every_purpose_gets_a_connection_while_the_others_are_stuck(
    library: Library, connections: Connections
) -> None:
    """While calls that touch the host's rows are stuck, heartbeats, claims and reports of other workspaces still get
    connections."""
    stuck = [
        asyncio.create_task(connections.call_once(purpose, nothing, "select pg_sleep(%s)", PATIENCE))
        for purpose in ("describe", *HOST_PURPOSES, "other")
        for _ in range(SHARES[purpose] + 2)  # type: ignore[index]
    ] + [
        asyncio.create_task(connections.call_once("settle", nothing, "select pg_sleep(%s)", PATIENCE)) for _ in range(2)
    ]
    expected = SHARES["describe"] + HOST_SHARE + SHARES["other"] + 2
    await until(lambda: library.sql(SLEEPERS)[0]["n"] == expected, "the calls to be stuck")
    async with asyncio.timeout(PATIENCE / 2):
        for purpose in ("lease", "claim", "settle"):
            await backend(connections, purpose)  # type: ignore[arg-type]
    assert library.sql(
        "select count(*) <= %s as ok from pg_stat_activity where application_name = 'autotag'", POOL_SIZE
    )[0]["ok"]
    for task in stuck:
        task.cancel()
    await asyncio.gather(*stuck, return_exceptions=True)
    assert library.sql(SLEEPERS)[0]["n"] == 0


async def test_outcomes_that_were_committed_just_before_the_timeout_count_once(library: Library) -> None:
    """The worker does not know that a call was committed, so it sends the same reports again with `keep`."""
    [asset] = library.insert(["a.jpg"])
    library.enqueue([asset])
    db = Database(library.stack.database_url(), uuid.uuid4())
    await db.open()
    try:
        await db.register("test", autotag.__version__, True, "http://test", "test")
        library.sql("update autotag.provider_limits set proven_at = now()")
        claim = await db.claim(1, 10)
        again = await db.claim(1, 10)
        assert claim.tasks == again.tasks, "the same number is the same claim"
        [image] = await db.describe_tasks(1, claim.tasks)
        assert (image.workspace, image.claim) == (str(library.member.workspace), 1)
        report: Any = {
            "task": image.task, "attempt": image.attempt, "mark": image.mark, "called": True,
            "usage": {"input": 100, "cached": 0, "cache_write": 0, "output": 10, "reasoning": 0, "model": "m", "tier": None},
            "result": {"tags": ["red"], "confidence": {"red": 1.0}, "caption": "Red.", "model": "m"},
        }  # fmt: skip
        assert (await db.settle(image.workspace, [report], None, keep=False)).accepted == 1
        assert (await db.settle(image.workspace, [report], None, keep=True)).accepted == 0
        [row] = library.assets().values()
        assert (row["tagging_stage"], row["tags"]) == ("completed", ["red"])
        [usage] = library.sql("select sum(requests) as n from autotag.usage")
        assert usage["n"] == 1, json.dumps(usage, default=str)
        beat = await db.heartbeat([1], [0])
        assert (beat.alive, beat.lost) == (True, False)
        library.stack.configure(lease="6 s", batch_max_bytes=1234)
        assert (await db.heartbeat([1], [0])).settings == Registered(6, 1234), "settings need no restart"
        assert (await db.claim_batches(1, 1)).settings.batch_max_bytes == 1234
    finally:
        await db.close()


async def test_what_the_worker_does_not_list_is_taken_back(library: Library) -> None:
    library.enqueue(library.insert([f"{n}.jpg" for n in range(3)]))
    db = Database(library.stack.database_url(), uuid.uuid4())
    await db.open()
    try:
        await db.register("test", autotag.__version__, True, "http://test", "test")
        library.sql("update autotag.provider_limits set proven_at = now()")
        lost = await db.claim(1, 1)
        held = await db.claim(2, 1)
        assert len(lost.tasks) == len(held.tasks) == 1
        assert not (await db.heartbeat([1], [0])).lost, "a claim after the listed ones is newer than the list"
        assert await db.release_lost([1], [0]) == 0
        assert (await db.heartbeat([2], [0])).lost
        assert await db.release_lost([2], [0]) == 1
        assert not (await db.heartbeat([2], [0])).lost
        [row] = library.sql("select worker_id from autotag.tasks where id = %s", held.tasks[0])
        assert row["worker_id"] == db.worker
    finally:
        await db.close()


REMOVE = "create function public.deallocate() returns integer language plpgsql as $$ begin {}; return 1; end $$"


@pytest.mark.parametrize(
    ("code", "moments"), [("deallocate all", {10, 20}), ("prepare _pg3_0 as select 1", {2})], ids=["remove", "add"]
)
async def test_prepared_statements_of_foreign_code_do_no_harm(
    library: Library, connections: Connections, code: str, moments: set[int]
) -> None:
    """The host's code removes prepared statements. Without a repeat, the next calls would fail, and paid answers could
    be lost."""
    library.sql(REMOVE.format(code).replace("%", "%%"))
    before = await backend(connections, "describe")
    for number in range(30):  # from the sixth call on, psycopg prepares a statement
        assert await connections.call_once("describe", int, "select %s::integer", number) == number
        if number in moments:
            await connections.call_once("describe", nothing, "select public.deallocate()")
    assert await backend(connections, "describe") == before, "the connection was given up"


async def test_a_call_that_ends_its_session_each_time_is_given_up(library: Library, connections: Connections) -> None:
    with psycopg.connect(library.stack.database_url("supabase_admin"), autocommit=True) as admin:
        admin.execute("""
            create sequence public.ended;
            create function public.die() returns void language plpgsql security definer as $$
            begin
              perform nextval('public.ended'), pg_terminate_backend(pg_backend_pid());
              perform pg_sleep(60);
            end $$""")
        with pytest.raises(Lost):
            await connections.call("settle", nothing, "select public.die()")
        assert admin.execute("select last_value from public.ended").fetchone() == (MAX_LOSSES + 1,)


async def test_a_server_that_is_away_uses_up_no_tries(library: Library) -> None:
    """While the server is away, a call waits for it. Neither the lost connection nor the missing ones end the call."""
    proxy = Proxy(library.stack.database_url())
    connections = Connections(proxy.url())
    try:
        async with proxy.serve():
            await connections.open()
            await backend(connections, "settle")
        for _ in range(10):
            proxy.reset(random.Random(1))
            await asyncio.sleep(0.05)
        call = asyncio.create_task(connections.call("settle", int, "select 7"))
        _, still = await asyncio.wait([call], timeout=3)
        assert still, "it does not wait for the server"
        async with proxy.serve(), asyncio.timeout(PATIENCE):
            assert await call == 7
    finally:
        await connections.close()


@pytest.mark.parametrize("state", ["PT409", "PT426", "PT503"])
async def test_what_foreign_code_raises_is_not_taken_for_autotags_own(connections: Connections, state: str) -> None:
    """The host raises PT409 or PT426. From autotag, the first would stop the work on a batch, and the second the
    worker."""
    with pytest.raises(psycopg.DatabaseError, match="the host says no"):
        await connections.call_once(
            "batch", nothing, f"do $$ begin raise exception 'the host says no' using errcode = '{state}'; end $$"
        )


async def test_autotags_own_refusals_have_names(library: Library, connections: Connections) -> None:
    library.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", uuid.UUID(int=1))
    with pytest.raises(NotHeld):
        await connections.call_once(
            "batch", nothing, "select autotag.batch_finish(%s, %s, 1)", uuid.UUID(int=1), uuid.UUID(int=2)
        )
    with pytest.raises(VersionsDiffer):
        await connections.call_once(
            "lease", nothing, "select autotag.register_worker(%s, 'test', '9.9.9', true)", uuid.UUID(int=1)
        )


@pytest.mark.parametrize(
    ("code", "again"),
    [("55000", False), ("54000", False), ("P0001", False), ("57P01", True), ("58030", True), ("53300", True)],
)
def test_an_error_that_a_statement_raises_is_no_broken_connection(code: str, again: bool) -> None:
    """A call is repeated until it succeeds while the connection or the server is the cause, and the host can raise any code."""
    assert _is_broken(psycopg.errors.lookup(code)()) is again
