"""Waiting outcomes are stored in turns, so a workspace that takes too long delays no other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import cast

import psycopg
import pytest

from autotag.db import Busy, Database, TooSlow
from autotag.db.lanes import Stored, Unstored
from autotag.db.messages import Notice
from autotag.worker import store
from autotag.worker.slow import SlowWorkspaces
from autotag.worker.store import MAX_LIMIT, STORES, StoreLane
from autotag.worker.wake import Wake
from support import soon

BLUE, RED = "blue", "red"


class FakeDatabase:
    """A database with waiting outcomes. slow: the workspaces of which one call can store only this many."""

    def __init__(self) -> None:
        self.waiting: dict[str, int] = {}
        self.slow: dict[str, int] = {}
        self.later: float | None = None
        self.calls: list[tuple[str, int]] = []
        self.tried: list[tuple[str, list[int]]] = []
        self.postponed: list[tuple[str, list[int]]] = []
        self.lists = 0
        self.running: list[str] = []
        self.most = 0
        self.refuse: Callable[[str], Exception | None] = lambda _: None

    async def list_unstored(self) -> Unstored:
        self.lists += 1
        if error := self.refuse("list"):
            raise error
        return Unstored([workspace for workspace, n in self.waiting.items() if n], self.later)

    async def pick_unstored(self, workspace: str, limit: int) -> list[int]:
        self.calls.append((workspace, limit))
        return list(range(self.waiting[workspace]))[:limit]

    async def store_waiting(self, workspace: str, tasks: Sequence[int]) -> Stored:
        assert workspace not in self.running, "two calls for one workspace"
        self.tried.append((workspace, list(tasks)))
        self.running.append(workspace)
        self.most = max(self.most, len(self.running))
        try:
            await asyncio.sleep(0.001)
            if error := self.refuse(workspace):
                raise error
            if len(tasks) > self.slow.get(workspace, MAX_LIMIT):
                raise TooSlow("ten seconds")
        finally:
            self.running.remove(workspace)
        stored = len(tasks)
        self.waiting[workspace] -= stored
        return Stored(stored, self.waiting[workspace] > 0, [])

    async def postpone_stores(self, workspace: str, tasks: Sequence[int], *, lost: bool = False) -> list[Notice]:
        self.postponed.append((workspace, list(tasks)))
        return []

    def of(self, workspace: str) -> list[int]:
        return [limit for called, limit in self.calls if called == workspace]


class Bench:
    """A store lane with everything that it needs."""

    def __init__(self) -> None:
        self.db, self.wake, self.slow = FakeDatabase(), Wake(), SlowWorkspaces()
        self.lane = StoreLane(cast("Database", self.db), self.wake, self.slow, lambda _: None)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        task = asyncio.create_task(self.lane.run())
        yield
        assert not task.done(), "data ended the worker"
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(store, "LIST_RETRY", 0.001)
    monkeypatch.setattr(store, "BACKOFF", 0.01)
    return Bench()


async def test_the_lane_stores_what_waits_at_its_start_and_after_a_notification(bench: Bench) -> None:
    bench.db.waiting = {BLUE: 3}
    async with bench.running():
        await soon(lambda: not bench.db.waiting[BLUE])
        bench.db.waiting[RED] = 2 * MAX_LIMIT
        bench.wake.notify("store")
        await soon(lambda: not bench.db.waiting[RED])
    assert bench.db.calls == [(BLUE, MAX_LIMIT), (RED, MAX_LIMIT), (RED, MAX_LIMIT)]


async def test_the_lane_wakes_by_itself_when_outcomes_are_due(bench: Bench) -> None:
    bench.db.later = 0.01
    async with bench.running():
        await soon(lambda: bench.db.lists == 1)
        bench.db.waiting = {BLUE: 1}
        await soon(lambda: not bench.db.waiting[BLUE])


async def test_without_notifications_the_lane_polls(bench: Bench) -> None:
    bench.wake.poll_every = 0.01
    async with bench.running():
        await soon(lambda: bench.db.lists > 3)


async def test_after_a_timeout_fewer_are_tried_and_others_go_first(bench: Bench) -> None:
    bench.db.waiting = {BLUE: 8, **{f"workspace {n}": 1 for n in range(20)}}
    bench.db.slow = {BLUE: 3}
    async with bench.running():
        await soon(lambda: not any(bench.db.waiting.values()))
    assert bench.db.of(BLUE)[:2] == [500, 1], "a tenth of the eight that were tried"
    tried = [tasks for workspace, tasks in bench.db.tried if workspace == BLUE]
    assert [tasks for _, tasks in bench.db.postponed[:1]] == tried[:1], "those that took too long, and no others"
    order = [workspace for workspace, _ in bench.db.calls]
    second = order.index(BLUE, order.index(BLUE) + 1)
    assert second > len(set(order)) - STORES, f"the others waited for it: {order}"
    assert bench.db.most == STORES
    assert BLUE in bench.slow
    assert "workspace 1" not in bench.slow


async def test_the_number_grows_again_after_successes(bench: Bench) -> None:
    bench.db.waiting, bench.db.slow = {BLUE: 2000}, {BLUE: 1}
    async with bench.running():
        await soon(lambda: 1 in bench.db.of(BLUE))
        bench.db.slow = {}
        await soon(lambda: not bench.db.waiting[BLUE])
    grown = bench.db.of(BLUE)[bench.db.of(BLUE).index(1) :]
    assert grown[:10] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 500]


async def test_calls_that_succeed_slowly_do_not_grow(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "GROWTH_SECONDS", 0.0)
    bench.db.waiting, bench.db.slow = {BLUE: 20}, {BLUE: 5}
    async with bench.running():
        await soon(lambda: not bench.db.waiting[BLUE])
    assert bench.db.of(BLUE) == [500, *[2] * 10]


async def test_slow_workspaces_share_one_turn(bench: Bench) -> None:
    """A fast workspace does not wait for slow ones, however many there are."""
    slow = [f"slow {n}" for n in range(6)]
    for workspace in slow:
        bench.slow.mark(workspace)
    bench.db.waiting = dict.fromkeys(slow, 1)
    held, together = asyncio.Event(), 0
    store_waiting = bench.db.store_waiting

    async def hold_the_slow(workspace: str, tasks: Sequence[int]) -> Stored:
        nonlocal together
        if workspace in slow:
            together += 1
            await held.wait()
            together -= 1
        return await store_waiting(workspace, tasks)

    bench.db.store_waiting = hold_the_slow  # type: ignore[method-assign]
    async with bench.running():
        await soon(lambda: together == 1)
        for n in range(5):
            bench.db.waiting[f"quiet {n}"] = 1
            bench.wake.notify("store")
            await soon(lambda n=n: not bench.db.waiting[f"quiet {n}"])  # type: ignore[misc]
            assert together == 1
        held.set()
        await soon(lambda: not any(bench.db.waiting.values()))
    assert [workspace for workspace, _ in bench.db.calls if workspace in slow] == slow, "in turn"


async def test_what_another_worker_stores_is_not_asked_for_without_end(bench: Bench) -> None:
    """Another worker has locked the rows, so a call stores nothing although more is due. Then the next call waits
    longer each time."""
    held = 5

    async def held_by_another(workspace: str, tasks: Sequence[int]) -> Stored:
        nonlocal held
        held -= 1
        if held <= 0:
            bench.db.waiting[workspace] = 0
        return Stored(0, held > 0, [])

    bench.db.store_waiting = held_by_another  # type: ignore[method-assign]
    bench.db.waiting = {BLUE: 1}
    started = asyncio.get_running_loop().time()
    async with bench.running():
        await soon(lambda: not bench.db.waiting[BLUE])
    assert asyncio.get_running_loop().time() - started >= 0.01 + 0.02 + 0.04 + 0.08
    assert len(bench.db.calls) == 5


@pytest.mark.parametrize(
    "error", [psycopg.InternalError("bug"), Busy("deadlock"), TooSlow("ten seconds"), RuntimeError("bug")]
)
async def test_no_error_ends_the_lane(bench: Bench, error: Exception) -> None:
    left = {"list": 0 if isinstance(error, RuntimeError) else 3, BLUE: 3}

    def refuse(what: str) -> Exception | None:
        left[what] = left.get(what, 0) - 1
        return error if left[what] >= 0 else None

    bench.db.refuse = refuse
    bench.db.waiting = {BLUE: 1, RED: 1}
    async with bench.running():
        await soon(lambda: not any(bench.db.waiting.values()))
