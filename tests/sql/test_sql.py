"""The SQL alone: pgTAP, plpgsql_check, pg_cron, and the rules for every function."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from pglast.parser import scan

from autotag.install.adapter import TEMPLATE, render
from autotag.install.host import Host
from autotag.install.migrations import apply_migrations
from conftest import ROOT, skip
from lab import schema
from lab.postgres import LocalPostgres, install_baseline

PGTAP = ROOT / "supabase" / "tests"


def test_pgtap(postgres: LocalPostgres, database: str, machine_postgres: bool) -> None:
    if not machine_postgres or not shutil.which("pg_prove"):
        skip("pgTAP needs Debian's Postgres and pg_prove")
    with psycopg.connect(postgres.url("supabase_admin", database), autocommit=True) as connection:
        connection.execute("create extension pgtap with schema extensions")
    files = sorted(str(path.relative_to(PGTAP)) for path in PGTAP.rglob("*.test.sql"))
    assert files
    assert all((PGTAP / file).read_text().startswith("-- ") for file in files), "a test begins with what it is about"
    done = subprocess.run(
        ["pg_prove", "--failures", "--comments", "-d", postgres.url(database=database), *files],
        cwd=PGTAP, capture_output=True, text=True, check=False,
        env={**os.environ, "PGOPTIONS": "-c search_path=public,extensions"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All tests successful" in done.stdout


def test_plpgsql_check_finds_nothing(postgres: LocalPostgres, database: str, machine_postgres: bool) -> None:
    if not machine_postgres:
        skip("plpgsql_check needs Debian's Postgres")
    with psycopg.connect(postgres.url("supabase_admin", database), autocommit=True) as connection:
        connection.execute("create extension plpgsql_check")
        found = connection.execute("""
            select p.oid::regprocedure::text, m from pg_proc p
            join pg_language l on l.oid = p.prolang and l.lanname = 'plpgsql'
            left join pg_trigger g on g.tgfoid = p.oid
            cross join lateral plpgsql_check_function(p.oid, fatal_errors => false, extra_warnings => true,
              -- the trigger of automatic mode is not there while the mode is off
              relid => case when p.prorettype = 'trigger'::regtype then coalesce(g.tgrelid, 'public.assets'::regclass) else 0 end,
              newtable => case when p.prorettype = 'trigger'::regtype then coalesce(g.tgnewtable, 'added') end,
              oldtable => g.tgoldtable) m
            where p.pronamespace = 'autotag'::regnamespace""").fetchall()
    assert found == []


@pytest.mark.parametrize(
    "path", [*schema.schema_files(), TEMPLATE], ids=lambda path: str(path.relative_to(schema.ROOT))
)
def test_a_constant_means_the_same_whatever_a_session_has_set(path: Path) -> None:
    """A trigger of the host may set standard_conforming_strings to off, and a function that is planned then keeps its plan. So a
    constant with a backslash is E'…'; a U&'…' would raise."""
    if path.parent.name != "host" or path == TEMPLATE:  # a policy is stored as its parse tree
        assert list(dependent_constants(path.read_text())) == []


def test_no_constant_of_an_adapter_depends_on_what_a_session_has_set() -> None:
    """Also with the names of columns that a project has, in which a person may have put a backslash."""
    for host in (Host(), replace(Host(), path="p\\q", id="i$d", url="u'rl")):
        assert list(dependent_constants(render(TEMPLATE.read_text(), host))) == []


def dependent_constants(text: str) -> Iterator[str]:
    for token in scan(text):
        constant = text[token.start : token.end + 1]
        if token.name == "SCONST" and constant.startswith("$"):
            quote = constant[: constant.index("$", 1) + 1]
            yield from dependent_constants(constant.removeprefix(quote).removesuffix(quote))
        elif token.name == "USCONST" or (token.name == "SCONST" and constant.startswith("'") and "\\" in constant):
            yield constant


def test_every_function_is_as_the_design_says(postgres: LocalPostgres, database: str) -> None:
    """Every search_path is fixed, security definer stays inside autotag, anon reaches nothing, and jit compiles no
    call."""
    with psycopg.connect(postgres.url("supabase_admin", database), autocommit=True) as connection:
        functions = connection.execute("""
            select p.oid::regprocedure::text, n.nspname, p.prosecdef, coalesce(p.proconfig, '{}'),
                   has_function_privilege('anon', p.oid, 'execute')
            from pg_proc p join pg_namespace n on n.oid = p.pronamespace
            where n.nspname in ('autotag', 'public')""").fetchall()
        rows = connection.execute("""
            select c.oid::regclass::text, c.relrowsecurity,
                   has_table_privilege('anon', c.oid, 'select, insert, update, delete'),
                   has_table_privilege('autotag_worker', c.oid, 'select, insert, update, delete')
            from pg_class c where c.relnamespace = 'autotag'::regnamespace and c.relkind = 'r'""").fetchall()
    assert len(functions) > 40
    for name, namespace, definer, settings, anon in functions:
        paths = [value.removeprefix("search_path=") for value in settings if value.startswith("search_path=")]
        assert paths in (["pg_catalog, pg_temp"], ["pg_catalog, public, extensions, pg_temp"]), f"{name}: {paths}"
        assert not (namespace == "public" and definer), f"{name} is a security definer in an exposed schema"
        assert not anon, f"anon may call {name}"
        # Without seqscan the one row of settings looks so expensive that each call would be compiled first, for 0.2 s.
        assert "enable_seqscan=off" not in settings or "jit=off" in settings, f"{name} starts the JIT compiler"
    for name, secured, anon, worker in rows:
        assert secured, f"{name} has no row level security"
        assert not anon, f"anon may touch {name}"
        assert not worker, f"autotag_worker may touch {name}: functions are all it needs"


def test_migrations_apply_once(postgres: LocalPostgres, database: str) -> None:
    assert apply_migrations(postgres.url(database=database), with_host_baseline=True) == []


def test_migrations_install_without_the_host_baseline(postgres: LocalPostgres) -> None:
    """Installs the migrations into a project with tables and rows of its own."""
    with psycopg.connect(postgres.url("supabase_admin"), autocommit=True) as connection:
        connection.execute("create database existing_project")
    install_baseline(postgres, "existing_project")
    url = postgres.url(database="existing_project")
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("""
            create table public.workspace_members (workspace_id uuid, user_id uuid);
            create table public.assets (id uuid primary key default gen_random_uuid(), workspace_id uuid not null,
              storage_bucket text, storage_path text, image_url text, tags text[], tagging_result jsonb);
            insert into public.assets (workspace_id, image_url)
            select gen_random_uuid(), 'https://example.org/' || i from generate_series(1, 3) i""")
        applied = apply_migrations(url)
        assert "host_baseline" not in applied
        assert applied[:2] == ["host_adapter", "0_1_0"]
        told = connection.execute(
            "select (public.enqueue_tagging(array[id])).strategy from public.assets limit 1"
        ).fetchone()
    assert told == ("realtime",)
