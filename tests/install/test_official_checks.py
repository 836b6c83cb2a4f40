"""Supabase's own tools have no findings about the migrations."""

from __future__ import annotations

import json
import os
import threading
import time

import psycopg
import pytest

from autotag.install.host import Host
from autotag.install.migrations import apply_migrations, migrations
from cli_tools import supabase
from conftest import ROOT, skip
from lab.postgres import LocalPostgres

TYPES = ROOT / "supabase" / "types" / "database.ts"
ROWS = 1_000_000
LONGEST_LOCK = 1.0  # seconds that a reader or writer of a big table may have to wait


@pytest.fixture
def url(postgres: LocalPostgres, bare: str, machine_postgres: bool) -> str:
    """A project without autotag, on a server that the CLI's checks accept."""
    if not machine_postgres:
        skip("the CLI's lint needs plpgsql_check")
    with psycopg.connect(postgres.url("supabase_admin", bare), autocommit=True) as connection:
        connection.execute("create extension plpgsql_check with schema extensions")
    return postgres.url(database=bare)


def advise(url: str, level: str) -> list[dict[str, str]]:
    """The findings of `supabase db advisors`."""
    said = supabase("db", "advisors", f"--remote={url}", "--level", level, "--output-format", "json",
                    "--workdir", str(ROOT), stdout_only=True)  # fmt: skip
    findings: list[dict[str, str]] = json.loads(said)["results"]
    return findings


def test_the_cli_applies_everything_once_and_finds_nothing_to_mend(url: str) -> None:
    at = (f"--remote={url}", "--yes", "--workdir", str(ROOT))
    first = supabase("migration", "up", *at)
    assert first.count("Applying migration") == len(migrations(with_host_baseline=True))
    assert "up to date" in supabase("migration", "up", *at)
    assert "up to date" in supabase("db", "push", *at)

    assert "No schema errors found" in supabase("db", "lint", f"--remote={url}", "--level", "warning",
                                                "--fail-on", "warning", "--workdir", str(ROOT))  # fmt: skip
    assert advise(url, "warn") == []
    rest = {finding["name"] for finding in advise(url, "info")}
    assert rest <= {"unused_index", "rls_enabled_no_policy"}, rest
    private = [f["detail"] for f in advise(url, "info") if f["name"] == "rls_enabled_no_policy"]
    assert all("`autotag." in detail for detail in private), "an exposed table without a policy"


def test_advisors_would_find_a_defect(url: str) -> None:
    """Proves that the check above can fail: a search_path that is not fixed and a table without row level security are
    found."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("create function public.hole() returns int language sql as 'select 1'")
        connection.execute("create table public.open_to_all (id int primary key)")
    names = {finding["name"] for finding in advise(url, "warn")}
    assert {"function_search_path_mutable", "rls_disabled_in_public"} <= names


def test_the_committed_types_are_those_of_the_schema(url: str) -> None:
    apply_migrations(url, with_host_baseline=True)
    said = supabase("gen", "types", "--lang", "typescript", f"--remote={url}", "--workdir", str(ROOT), stdout_only=True)
    if os.environ.get("UPDATE_TYPES"):
        TYPES.parent.mkdir(exist_ok=True)
        TYPES.write_text(said)
    assert TYPES.read_text() == said, "run UPDATE_TYPES=1 scripts/test -k committed_types, and commit the file"


def test_a_table_of_a_million_rows_is_neither_rewritten_nor_held(postgres: LocalPostgres, bare: str) -> None:
    url = postgres.url(database=bare)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("""
            create table public.workspace_members (workspace_id uuid, user_id uuid);
            create table public.assets (id uuid primary key, workspace_id uuid not null, storage_bucket text, storage_path text,
              image_url text, tags text[]);
            insert into storage.buckets (id, name, public) values ('assets', 'assets', false)""")
        connection.execute(
            "insert into public.assets (id, workspace_id, storage_path)"
            " select gen_random_uuid(), gen_random_uuid(), 'p' || i from generate_series(1, %s) i",
            (ROWS,),
        )
        before = connection.execute(
            "select pg_relation_filenode('public.assets'), pg_relation_size('public.assets')"
        ).fetchone()

        done = threading.Event()
        waits: list[float] = []

        def use_the_table() -> None:
            with psycopg.connect(url, autocommit=True) as user:
                while not done.is_set():
                    started = time.monotonic()
                    user.execute(
                        "update public.assets set storage_path = storage_path where id = (select id from public.assets limit 1)"
                    )
                    waits.append(time.monotonic() - started)

        writer = threading.Thread(target=use_the_table)
        writer.start()
        try:
            apply_migrations(url)
        finally:
            done.set()
            writer.join()
        after = connection.execute("select pg_relation_filenode('public.assets')").fetchone()
    assert before is not None
    assert after == (before[0],), "the table was rewritten"
    assert len(waits) > 10, "the writer was locked out all the time"
    assert max(waits) < LONGEST_LOCK, f"a writer waited {max(waits):.2f} s"


def test_the_adapter_gives_up_a_lock_that_is_not_to_be_had(postgres: LocalPostgres, bare: str) -> None:
    """The adapter waits at most a second for a long transaction of the host, so that no session queues behind it."""
    url = postgres.url(database=bare)
    with psycopg.connect(url) as long, psycopg.connect(url, autocommit=True) as connection:
        connection.execute("create table public.workspace_members (workspace_id uuid, user_id uuid);"
                           "create table public.assets (id uuid primary key, workspace_id uuid, storage_path text)")  # fmt: skip
        long.execute("select from public.assets")
        adapter = next(m for m in migrations() if m.name == "host_adapter")
        with pytest.raises(psycopg.errors.LockNotAvailable), connection.transaction():
            connection.execute(adapter.text(Host()).encode())
