"""Uploads of 50,000 images: a member's calls over one connection, under the statement timeout of a Supabase project.

Their files are in Storage, so every call that starts an upload asks the policies of both tables about each image.
"""

from __future__ import annotations

import json
import time
from typing import Any

import psycopg
from rich.console import Console

from benchmarks.report import Figure, Result
from lab.postgres import LocalPostgres, install_autotag, local_postgres, machine_binaries

IMAGES = 50_000  # the largest upload (settings.job_max_images)
REPEATS = 8  # calls with the same ids; from the sixth call on, a connection reuses its plans
ROUNDS = 2  # of cancel and retry
TIMEOUT = "8s"  # statement_timeout of the role authenticated in Supabase projects


def measure(console: Console) -> Result:
    """Times each call. The figures are the slowest of their kind."""
    with local_postgres(machine_binaries(), {"max_wal_size": "8GB"}) as server:
        connection, assets = _fill(server)
        console.print(f"enqueueing {IMAGES:,} images …")
        seconds: dict[str, list[float]] = {"new": [], "again": [], "cancel": [], "retry": []}
        job = _timed(connection, seconds["new"], "enqueue_tagging", assets)["job_id"]
        for _ in range(REPEATS):
            assert _timed(connection, seconds["again"], "enqueue_tagging", assets)["skipped"] == IMAGES
        for _ in range(ROUNDS):
            assert _timed(connection, seconds["cancel"], "cancel_tagging", job)["cancelled"] == IMAGES
            job = _timed(connection, seconds["retry"], "retry_tagging", job)["job_id"]
        connection.close()
    bars = {"new": 3.0, "again": 1.5, "cancel": 3.0, "retry": 3.0}
    figures = {f"{kind}_s": Figure(max(seconds[kind]), bar, "lower") for kind, bar in bars.items()}
    details = {f"seconds of {kind}": [round(s, 2) for s in times] for kind, times in seconds.items()}
    return Result("bulk", figures, details)


def _fill(server: LocalPostgres) -> tuple[psycopg.Connection[Any], list[Any]]:
    """A database with one workspace and its images, and the connection of its member that all calls use."""
    install_autotag(server)
    with psycopg.connect(server.url("supabase_admin"), autocommit=True) as owner:
        owner.execute("update autotag.settings set live_images_max = 1000000")
        member = owner.execute(
            "insert into auth.users (id, email) values (gen_random_uuid(), 'bulk@example.com') returning id::text"
        ).fetchone()
        assert member
        rows = owner.execute(
            "with w as (insert into public.workspaces (name) values ('bulk') returning id), m as ("
            " insert into public.workspace_members (workspace_id, user_id) select w.id, %s::uuid from w)"
            " insert into public.assets (workspace_id, storage_path) select w.id, w.id || '/' || n || '.jpg'"
            " from w, generate_series(1, %s) n returning id",
            (member[0], IMAGES),
        ).fetchall()
        owner.execute("insert into storage.objects (bucket_id, name) select 'assets', storage_path from public.assets")
        owner.execute("vacuum analyze public.assets, storage.objects")
    connection = psycopg.connect(server.url(), autocommit=True)
    claims = json.dumps({"sub": member[0], "role": "authenticated"})
    connection.execute("select set_config('request.jwt.claims', %s, false)", (claims,))
    connection.execute("set role authenticated")
    connection.execute(f"set statement_timeout = '{TIMEOUT}'".encode())
    return connection, [row[0] for row in rows]


def _timed(connection: psycopg.Connection[Any], times: list[float], function: str, argument: object) -> dict[str, Any]:
    """Calls a public function and adds the seconds that it took."""
    started = time.perf_counter()
    row = connection.execute(f"select to_jsonb(public.{function}(%s))".encode(), (argument,)).fetchone()
    times.append(time.perf_counter() - started)
    assert row
    result: dict[str, Any] = row[0]
    return result
