"""One Postgres server for the session, one database (a copy of a template) and one stack for each test."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from lab.machine import read_authorities_once
from lab.postgres import LocalPostgres, install_autotag, install_baseline, local_postgres, machine_binaries
from lab.stack import Stack, local_stack
from sealing import WORKER
from support import Library, close_connections, connected

ROOT = Path(__file__).parent.parent
TEMPLATE, BARE_TEMPLATE = "autotag_template", "bare_template"
MEMORY = Path("/dev/shm")
read_authorities_once()  # 0.15 s less of each test with a worker


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes more than ten seconds, most of which it waits")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the long tests first. So they run one after another in one process while the others keep the processor
    busy, and none of them starts when everything else has ended."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


def skip(reason: str) -> None:
    """Skips a test with a warning. In CI, nothing may be skipped."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"CI must not skip: {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def machine_postgres() -> bool:
    """Whether the server under test is the machine's own (with pg_cron and pgTAP) and not the wheel's."""
    binaries = machine_binaries()
    return bool(binaries and (binaries.parent / "lib" / "pg_cron.so").exists())


def place_of_data() -> Path | None:
    """A folder in memory, if there is plenty. Copying a database there takes 16 ms of processor time, on a disk 40, and
    waits for nothing."""
    return MEMORY if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 2e9 else None


@pytest.fixture(scope="session")
def postgres(machine_postgres: bool) -> Iterator[LocalPostgres]:
    """The server. Its database ``postgres`` has autotag's schema, and pg_cron if that is installed."""
    # Background workers need no login of their own, which a connection to localhost would.
    cron = {
        "shared_preload_libraries": "pg_cron,pg_stat_statements",
        "cron.database_name": "postgres",
        "cron.use_background_workers": "on",
    }
    settings = {"max_wal_size": "256MB", **(cron if machine_postgres else {})}
    binaries = machine_binaries() if machine_postgres else None
    # A test opens some forty connections. How passwords are checked is not what it tests.
    with local_postgres(binaries, settings, parent=place_of_data(), auth="md5") as server:
        install_autotag(server)
        leave_a_dead_worker(server)
        with psycopg.connect(server.url("supabase_admin"), autocommit=True) as connection:
            if machine_postgres:
                connection.execute("create extension pg_stat_statements with schema extensions")
            for template in (TEMPLATE, BARE_TEMPLATE):
                connection.execute(sql.SQL("create database {}").format(sql.Identifier(template)))
        install_autotag(server, TEMPLATE)
        install_baseline(server, BARE_TEMPLATE)
        yield server


def leave_a_dead_worker(server: LocalPostgres) -> None:
    """Leaves a dead worker for test_cron: pg_cron releases what it held, while other tests run. It has been silent for
    more than a day, so it does not matter how late the first tick is (autotag.can_expire)."""
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute(
            "insert into autotag.workers values"
            " (gen_random_uuid(), 'gone', '0', true, now() - interval '25 h', now() - interval '25 h', now() - interval '25 h')"
        )


@contextmanager
def copied_database(postgres: LocalPostgres, template: str) -> Iterator[str]:
    """A copy of a template, dropped at the end."""
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(postgres.url("supabase_admin"), autocommit=True) as connection:
        connection.execute(
            sql.SQL("create database {} template {} owner postgres strategy file_copy").format(
                sql.Identifier(name), sql.Identifier(template)
            )
        )
        yield name
        connection.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture(autouse=True)
def no_connection_is_left() -> Iterator[None]:
    """Closes the connections that a test has kept open."""
    yield
    close_connections()


@pytest.fixture
def database(postgres: LocalPostgres) -> Iterator[str]:
    """The name of a fresh database with autotag's schema."""
    with copied_database(postgres, TEMPLATE) as name:
        yield name


@pytest.fixture
def bare(postgres: LocalPostgres) -> Iterator[str]:
    """The name of a fresh database like that of a new Supabase project, without autotag and without any table."""
    with copied_database(postgres, BARE_TEMPLATE) as name:
        with psycopg.connect(postgres.url("supabase_admin", name), autocommit=True) as connection:
            # a copy has not the settings that belong to the name of its template (lab/baseline.sql)
            connection.execute(
                sql.SQL('alter database {} set search_path = "$user", public, extensions').format(sql.Identifier(name))
            )
        yield name


@pytest.fixture
async def stack(postgres: LocalPostgres, database: str) -> AsyncIterator[Stack]:
    """The Supabase edge and the OpenAI simulator around a fresh database; batches take a third of a second."""
    async with local_stack(postgres, database) as local:
        running = replace(local, connect=connected)
        quicken(running)
        yield running


def quicken(stack: Stack) -> None:
    """Makes the provider proven and fast, and shortens the delays."""
    stack.simulator.plan.latency = (0.01, 0.05)
    stack.simulator.plan.batch_latency = (0.2, 0.4)
    stack.configure(batch_poll_interval="0.2 s", chunk_delay="0.1 s", retry_delay="0.1 s", broadcast_interval="0")
    stack.prove()


@pytest.fixture
def library(stack: Stack) -> Library:
    """A workspace with a member and pictures to upload."""
    return Library(stack)


@pytest.fixture
def sealer(library: Library) -> Library:
    """A library in automatic mode, in which each upload is complete at once, with a worker whose calls the test
    makes."""
    library.stack.configure(upload_quiet="1 ms", upload_longest="1 ms")
    library.sql("select autotag.set_automatic(true)")
    library.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", WORKER)
    return library
