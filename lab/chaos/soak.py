"""A long run with uploads without a pause, faults of the provider and housekeeping. One worker is never restarted,
another one all the time. Checks whether memory and tables keep their size, and whether everything is tagged at the
end."""

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
from lab.chaos.run import ROUND_END, SETTINGS, Chaos
from lab.machine import memory
from lab.stack import worker_process

KEEP = 10.0  # seconds that finished uploads are kept, instead of a month
HOUSEKEEPING = 5.0  # seconds between two runs, instead of a day
RESTART = 4.0  # seconds that the other worker lives
FAULTS_EVERY = 4.0  # seconds
SAMPLE = 1.0  # seconds
MAX_LIVE = 4  # max uploads of each size in progress
SIZES = """
    select coalesce(sum(pg_total_relation_size(c.oid)), 0)::bigint from pg_class c
    where c.relkind = 'r' and c.relnamespace = 'autotag'::regnamespace"""


@dataclass
class Lived:
    """The measurements."""

    uploads: int = 0
    images: int = 0
    restarts: int = 0
    faults: int = 0
    lost: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # megabytes of the worker that was never restarted
    tables: list[float] = field(default_factory=list)  # megabytes of autotag's tables with their indexes


@dataclass(frozen=True)
class Least:
    """The minimum that a short run must show."""

    restarts: int = 0
    faults: int = 0
    images: int = 0

    def reached(self, lived: Lived, images: int) -> bool:
        return lived.restarts >= self.restarts and lived.faults >= self.faults and images >= self.images


class Soak(Chaos):
    """One stack for a long time."""

    async def live(
        self,
        seconds: float,
        on_progress: Callable[[str], None],
        pause: float = 0.1,
        pace: float = 1.0,
        least: Least | None = None,
    ) -> Lived:
        """Runs for ``seconds``, then waits until everything in progress has ended.

        Args:
            seconds: how long, from when the steady worker has tagged its first upload.
            on_progress: called with the progress twice a minute.
            pause: min seconds between two rounds of uploads.
            pace: how many times faster than usual restarts, faults and housekeeping follow each other.
            least: the minimum that must have happened before the end, however long that takes on a busy machine.
        """
        lived, least = Lived(), least or Least()
        self._stack.configure(**SETTINGS | {"keep_finished": timedelta(seconds=KEEP / pace)})
        self._lift_daily_limit()
        plan = self._stack.simulator.plan
        plan.latency, plan.batch_latency = (0.01, 0.1), (0.3, 0.8)
        await self._store_pictures()
        async with self._ticks(), fork_server() as forks, self._steady() as steady:
            await self._warm_up()
            until = time.monotonic() + seconds
            around = (
                self._restart(forks, lived, pace),
                self._trouble(lived, pace),
                self._keep_house(pace),
                self._sample(steady.pid, lived, on_progress, pace),
            )
            helpers = [asyncio.create_task(work) for work in around]
            while time.monotonic() < until or not least.reached(lived, len(self._truth)):
                if await asyncio.to_thread(self._count_live) < MAX_LIVE:
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

    async def _warm_up(self) -> None:
        """Makes one upload, which the steady worker tags alone. Before that, its memory would only show its imports."""
        await asyncio.to_thread(self._upload)
        deadline = time.monotonic() + ROUND_END
        while await asyncio.to_thread(self._count_live):
            await asyncio.sleep(0.1)
            if time.monotonic() > deadline:
                break  # missing images are reported at the end

    def _lift_daily_limit(self) -> None:
        """Removes the daily limit. In an hour, the run makes more than tier 1's 10,000 single calls a day, and the rest
        would wait until tomorrow."""
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

    async def _sample(self, pid: int, lived: Lived, on_progress: Callable[[str], None], pace: float) -> None:
        for number in itertools.count():
            await asyncio.sleep(SAMPLE / pace)
            lived.memory.append(memory(pid, "VmRSS"))
            lived.tables.append(await asyncio.to_thread(self._execute, SIZES) / 1e6)
            if number % 30 == 29:
                on_progress(
                    f"{lived.uploads} rounds of uploads, {lived.restarts} restarts, {lived.faults} faults;"
                    f" the worker has {lived.memory[-1]:.0f} MB, the tables {lived.tables[-1]:.1f} MB"
                )

    def _execute(self, statement: str) -> int:
        with self._owner.transaction() as owner:
            row = owner.execute(statement.encode()).fetchone()
        return int(row[0] or 0) if row and isinstance(row[0], int) else 0


def growth(samples: list[float]) -> float:
    """The median of the last quarter ÷ the median of the second quarter (the first one includes the start)."""
    quarter = max(len(samples) // 4, 1)
    early, late = sorted(samples[quarter : 2 * quarter]), sorted(samples[-quarter:])
    return late[len(late) // 2] / early[len(early) // 2]
