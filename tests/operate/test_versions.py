"""A worker and a schema of different versions report what they need, and the worker stops. Work in flight goes on with
a fitting worker."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from typing import Any

import psycopg
import pytest

import autotag
from autotag.db import VersionsDiffer
from autotag.worker.run import Worker
from autotag.worker.wake import Wake
from lab.stack import Stack, worker_process
from support import PATIENCE, Library, answered_pictures, audit, until, worker, worker_settings


def upgrade(stack: Stack, version: str) -> None:
    """Sets the schema's version, as the last migration of a release does."""
    with psycopg.connect(stack.database_url(), autocommit=True) as owner:
        owner.execute(
            "create or replace function autotag.schema_version() returns text language sql immutable parallel safe"
            f" set search_path = '' as $$ select '{version}'::text $$".encode()
        )
        owner.execute("select pg_notify('autotag', 'version')")


@pytest.mark.parametrize(
    ("schema", "hint"),
    [("9.0.0", r"pip install 'supabase-autotag==9\.0\.\*'"), ("0.0.9", "autotag migrate, or supabase db push")],
)
async def test_a_worker_that_does_not_fit_says_what_to_do(library: Library, schema: str, hint: str) -> None:
    upgrade(library.stack, schema)
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "autotag", "worker", stderr=asyncio.subprocess.PIPE,
        env={"PATH": os.environ["PATH"], **library.stack.worker_environment()},
    )  # fmt: skip
    _, error = await process.communicate()
    assert process.returncode == 3
    assert re.search(rf"This worker is autotag {autotag.__version__}.*{schema}.*{hint}", error.decode(), re.DOTALL)
    assert library.sql("select 1 from autotag.workers") == []


async def test_a_patch_release_fits(library: Library) -> None:
    upgrade(library.stack, ".".join(autotag.__version__.split(".")[:2]) + ".99")
    async with worker(library.stack):
        await until(lambda: library.sql("select 1 from autotag.workers") != [], "the worker to register")


async def test_an_upgrade_with_work_in_flight_loses_nothing(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old worker finishes what it holds and stops by itself. The new one does the rest."""
    stack = library.stack
    stack.configure(chunk_delay="0.5 s", realtime_requests_per_minute=1000, realtime_tokens_per_minute=10**8)
    stack.simulator.plan.latency = (0.3, 0.5)
    single, batch = await library.upload(30), await library.upload(60, seed=2)
    jobs = [library.enqueue(single), library.enqueue(batch)]
    old = asyncio.create_task(Worker(worker_settings(stack), Wake()).run())
    await until(lambda: library.job(jobs[0]["job_id"])["completed"] >= 5, "the first tags")
    upgrade(stack, "9.0.0")
    with pytest.raises(VersionsDiffer, match=r"of autotag 9\.0\.0"):
        async with asyncio.timeout(PATIENCE):
            await old
    assert library.sql("select 1 from autotag.tasks where worker_id is not null") == [], "nothing is left in its hands"
    monkeypatch.setattr(autotag, "__version__", "9.0.1")
    async with worker(stack):
        await library.finished(*jobs)
    library.check_tags()
    audit(stack)
    assert len(answered_pictures(stack)) == len(set(answered_pictures(stack))), "nothing was asked twice"


@pytest.mark.long
async def test_a_rolling_restart_under_load_loses_nothing_and_delays_nobody(library: Library) -> None:
    """Each of three processes is replaced while uploads arrive: no image fails, is requested twice, or waits for a
    lease to end."""
    stack = library.stack
    stack.configure(
        realtime_requests_per_minute=10_000, realtime_tokens_per_minute=10**8, chunk_delay="0.1 s", lease="10 min"
    )
    stack.simulator.plan.latency = (0.2, 0.5)
    stack.simulator.limits.requests.left = stack.simulator.limits.tokens.left = 10**9
    library.sql("update autotag.provider_limits set requests_per_minute = 10000, tokens_per_minute = 100000000")
    uploads = [await library.upload(8, seed=seed) for seed in range(1, 13)]
    jobs: list[dict[str, Any]] = []

    async def enqueue_steadily() -> None:
        """Starts the next upload when most images of the earlier ones are tagged, so that there is always work."""
        for number, assets in enumerate(uploads):
            await until(lambda n=number: len(answered_pictures(stack)) >= 8 * (n - 1), "tags")  # type: ignore[misc]
            jobs.append(await asyncio.to_thread(library.enqueue, assets))

    environment = stack.worker_environment()
    async with asyncio.TaskGroup() as group:
        group.create_task(enqueue_steadily())
        old = worker_process(environment)
        await old.__aenter__()
        for number in range(1, 4):
            new = worker_process(environment)
            await new.__aenter__()
            await until(lambda n=number: len(jobs) >= 3 * n, "three more uploads")  # type: ignore[misc]
            await old.__aexit__(None, None, None)  # SIGTERM, and its end is waited for
            old = new
    try:
        told = await library.finished(*jobs)
    finally:
        await old.__aexit__(None, None, None)
    assert [(job["completed"], job["failed"]) for job in told] == [(8, 0)] * len(uploads)
    library.check_tags()
    audit(stack)
    assert len(answered_pictures(stack)) == 96, "nothing was asked twice"
    longest = library.sql("select max(extract(epoch from finished_at - created_at))::float as s from autotag.jobs")[0][
        "s"
    ]
    assert longest < 300, "half a lease: nobody waited for one to run out"
