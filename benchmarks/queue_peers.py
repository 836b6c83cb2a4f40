"""Two general queues on Postgres, draining jobs that do nothing: PgQueuer and procrastinate, as their manuals say."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from functools import partial

import psycopg
from pgqueuer import PgQueuer
from pgqueuer.adapters.drivers.psycopg import PsycopgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries
from pgqueuer.types import QueueExecutionMode
from procrastinate import App, PsycopgConnector

PGQUEUER_BATCHES = (10, 100, 1000)  # jobs in one dequeue: its default, and larger ones; the quickest counts
PROCRASTINATE_HANDS = 64  # jobs at the same time
ENQUEUE = 1000  # jobs in one statement


async def pgqueuer(url: str, jobs: int, batch_size: int) -> float:
    """Seconds that PgQueuer with its psycopg driver takes to drain so many jobs."""
    done = 0
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        queries = Queries(PsycopgDriver(connection))
        await queries.install()
        for _ in range(jobs // ENQUEUE):
            await queries.enqueue(["nothing"] * ENQUEUE, [None] * ENQUEUE, [0] * ENQUEUE)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        queue = PgQueuer(PsycopgDriver(connection))

        @queue.entrypoint("nothing")
        async def nothing(_: Job) -> None:
            nonlocal done
            done += 1

        started = time.perf_counter()
        await queue.qm.run(batch_size=batch_size, mode=QueueExecutionMode.drain)
        took = time.perf_counter() - started
    assert done == jobs, f"PgQueuer ran {done} of {jobs} jobs"
    return took


async def procrastinate(url: str, jobs: int) -> float:
    """Seconds that procrastinate takes to drain so many jobs."""
    done = 0
    app = App(connector=PsycopgConnector(conninfo=url, max_size=10))

    @app.task(name="nothing")
    async def nothing() -> None:
        nonlocal done
        done += 1

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        for _ in range(jobs // ENQUEUE):
            await nothing.batch_defer_async(*({} for _ in range(ENQUEUE)))
        started = time.perf_counter()
        await app.run_worker_async(
            wait=False, concurrency=PROCRASTINATE_HANDS, install_signal_handlers=False, delete_jobs="always"
        )
        took = time.perf_counter() - started
    assert done == jobs, f"procrastinate ran {done} of {jobs} jobs"
    return took


PEERS: dict[str, Callable[[str, int], Awaitable[float]]] = {
    **{f"PgQueuer, {size} at a time": partial(pgqueuer, batch_size=size) for size in PGQUEUER_BATCHES},
    "procrastinate": procrastinate,
}
