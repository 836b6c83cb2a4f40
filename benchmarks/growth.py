"""The latency of a claim with 1,000,000 queued tasks, relative to 10,000."""

from __future__ import annotations

import statistics
import time
from typing import Any

import psycopg
from rich.console import Console

from benchmarks.report import Figure, Result
from lab.postgres import LocalPostgres, install_autotag, local_postgres, machine_binaries

WORKER = "99999999-0000-4000-8000-000000000001"
SMALL, LARGE = 10_000, 1_000_000  # tasks queued
WORKSPACES = 1000
SLOTS = 64
CLAIMS = 20  # per round; all rounds and the warm-up together release fewer than SMALL tasks
ROUNDS = 5  # each measures both sizes; the median ratio counts


def measure(console: Console) -> Result:
    """Fills two databases of one server and measures claims in them alternately."""
    with local_postgres(machine_binaries(), {"autovacuum": "off", "shared_buffers": "512MB"}) as server:
        connections = {}
        for size in (SMALL, LARGE):
            console.print(f"queueing {size:,} tasks …")
            connections[size] = _fill(server, size)
        rounds = []
        for _ in range(ROUNDS):
            times = {size: _claim(connections[size]) for size in (SMALL, LARGE)}
            rounds.append((times[LARGE] / times[SMALL], times))
        ratio, times = sorted(rounds, key=lambda r: r[0])[ROUNDS // 2]
    details: dict[str, Any] = {
        f"claim of {SLOTS} images with {size:,} queued, ms": round(seconds * 1000, 2) for size, seconds in times.items()
    }
    return Result("growth", {"claim_ratio": Figure(ratio, 1.2, "lower")}, details)


def _fill(server: LocalPostgres, size: int) -> psycopg.Connection[Any]:
    """Creates a database with ``size`` queued single calls, one job per workspace, and limits that do not apply."""
    name = f"growth_{size}"
    with psycopg.connect(server.url("supabase_admin"), autocommit=True) as admin:
        admin.execute(f"create database {name}".encode())
    install_autotag(server, name)
    connection = psycopg.connect(server.url(database=name), autocommit=True)
    connection.execute(
        """update autotag.settings set realtime_requests_per_minute = 1000000, realtime_tokens_per_minute = 1000000000;
        update autotag.provider_limits set requests_per_minute = 2000000000, tokens_per_minute = 2000000000,
          requests_per_day = null, requests_left = 2000000000, tokens_left = 2000000000, tokens_per_image = 1"""
    )
    per_job = size // WORKSPACES
    connection.execute(
        f"""insert into autotag.workspaces (workspace_id, queued)
        select gen_random_uuid(), {per_job} from generate_series(1, {WORKSPACES}) i;
        insert into autotag.jobs (id, workspace_id, strategy, image_count, created_at)
        select workspace_id, workspace_id, 'realtime', {per_job}, now() from autotag.workspaces;
        insert into autotag.queues (job_id, workspace_id, joined, queued)
        select id, workspace_id, true, {per_job} from autotag.jobs;
        insert into autotag.tasks (job_id, workspace_id, asset_id, lane)
        select j.id, j.workspace_id, gen_random_uuid(), 'realtime'
        from autotag.jobs j, generate_series(1, {per_job}) n order by j.id, n;
        analyze autotag.tasks, autotag.jobs, autotag.queues, autotag.workspaces""".encode()
    )
    connection.execute("vacuum analyze autotag.tasks")
    connection.execute("select autotag.register_worker(%s, 'bench', autotag.schema_version(), true)", (WORKER,))
    _claim(connection)
    return connection


def _claim(connection: psycopg.Connection[Any]) -> float:
    """Median seconds of a claim that fills all slots."""
    times = []
    for _ in range(CLAIMS):
        started = time.perf_counter()
        row = connection.execute(
            "select cardinality(tasks) from autotag.claim(%s, %s, (select claim + 1 from autotag.workers))",
            (WORKER, SLOTS),
        ).fetchone()
        times.append(time.perf_counter() - started)
        assert row == (SLOTS,), f"a claim released {row} of {SLOTS}"
        connection.execute("update autotag.workers set unsent = 0")
    return statistics.median(times)
