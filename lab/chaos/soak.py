"""A long run: uploads without a break, a worker that is never restarted beside one that is all the time, faults of the
provider, housekeeping. Whether memory and tables stay as they are, and whether everything is tagged in the end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import timedelta

from lab.chaos.forks import Forks, fork_server
from lab.chaos.run import SETTINGS, Chaos
from lab.machine import memory
from lab.stack import worker_process

KEEP = 10.0  # seconds: finished uploads are kept: a month's retention in a sixth of a minute
HOUSEKEEPING = 5.0  # seconds: a day's
RESTART = 4.0  # seconds that the other worker lives
FAULTS_EVERY = 4.0  # seconds
SAMPLE = 1.0  # seconds
MOST_LIVE = 4  # uploads of each size under way
SIZES = """
    select coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint from pg_class c
    where c.relkind = 'r' and c.relnamespace = 'autotag'::regnamespace"""


@dataclass
class Lived:
    """What was seen."""

    uploads: int = 0
    images: int = 0
    restarts: int = 0
    faults: int = 0
    lost: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # megabytes of the worker that was never restarted
    tables: list[float] = field(default_factory=list)  # megabytes of autotag's tables with their indexes


class Soak(Chaos):
    """One stack for a long time."""

    async def live(self, seconds: float, told: Callable[[str], None], pause: float = 0.1, pace: float = 1.0) -> Lived:
        """So many seconds of it, and then as long as what is under way takes.

        Args:
            seconds: how long.
            told: hears of it twice a minute.
            pause: seconds between two rounds of uploads, at least.
            pace: how many times faster than usual restarts, faults and housekeeping follow each other.
        """
        lived = Lived()
        self._stack.configure(**SETTINGS | {"keep_finished": timedelta(seconds=KEEP / pace)})
        self._lift_daily_limit()
        plan = self._stack.simulator.plan
        plan.latency, plan.batch_latency = (0.01, 0.1), (0.3, 0.8)
        await self._store_pictures()
        until = time.monotonic() + seconds
        async with self._ticks(), fork_server() as forks, self._steady() as steady:
            around = (
                self._restart(forks, lived, pace),
                self._trouble(lived, pace),
                self._keep_house(pace),
                self._sample(steady.pid, lived, told, pace),
            )
            helpers = [asyncio.create_task(work) for work in around]
            while time.monotonic() < until:
                if await asyncio.to_thread(self._count_live) < MOST_LIVE:
                    await asyncio.to_thread(self._upload)
                    lived.uploads += 1
                await asyncio.sleep(pause)
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
            self._stack.simulator.faults.clear()
            await self._finish(forks)
            if steady.returncode is not None:
                lived.lost.append(f"the steady worker ended with {steady.returncode}; its log is {self._log}")
        lived.images = len(self._truth)
        lived.lost += self._missing()
        self._owner.close()
        return lived

    def _lift_daily_limit(self) -> None:
        """An hour of this makes more than tier 1's 10,000 single calls a day: the rest would wait for tomorrow."""
        self._stack.simulator.limits.day = None
        with self._owner.transaction() as owner:
            owner.execute("update autotag.provider_limits set requests_per_day = null")

    def _count_live(self) -> int:
        with self._owner.transaction() as owner:
            row = owner.execute("select count(*) from autotag.jobs where finished_at is null").fetchone()
        assert row is not None
        return int(row[0])

    def _missing(self) -> list[str]:
        """Images without their own tags."""
        with self._owner.transaction() as owner:
            rows = owner.execute("select id::text, tagging_stage, tags, tagging_error from public.assets").fetchall()
        return [
            f"image {asset} ended as {stage}: {error}" for asset, stage, tags, error in rows
            if stage != "completed" or set(tags) != self._truth[asset]
        ]  # fmt: skip

    @contextlib.asynccontextmanager
    async def _steady(self) -> AsyncIterator[asyncio.subprocess.Process]:
        """The worker that is never restarted: the command itself, whose memory is measured."""
        with self._log.open("ab") as log:
            async with worker_process(self._environment(), log) as process:
                yield process

    async def _restart(self, forks: Forks, lived: Lived, pace: float) -> None:
        for number in itertools.count():
            async with self._worker(forks) as worker:
                await asyncio.sleep(RESTART / pace)
                worker.send_signal(signal.SIGKILL if number % 2 else signal.SIGTERM)
                await worker.wait()
                lived.restarts += 1

    async def _trouble(self, lived: Lived, pace: float) -> None:
        while True:
            await asyncio.sleep(FAULTS_EVERY / pace)
            self._add_faults()
            lived.faults = self.report.faults

    async def _keep_house(self, pace: float) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING / pace)
            await asyncio.to_thread(self._execute, "select autotag.housekeeping()")

    async def _sample(self, pid: int, lived: Lived, told: Callable[[str], None], pace: float) -> None:
        for number in itertools.count():
            await asyncio.sleep(SAMPLE / pace)
            lived.memory.append(memory(pid, "VmRSS"))
            lived.tables.append(await asyncio.to_thread(self._execute, SIZES) / 1e6)
            if number % 30 == 29:
                told(
                    f"{lived.uploads} rounds of uploads, {lived.restarts} restarts, {lived.faults} faults;"
                    f" the worker has {lived.memory[-1]:.0f} MB, the tables {lived.tables[-1]:.1f} MB"
                )

    def _execute(self, statement: str) -> int:
        with self._owner.transaction() as owner:
            row = owner.execute(statement.encode()).fetchone()
        return int(row[0] or 0) if row and isinstance(row[0], int) else 0


def growth(samples: list[float]) -> float:
    """The median of the last quarter ÷ that of the second one (the first is the start)."""
    quarter = max(len(samples) // 4, 1)
    early, late = sorted(samples[quarter : 2 * quarter]), sorted(samples[-quarter:])
    return late[len(late) // 2] / early[len(early) // 2]
