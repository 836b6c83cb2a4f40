"""Two general job queues on Postgres, PgQueuer and procrastinate, set up as in their manuals; their jobs do nothing."""

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

PGQUEUER_BATCHES = (10, 100, 1000)  # jobs of one dequeue: the default and larger values; the fastest counts
PROCRASTINATE_CONCURRENCY = 64  # jobs
ENQUEUE_BATCH = 1000  # jobs of one statement


async def pgqueuer(url: str, jobs: int, batch_size: int) -> float:
    """Seconds that PgQueuer with its psycopg driver takes to drain ``jobs`` jobs."""
    done = 0
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        queries = Queries(PsycopgDriver(connection))
        await queries.install()
        for _ in range(jobs // ENQUEUE_BATCH):
            await queries.enqueue(["nothing"] * ENQUEUE_BATCH, [None] * ENQUEUE_BATCH, [0] * ENQUEUE_BATCH)
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        queue = PgQueuer(PsycopgDriver(connection))

        @queue.entrypoint("nothing")
        async def nothing(_: Job) -> None:
            nonlocal done
            done += 1

        started = time.perf_counter()
        await queue.qm.run(batch_size=batch_size, mode=QueueExecutionMode.drain)
        elapsed = time.perf_counter() - started
    assert done == jobs, f"PgQueuer ran {done} of {jobs} jobs"
    return elapsed


async def procrastinate(url: str, jobs: int) -> float:
    """Seconds that procrastinate takes to drain ``jobs`` jobs."""
    done = 0
    app = App(connector=PsycopgConnector(conninfo=url, max_size=10))

    @app.task(name="nothing")
    async def nothing() -> None:
        nonlocal done
        done += 1

    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        for _ in range(jobs // ENQUEUE_BATCH):
            await nothing.batch_defer_async(*({} for _ in range(ENQUEUE_BATCH)))
        started = time.perf_counter()
        await app.run_worker_async(
            wait=False, concurrency=PROCRASTINATE_CONCURRENCY, install_signal_handlers=False, delete_jobs="always"
        )
        elapsed = time.perf_counter() - started
    assert done == jobs, f"procrastinate ran {done} of {jobs} jobs"
    return elapsed


PEERS: dict[str, Callable[[str, int], Awaitable[float]]] = {
    **{f"PgQueuer, {size} at a time": partial(pgqueuer, batch_size=size) for size in PGQUEUER_BATCHES},
    "procrastinate": procrastinate,
}
