"""Rounds of uploads under workers that die, a provider that fails and a database that restarts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import psycopg
from realtime import AsyncRealtimeClient, BroadcastPayload

from lab.chaos.auditor import Books, compare_books, read_books
from lab.chaos.doomed import POINTS
from lab.chaos.forks import Forked, Forks, fork_server
from lab.chaos.hostile_triggers import ALL_KINDS
from lab.chaos.hostilities import Hostility, happen_often
from lab.chaos.tenants import Ledger, Project, Tenant, open_project
from lab.chaos.ticks import ticking
from lab.kept import KeptConnections
from lab.openai_sim.faults import Fault
from lab.pictures import draw
from lab.postgres import LocalPostgres
from lab.stack import Member, Stack

#: Settings with which small uploads use every strategy: single calls, chunks, one batch, several batches.
UPLOADS = (2, 4, 9, 24)
SETTINGS = {
    "realtime_max_images": 2, "chunk_max_images": 5, "batch_max_images": 12, "batch_split_images": 12,
    "express_images": 1, "chunk_delay": "0.1 s", "retry_delay": "0.05 s", "retry_delay_max": "1 s",
    "batch_poll_interval": "0.3 s", "batch_create_grace": "0.5 s", "lease": "2 s", "account_probe_interval": "0.3 s",
    "realtime_requests_per_minute": 100_000, "realtime_tokens_per_minute": 2_000_000_000, "max_failures": 1000,
    "batch_batches_per_hour": 100_000, "batch_images_per_hour": 10_000_000, "broadcast_interval": "0.2 s",
    "upload_quiet": "0.3 s", "upload_longest": "3 s",
}  # fmt: skip
SLOTS = 4  # slots of each worker: this many answers can be lost with it
KILLS_PER_ROUND = 10
NEIGHBOURS_AT_ONCE, NEIGHBOUR_FILES = 6, 14
MAX_IMAGES = 100  # uploaded by a neighbour each time
FAULTS_AT_ONCE = 4
LIFE = 5.0  # seconds that a worker has to reach its point; then it is killed wherever it is
HEARING = 10.0  # seconds that the last broadcast may take to reach the client
ROUND_END = 90.0  # seconds that healthy workers may take to end a round
TICK = 0.3  # seconds between ticks, instead of pg_cron's minute

FAULTS = (
    Fault(cut=True, times=2),
    Fault(status=500, times=2),
    Fault(status=429, code="rate_limit_exceeded", headers={"retry-after": "0.3"}),
    Fault(where="POST /v1/files", status=500),
    Fault(where="POST /v1/files", after=True),
    Fault(where="POST /v1/batches", after=True),
    Fault(where="POST /v1/batches", status=503),
    Fault(where="POST /v1/batches", status=400, message="Cannot find file x, or project has no access to it."),
    Fault(where="GET /v1/batches", cut=True),
    Fault(where="GET /v1/batches", status=401, code="invalid_api_key"),
    Fault(where="GET /v1/files/", status=502),
    Fault(where="GET /v1/files/", cut=True),
    Fault(where="GET /v1/files/", slow=1),
    Fault(where="DELETE /v1/files", status=500),
    Fault(where="VALIDATE", code="token_limit_exceeded", message="Enqueued token limit reached."),
    Fault(where="RUN", expire_at=0.4),
    Fault(where="BATCH", status=500, times=3),
    *(
        Fault.model_validate({"where": "OUTPUT", "mangle": how})
        for how in ("truncate", "duplicate", "unknown", "missing", "status_0", "error_only", "garbage")
    ),
)


@dataclass
class Report:
    """What happened."""

    rounds: int = 0
    kills: int = 0
    points: set[str] = field(default_factory=set)
    restarts: int = 0
    faults: int = 0
    hostilities: set[str] = field(default_factory=set)
    images: int = 0
    violations: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.rounds} rounds, {self.kills} kills ({len(self.points)} of {len(POINTS)} points), "
            f"{self.restarts} restarts, {self.faults} faults, {len(self.hostilities)} hostilities, "
            f"{self.images} images: {len(self.violations)} violations"
        )


class Chaos:
    """One stack under attack."""

    def __init__(
        self, stack: Stack, server: LocalPostgres, *, seed: int, workers: int = 3, points: Sequence[str] = POINTS
    ) -> None:
        self.report = Report()
        self._stack = stack
        self._server = server
        self._owner = KeptConnections(stack.database_url())
        self._random = random.Random(seed)
        self._workers = workers
        self._points = points
        self._dooms = self._endless_dooms()
        self._truth: dict[str, frozenset[str]] = {}
        self._pictures: Counter[frozenset[str]] = Counter()
        self._heard: list[str] = []
        self._fallen: list[str] = []
        self._project: Project | None = None
        self._neighbours: list[Hostility] = []
        self._files: dict[Member, list[tuple[str, frozenset[str]]]] = {}
        self._log = Path(tempfile.mkdtemp(prefix="autotag-chaos-")) / "workers.log"

    def _endless_dooms(self) -> Iterator[str | None]:
        """Yields all points in random order and again from the start, mixed with deaths at random times."""
        while True:
            points: list[str | None] = [*self._points]
            points += [None] * (len(points) // 4)
            self._random.shuffle(points)
            yield from points

    async def run(
        self,
        *,
        kills: int,
        until: float | None = None,
        on_progress: Callable[[str], None] = print,
        neighbours: bool = True,
    ) -> Report:
        """Runs rounds until this many workers have died, and at least until a time of `time.monotonic`.

        Args:
            kills: workers that have to die.
            until: the earliest time to end.
            on_progress: called after every round.
            neighbours: whether hostile tenants share the database.
        """
        self._stack.configure(**SETTINGS)
        plan = self._stack.simulator.plan
        plan.latency, plan.batch_latency = (0.01, 0.1), (0.3, 0.8)
        await self._store_pictures()
        async with contextlib.AsyncExitStack() as around:
            around.callback(self._owner.close)
            if neighbours:
                await self._move_in(await around.enter_async_context(open_project(self._stack)))
            forks = await around.enter_async_context(fork_server())
            await around.enter_async_context(self._client())
            await around.enter_async_context(self._ticks())
            while self.report.kills < kills or (until is not None and time.monotonic() < until):
                await self._round(forks)
                on_progress(str(self.report))
                if self.report.violations:
                    on_progress(f"the workers' log: {self._log}")
                    break
        return self.report

    async def _round(self, forks: Forks) -> None:
        """Uploads with doomed workers, then healthy workers until everything has ended, then the auditor."""
        self.report.rounds += 1
        restart_after = self._random.randrange(KILLS_PER_ROUND) if self.report.rounds % 2 == 0 else None
        last = self.report.kills + KILLS_PER_ROUND
        hands = [asyncio.create_task(self._die_often(forks, last)) for _ in range(self._workers)]
        began = self.report.kills
        ending = asyncio.Event()
        hostile = self._make_trouble(ending)
        while not all(hand.done() for hand in hands):
            if not await self._live(of_ours=True):
                await asyncio.to_thread(self._upload)
                self._add_faults()
            if restart_after is not None and self.report.kills - began >= restart_after:
                restart_after = None
                await asyncio.to_thread(self._server.restart)
                self.report.restarts += 1
            await asyncio.sleep(0.1)
        ending.set()
        await asyncio.gather(*hands, *hostile)
        if self._project:
            await self._project.calm()
        self._stack.simulator.faults.clear()
        await self._finish(forks)
        deadline = time.monotonic() + HEARING
        while True:
            await asyncio.sleep(0.2)
            books = self._read_books()
            if self.report.restarts or len(books.received) >= len(books.sent) or time.monotonic() > deadline:
                break
        self.report.images = len(books.truth)
        self.report.violations += compare_books(books)

    def _read_books(self) -> Books:
        """Reads the records, including the neighbours' uploads."""
        ledger = self._project.ledger if self._project else Ledger()
        books = read_books(
            self._stack, self._truth | ledger.truth, self._heard, may_be_lost=self._may_be_lost(),
            client_heard_all=not self.report.restarts,
        )  # fmt: skip
        books.ends, books.pictures, books.fallen = ledger.ends, self._pictures + ledger.pictures, self._fallen
        return books

    async def _move_in(self, project: Project) -> None:
        """Creates the hostile tenants, one of each kind that does not flood a provider with tier 1's limits."""
        self._project = project
        pictures = draw(1000, seed=3, shrink=6)
        for kind in ALL_KINDS:
            if kind.images < MAX_IMAGES:
                tenant = Tenant(project, random.Random(self._random.random()))
                await tenant.store(list(islice(pictures, NEIGHBOUR_FILES)))
                self._neighbours.append(kind(tenant))
                await self._neighbours[-1].install()

    def _make_trouble(self, ending: asyncio.Event) -> list[asyncio.Task[None]]:
        """Runs some of the neighbours until the end."""
        some = self._random.sample(self._neighbours, min(NEIGHBOURS_AT_ONCE, len(self._neighbours)))
        self.report.hostilities |= {hostility.name for hostility in some}
        return [
            asyncio.create_task(
                happen_often(hostility, hostility.tenant.rng, ending, pause=(0.0, 3.0), on_error=lambda _: None)
            )
            for hostility in some
        ]

    def _may_be_lost(self) -> int:
        """The number of single answers that may have been lost: a worker's slots for each death, plus cut
        connections."""
        return SLOTS * self.report.kills + 2 * self.report.faults

    # -- workers

    def _environment(self) -> dict[str, str]:
        return {
            "PATH": os.environ.get("PATH", ""), **self._stack.worker_environment(),
            "AUTOTAG_SLOTS": str(SLOTS), "AUTOTAG_STOP_DEADLINE": "5",
        }  # fmt: skip

    @contextlib.asynccontextmanager
    async def _worker(self, forks: Forks, point: str | None = None) -> AsyncIterator[Forked]:
        """Runs a worker until the end of the context, with or without a point at which it dies."""
        worker = await forks.start(self._environment(), self._log, point)
        try:
            yield worker
        finally:
            worker.kill()
            await worker.wait()

    async def _die_often(self, forks: Forks, last: int) -> None:
        """Runs one worker after another, each with its own point."""
        while self.report.kills < last:
            point = next(self._dooms)
            life = LIFE if point else self._random.uniform(1, LIFE)
            async with self._worker(forks, point) as worker:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(life):
                        await worker.wait()
                if worker.returncode == -signal.SIGKILL and point:
                    self.report.points.add(point)
                elif worker.returncode is not None:
                    self._fallen.append(f"worker {worker.pid} ended by itself with {worker.returncode}")
                    continue
                self.report.kills += 1

    async def _finish(self, forks: Forks) -> None:
        """Runs two healthy workers until everything has ended and no file is left."""
        async with self._worker(forks) as one, self._worker(forks) as two:
            deadline = time.monotonic() + ROUND_END
            while await self._live() or self._stack.simulator.files:
                await asyncio.sleep(0.1)
                if time.monotonic() > deadline:
                    break  # the auditor reports what is missing
            for worker in (one, two):
                worker.send_signal(signal.SIGTERM)
            for worker in (one, two):
                await worker.wait()

    # -- uploads

    async def _store_pictures(self) -> None:
        bucket = self._stack.storage().from_("assets")
        for seed in (1, 2):
            member = self._stack.add_member()
            self._files[member] = []
            for drawing in draw(max(UPLOADS), seed):
                path = f"{member.workspace}/{drawing.name}"
                await bucket.upload(path, drawing.data, {"content-type": drawing.content_type})
                self._files[member].append((path, drawing.tags))

    def _upload(self) -> None:
        """Makes one upload of each size, by two workspaces in turn; retries while the database is unreachable."""
        for number, size in enumerate(UPLOADS):
            member, files = list(self._files.items())[number % 2]
            chosen = self._random.sample(files, size)
            with self._owner.transaction() as owner:
                ids = [
                    str(row[0])
                    for path, _ in chosen
                    for row in owner.execute(
                        "insert into public.assets (workspace_id, storage_path) values (%s, %s) returning id",
                        (member.workspace, path),
                    )
                ]
                owner.execute("select set_config('request.jwt.claims', %s, true)", (json.dumps(
                    {"role": "authenticated", "sub": member.user}),))  # fmt: skip
                owner.execute("select public.enqueue_tagging(%s::uuid[])", (ids,))
            self._truth |= {asset: tags for asset, (_, tags) in zip(ids, chosen, strict=True)}
            self._pictures.update(tags for _, tags in chosen)

    def _add_faults(self) -> None:
        for fault in self._random.sample(FAULTS, FAULTS_AT_ONCE):
            self._stack.simulator.faults.add(fault.model_copy())
            self.report.faults += 1

    # -- around it

    async def _live(self, *, of_ours: bool = False) -> bool:
        """Whether any upload has not ended; or any of our own, without the neighbours'."""
        ours = [member.workspace for member in self._files] if of_ours else None

        def ask() -> bool:
            try:
                with self._owner.transaction() as owner:
                    row = owner.execute(
                        """select exists (select from autotag.jobs j where j.finished_at is null
                             and (%(ours)s::uuid[] is null or j.workspace_id = any (%(ours)s)))
                           or %(ours)s is null and (exists (select from autotag.arrivals)
                             or exists (select from autotag.batches where state not in ('done', 'cancelled')))""",
                        {"ours": ours},
                    ).fetchone()
                    return bool(row and row[0])
            except psycopg.OperationalError:
                return True  # the server went away in between

        return await asyncio.to_thread(ask)

    def _ticks(self) -> contextlib.AbstractAsyncContextManager[None]:
        """Does the scheduler's work, more often than the scheduler would."""

        def tick() -> None:
            with self._owner.transaction() as owner:
                owner.execute("select autotag.tick()")

        return ticking(lambda: asyncio.to_thread(tick), TICK)

    def _hear(self, message: BroadcastPayload) -> None:
        if batch := message["payload"]["batch_id"]:  # none: an upload ended without a batch
            self._heard.append(batch)

    @contextlib.asynccontextmanager
    async def _client(self) -> AsyncIterator[None]:
        """A Realtime client that listens all the time, as existing web clients do."""
        client = AsyncRealtimeClient(f"{self._stack.supabase_url}/realtime/v1", self._stack.anon_key)
        await client.connect()
        channel = client.channel("batch-updates")
        channel.on_broadcast("batch-complete", self._hear)
        joined = asyncio.Event()
        await channel.subscribe(lambda state, _: joined.set() if state.value == "SUBSCRIBED" else None)
        async with asyncio.timeout(10):
            await joined.wait()
        try:
            yield
        finally:
            await client.close()
