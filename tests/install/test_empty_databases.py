"""Databases without a table: only an empty Supabase project is told that autotag can make the tables."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psycopg
import pytest
from typer.testing import CliRunner, Result

from autotag.cli.app import app
from autotag.config import DoctorSettings
from autotag.doctor.examine import examine
from autotag.doctor.findings import Finding
from conftest import BARE_TEMPLATE, copied_database
from lab.postgres import LocalPostgres

NO_PROJECT = "This is not the database of a Supabase project: it lacks the schemas auth and storage."
PLAIN = "template0"  # what every server has


def run(url: str, *arguments: str) -> Result:
    return CliRunner().invoke(
        app, arguments, env={"DATABASE_URL": url, "SUPABASE_DB_URL": None, "OPENAI_API_KEY": None}
    )


def read_schema_finding(url: str) -> Finding:
    """The doctor's finding about autotag's schema."""
    [found] = [one for one in asyncio.run(examine(DoctorSettings(database_url=url))) if one.check == "schema"]  # type: ignore[arg-type]
    return found


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "supabase").mkdir()
    (tmp_path / "supabase" / "config.toml").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_plain_postgres_is_said_to_be_no_project(postgres: LocalPostgres, project: Path) -> None:
    with copied_database(postgres, PLAIN) as name:
        url = postgres.url(database=name)
        for command in (["migrate"], ["migrate", "--stand-alone"], ["init", str(project), "--yes"]):
            done = run(url, *command)
            assert done.exit_code == 2, (command, done.output)
            assert NO_PROJECT in done.output
            assert "--stand-alone" not in done.output
        found = read_schema_finding(url)
        assert (found.message, "migrate" in str(found.fix)) == (NO_PROJECT, False)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("create table public.assets (id uuid primary key, url text)")
        assert NO_PROJECT in run(url, "migrate").output


def test_an_empty_project_gets_the_tables_it_is_offered(postgres: LocalPostgres, project: Path) -> None:
    with copied_database(postgres, BARE_TEMPLATE) as name:
        url = postgres.url(database=name)
        for command in (["migrate"], ["init", str(project), "--yes"]):
            done = run(url, *command)
            assert (done.exit_code, "let autotag migrate --stand-alone create one" in done.output) == (2, True)
        assert "autotag migrate" in str(read_schema_finding(url).fix)
        done = run(url, "migrate", "--stand-alone")
        assert done.exit_code == 0, done.output
        with psycopg.connect(url) as connection:
            tables = connection.execute(
                "select array_agg(relname::text order by relname) from pg_class where relkind = 'r' and relnamespace = 'public'::regnamespace"
            ).fetchone()
        assert tables == (["assets", "workspace_members", "workspaces"],)


def test_a_project_without_storage_is_not_offered_what_it_cannot_have(postgres: LocalPostgres, project: Path) -> None:
    with copied_database(postgres, BARE_TEMPLATE) as name:
        with psycopg.connect(postgres.url("supabase_admin", name), autocommit=True) as connection:
            connection.execute("drop schema storage cascade")
        url = postgres.url(database=name)
        assert "create it first." in run(url, "migrate").output
        assert "it lacks the schema storage." in run(url, "migrate", "--stand-alone").output
