"""A day of many workspaces in compressed time: the database's cost per image, and how long uploads take.

autotag's clock (windows, delays, polls) runs faster by a factor, but the machine does not. So a millisecond of overhead
counts as that many milliseconds of the day, and the waiting times are upper bounds. Costs are per image and do not
depend on the factor.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg.rows import dict_row
from psycopg_pool import AsyncConnectionPool
from rich.console import Console
from rich.table import Table

from benchmarks.day_traffic import DAY, HOURS, PEAK, Upload, draw_day
from benchmarks.report import Figure, Result
from lab.ending import group
from lab.machine import processor_seconds, server_processes
from lab.postgres import LocalPostgres, free_port, install_autotag, local_postgres, machine_binaries
from lab.stack import HOST, Stack, project_stack

SERVER = {
    "full_page_writes": "on", "shared_buffers": "1GB", "max_wal_size": "8GB",
    "shared_preload_libraries": "pg_stat_statements",
}  # fmt: skip
#: limits of a large account: requests and tokens per minute, tokens queued in batches
TIER = {"requests_per_minute": 10_000, "tokens_per_minute": 10_000_000, "queued_batch_tokens": 1_000_000_000}
CLIENTS = 8  # connections that upload
TICK = 60.0  # seconds of the day between calls of autotag.tick(), as with pg_cron
SAMPLE_INTERVAL = 2.0  # real seconds between two samples
MAX_SAMPLE_GAP = 600.0  # seconds of the day between two samples, at most, so that the peak hour has several
SIZE_CLASSES = ((1, 5), (6, 50), (51, 300), (301, 1000))  # images of an upload
STATEMENTS = 8  # most expensive statements in the report


@dataclass
class Sample:
    """Counters at one time. All of them only grow, except connections and waiting."""

    at: float  # seconds of the day
    cpu: float  # seconds
    wal: int  # bytes
    transactions: int
    messages: int  # broadcast
    notifications: int
    tagged: int
    connections: int
    waiting: int  # images


@dataclass
class Observations:
    """What was measured during the day."""

    samples: list[Sample] = field(default_factory=list)
    notifications: int = 0
    max_delay: float = 0.0  # seconds of the day by which the bench started an upload late, at most

    def over(self, start: float, end: float) -> tuple[Sample, Sample]:
        """The first and the last sample in a part of the day."""
        inside = [sample for sample in self.samples if start <= sample.at <= end]
        return inside[0], inside[-1]


async def measure(console: Console, *, images: int, workspaces: int, minutes: float, workers: int) -> Result:
    """Runs the whole day in ``minutes`` of real time."""
    speed = DAY / 60 / minutes
    uploads = draw_day(images, workspaces)
    console.print(f"{len(uploads):,} uploads of {images:,} images; time runs {speed:.0f} times faster")
    with local_postgres(machine_binaries(), SERVER) as server:
        install_autotag(server)
        _prepare(server)
        owner = server.url()
        project = {"DB_URL": owner, "API_URL": f"http://{HOST}", "JWT_SECRET": "", "ANON_KEY": "",
                   "SERVICE_ROLE_KEY": ""}  # fmt: skip
        async with project_stack(project, plan=None) as stack:
            stack.compress(speed)
            with psycopg.connect(owner, autocommit=True) as connection:
                _set_up(connection, workspaces)
            async with _processes(stack, speed, workers):
                observed = await _run_day(console, server, uploads, speed, images)
        with psycopg.connect(owner, autocommit=True, row_factory=dict_row) as connection:
            return _report(connection, observed, images, speed, {
                "uploads": len(uploads), "images": images, "workspaces": workspaces, "workers": workers,
                "speed": round(speed, 1),
            })  # fmt: skip


def _prepare(server: LocalPostgres) -> None:
    with psycopg.connect(server.url("supabase_admin"), autocommit=True) as admin:
        admin.execute("create extension pg_stat_statements with schema extensions")
        admin.execute("grant pg_read_all_stats to postgres")


def _set_up(connection: psycopg.Connection[Any], workspaces: int) -> None:
    limits = ", ".join(f"{name} = {value}" for name, value in TIER.items())
    connection.execute(f"update autotag.provider_limits set {limits}, requests_per_day = null".encode())
    connection.execute(
        "insert into public.workspaces (name) select 'w' || n from generate_series(1, %s) n", (workspaces,)
    )


@contextlib.asynccontextmanager
async def _processes(stack: Stack, speed: float, workers: int) -> AsyncIterator[None]:
    """Runs the provider and the workers."""
    port = free_port()
    environment = {
        "PATH": os.environ.get("PATH", ""), **stack.worker_environment(), "DATABASE_URL": stack.owner_url,
        "OPENAI_BASE_URL": f"http://{HOST}:{port}/v1", "AUTOTAG_LOG_LEVEL": "warning", "SPEED": str(speed),
    }  # fmt: skip
    commands = [["provider", str(port)], *[["worker"]] * workers]
    running = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "benchmarks.day_processes", *command, env=environment, process_group=group()
        )
        for command in commands
    ]
    try:
        yield
    finally:
        for process in reversed(running):
            if process.returncode is None:
                process.terminate()
                await process.wait()


async def _run_day(
    console: Console, server: LocalPostgres, uploads: Sequence[Upload], speed: float, images: int
) -> Observations:
    """Makes the uploads at their times and waits for the last image."""
    observed = Observations()
    started = time.monotonic()
    helpers = [
        asyncio.create_task(work)
        for work in (
            _sample(console, server, observed, started, speed),
            _listen(server.url(), observed),
            _tick(server.url(), speed),
        )
    ]
    try:
        await _upload_all(server.url(), uploads, started, speed, observed)
        while observed.samples[-1].tagged < images:
            for task in helpers:
                if task.done():
                    task.result()
            await asyncio.sleep(SAMPLE_INTERVAL)
    finally:
        for task in helpers:
            task.cancel()
        await asyncio.gather(*helpers, return_exceptions=True)
    return observed


async def _upload_all(
    url: str, uploads: Sequence[Upload], started: float, speed: float, observed: Observations
) -> None:
    async with AsyncConnectionPool(url, min_size=CLIENTS, max_size=CLIENTS, kwargs={"autocommit": True}) as pool:
        async with pool.connection() as connection:
            cursor = await connection.execute("select id from public.workspaces")
            workspaces = [row[0] for row in await cursor.fetchall()]

        async def upload(item: Upload) -> None:
            async with pool.connection() as connection:
                observed.max_delay = max(observed.max_delay, (time.monotonic() - started) * speed - item.at)
                cursor = await connection.execute(
                    "insert into public.assets (workspace_id, storage_path)"
                    " select %(w)s, %(w)s || '/' || gen_random_uuid() || '.jpg' from generate_series(1, %(n)s)"
                    " returning id",
                    {"w": workspaces[item.workspace], "n": item.images},
                )
                assets = [row[0] for row in await cursor.fetchall()]
                await connection.execute("select public.enqueue_tagging(%s)", (assets,))

        async with asyncio.TaskGroup() as tasks:
            for item in uploads:
                await asyncio.sleep(max(0.0, started + item.at / speed - time.monotonic()))
                tasks.create_task(upload(item))


async def _listen(url: str, observed: Observations) -> None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute("listen autotag")
        async for _ in connection.notifies():
            observed.notifications += 1


async def _tick(url: str, speed: float) -> None:
    """Calls autotag.tick(), as the scheduler (pg_cron) does."""
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        while True:
            await asyncio.sleep(TICK / speed)
            await connection.execute("select autotag.tick()")


async def _sample(
    console: Console, server: LocalPostgres, observed: Observations, started: float, speed: float
) -> None:
    async with await psycopg.AsyncConnection.connect(server.url(), autocommit=True) as connection:
        reported_hour = 0
        while True:
            cursor = await connection.execute(
                """select pg_current_wal_insert_lsn() - '0/0', d.xact_commit,
                  (select n_tup_ins from pg_stat_user_tables where relid = 'realtime.messages'::regclass),
                  (select coalesce(sum(images), 0) from autotag.usage),
                  (select count(*) from pg_stat_activity where backend_type = 'client backend'),
                  (select coalesce(sum(queued), 0) from autotag.workspaces)
                from pg_stat_database d where d.datname = current_database()"""
            )
            row = await cursor.fetchone()
            assert row is not None
            wal, transactions, messages, tagged, connections, waiting = (int(value) for value in row)
            at = (time.monotonic() - started) * speed
            cpu = processor_seconds(server_processes(server))
            observed.samples.append(
                Sample(at, cpu, wal, transactions, messages, observed.notifications, tagged, connections, waiting)
            )
            if at // 3600 > reported_hour:
                reported_hour = int(at // 3600)
                console.print(
                    f"{reported_hour % 24:02}:00  {tagged:,} images tagged, {waiting:,} queued for single calls"
                )
            await asyncio.sleep(min(SAMPLE_INTERVAL, MAX_SAMPLE_GAP / speed))


def _report(
    connection: psycopg.Connection[dict[str, Any]],
    observed: Observations,
    images: int,
    speed: float,
    parameters: dict[str, Any],
) -> Result:
    first, last = observed.samples[0], observed.samples[-1]
    peak = observed.over(PEAK * 3600, (PEAK + 1) * 3600)
    lost = connection.execute(
        "select count(*) as n from public.assets where tagging_stage is distinct from 'completed'"
        " or cardinality(tags) <> 6"
    ).fetchone()
    assert lost is not None
    waits = _waits(connection)
    small = waits[_name(SIZE_CLASSES[0])]
    cores = (peak[1].cpu - peak[0].cpu) / (peak[1].at - peak[0].at)  # per second of the day
    figures = {
        "lost": Figure(lost["n"] + images - last.tagged, 0, "lower"),
        "database_cpu_ms_per_image": Figure((last.cpu - first.cpu) / images * 1000, 2, "lower"),
        "wal_bytes_per_image": Figure((last.wal - first.wal) / images, 4000, "lower"),
        "small_upload_p95_s": Figure(small["p95, s"], 120, "lower"),
    }
    hour = peak[1].at - peak[0].at
    details = parameters | {
        "largest delay of an upload by the bench itself, s of the day": round(observed.max_delay, 1),
        "peak hour of a real day": {
            "share of the day": round(max(HOURS) / sum(HOURS), 3),
            "images per second": round((peak[1].tagged - peak[0].tagged) / hour, 1),
            "cores used by the database": round(cores, 3),
            "WAL, KB/s": round((peak[1].wal - peak[0].wal) / hour / 1000, 1),
            "transactions per second": round((peak[1].transactions - peak[0].transactions) / hour, 2),
            "broadcasts per second": round((peak[1].messages - peak[0].messages) / hour, 2),
            "notifications per second": round((peak[1].notifications - peak[0].notifications) / hour, 2),
        },
        "cores used by the database in that hour of the bench": round(cores * speed, 2),
        "connections, at most": max(sample.connections for sample in observed.samples),
        "images queued for single calls, at most": max(sample.waiting for sample in observed.samples),
        "broadcasts per image": round((last.messages - first.messages) / images, 3),
        "transactions per image": round((last.transactions - first.transactions) / images, 3),
        "time to finish": waits,
        "tables": _tables(connection),
        "most expensive statements": _statements(connection, images),
    }
    return Result("day", figures, details)


def _name(sizes: tuple[int, int]) -> str:
    return f"{sizes[0]}-{sizes[1]} images"


def _waits(connection: psycopg.Connection[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Seconds of the day from an upload to its last tag, by size of the upload."""
    waits = {}
    for low, high in SIZE_CLASSES:
        row = connection.execute(
            "select count(*)::int as uploads, percentile_cont(array[0.5, 0.95, 0.99, 1]) within group"
            " (order by extract(epoch from finished_at - created_at)) as seconds"
            " from autotag.jobs where image_count between %s and %s",
            (low, high),
        ).fetchone()
        assert row is not None
        names = ("median, s", "p95, s", "p99, s", "longest, s")
        seconds = row["seconds"] or [0.0] * len(names)
        waits[_name((low, high))] = {
            "uploads": row["uploads"], **{name: round(float(s), 1) for name, s in zip(names, seconds, strict=True)}
        }  # fmt: skip
    return waits


def _tables(connection: psycopg.Connection[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Megabytes after the day, largest first."""
    rows = connection.execute(
        "select relname, pg_table_size(relid) / 1e6 as rows, pg_indexes_size(relid) / 1e6 as indexes,"
        " n_live_tup as live"
        " from pg_stat_user_tables where schemaname in ('autotag', 'public', 'realtime')"
        " order by pg_total_relation_size(relid) desc limit 10"
    ).fetchall()
    return {
        row["relname"]: {
            "MB": round(float(row["rows"]), 1), "indexes, MB": round(float(row["indexes"]), 1), "rows": row["live"]
        }
        for row in rows
    }  # fmt: skip


def _statements(connection: psycopg.Connection[dict[str, Any]], images: int) -> dict[str, dict[str, float]]:
    rows = connection.execute(
        "select left(regexp_replace(query, '\\s+', ' ', 'g'), 60) as query, calls, total_exec_time as ms, rows"
        " from extensions.pg_stat_statements order by total_exec_time desc limit %s",
        (STATEMENTS,),
    ).fetchall()
    return {
        row["query"]: {
            "calls": row["calls"], "ms per call": round(row["ms"] / row["calls"], 2),
            "ms per image": round(row["ms"] / images, 4),
        }
        for row in rows
    }  # fmt: skip


def show(console: Console, result: Result) -> None:
    """Prints the times to finish as a table."""
    waits = result.details["time to finish"]
    table = Table("upload", *next(iter(waits.values())), box=None, padding=(0, 2, 0, 0))
    for name, row in waits.items():
        table.add_row(name, *(f"{value:,}" for value in row.values()))
    console.print(table)
