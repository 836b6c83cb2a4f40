"""Workers that are killed and restarted, and whose connections break."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import psycopg

from lab.chaos.auditor import compare_books, read_books
from lab.chaos.forks import Forked, Forks
from lab.chaos.tenants import Project
from lab.proxy import Proxy
from lab.stack import WORKER_ROLE, Stack

SLOTS = 16  # single calls in flight of each worker: this many answers can be lost with it
STOP = 60.0  # seconds that a worker may take to stop
STALL = 1.0  # seconds that a connection stalls: less than two heartbeats, so that no lease is lost
KILL = "worker killed"


@dataclass
class Crew:
    """Some workers, which connect through a proxy. Each is replaced as soon as it has ended."""

    forks: Forks
    project: Project
    log: Path
    size: int
    proxy: Proxy
    kills: list[float] = field(default_factory=list)  # epoch seconds
    fallen: list[str] = field(default_factory=list)  # workers that ended by themselves, as sentences
    terminated: int = 0  # sessions ended by pg_terminate_backend
    _living: list[Forked] = field(default_factory=list)
    _stopping: set[int] = field(default_factory=set)

    @property
    def breaks(self) -> Counter[str]:
        """The breaks so far, by kind."""
        return self.proxy.breaks + Counter({KILL: len(self.kills), "session terminated": self.terminated})

    @contextlib.asynccontextmanager
    async def work(self) -> AsyncIterator[None]:
        """Keeps the workers running; stops them with SIGTERM at the end."""
        keepers = [asyncio.create_task(self._keep()) for _ in range(self.size)]
        try:
            yield
        finally:
            for worker in self._living:
                self._stopping.add(worker.pid)
                worker.send_signal(signal.SIGTERM)
            _, late = await asyncio.wait(keepers, timeout=STOP)
            if late:
                self.fallen += [f"worker {worker.pid} did not stop within {STOP:g} s" for worker in self._living]
            for task in late:
                task.cancel()
            for worker in self._living:
                worker.kill()

    async def _keep(self) -> None:
        """Runs one worker after another."""
        while True:
            worker = await self.forks.start(self._environment(), self.log)
            self._living.append(worker)
            code = await worker.wait()
            self._living.remove(worker)
            if worker.pid in self._stopping:
                if code:
                    self.fallen.append(f"worker {worker.pid} was stopped and ended with {code}; its log is {self.log}")
                return
            if code != -signal.SIGKILL:
                self.fallen.append(f"worker {worker.pid} ended by itself with {code}; its log is {self.log}")
                await asyncio.sleep(0.5)  # if workers end at once, do not keep the machine busy with restarts

    def _environment(self) -> dict[str, str]:
        environment = self.project.stack.worker_environment()
        return {
            "PATH": os.environ.get("PATH", ""),
            **environment,
            "DATABASE_URL": self.proxy.url(environment["DATABASE_URL"]),
            "AUTOTAG_SLOTS": str(SLOTS),
        }

    def audit(self) -> list[str]:
        """A sentence for each violation of a promise so far."""
        ledger = self.project.ledger
        books = read_books(
            self.project.stack, ledger.truth, [], may_be_lost=SLOTS * len(self.kills), client_heard_all=False
        )
        books.ends, books.pictures, books.kills, books.fallen = ledger.ends, ledger.pictures, self.kills, self.fallen
        return compare_books(books)

    def kill(self, rng: random.Random) -> bool:
        """Kills one worker; False: none is running."""
        if not self._living:
            return False
        self.kills.append(time.time())
        rng.choice(self._living).kill()
        return True

    async def cut(self, rng: random.Random) -> bool:
        """Breaks one connection in one way; False: none was open."""
        match rng.randrange(5):
            case 0:
                return self.proxy.lose_reply(rng)
            case 1:
                return self.proxy.drop_bytes(rng)
            case 2:
                return self.proxy.reset(rng)
            case 3:
                return await self.proxy.stall(rng, STALL)
        done = await asyncio.to_thread(terminate, self.project.stack, rng)
        self.terminated += done
        return done


def terminate(stack: Stack, rng: random.Random) -> bool:
    """Ends one session of a worker; False: there is none."""
    with psycopg.connect(stack.database_url("supabase_admin"), autocommit=True) as admin:
        pids = [row[0] for row in admin.execute("select pid from pg_stat_activity where usename = %s", (WORKER_ROLE,))]
        return bool(pids) and bool(admin.execute("select pg_terminate_backend(%s)", (rng.choice(pids),)).fetchone())
