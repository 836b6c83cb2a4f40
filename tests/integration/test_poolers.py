"""The worker behind poolers, and over connections that break: PgBouncer, a restart, a killed backend, a pause."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from structlog.testing import capture_logs

from conftest import skip
from lab.postgres import LocalPostgres, free_port, install_autotag, local_postgres, machine_binaries
from lab.stack import WORKER_ROLE, Stack, local_stack
from support import Library, audit, check_asked_once, until, worker

ONCE = {"chunk_delay": "0.05 s", "retry_delay": "0.1 s", "realtime_requests_per_minute": 1000,
        "realtime_tokens_per_minute": 1_000_000, "broadcast_interval": "0"}  # fmt: skip


def through(url: str, port: int) -> str:
    """The URL of the same database by another port."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{port}").geturl()


@contextlib.contextmanager
def pgbouncer(stack: Stack, mode: str) -> Iterator[str]:
    """Starts a real PgBouncer in front of the stack's database. Yields the worker's URL through it."""
    binary = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if binary is None:
        skip("PgBouncer is not installed")
        return
    target = urlsplit(stack.database_url(WORKER_ROLE))
    port, user = free_port(), "postgres" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
    with tempfile.TemporaryDirectory(prefix="autotag-pgbouncer-") as name:
        folder = Path(name)
        (folder / "users").write_text(f'"{target.username}" "{target.password}"\n')
        (folder / "ini").write_text(
            f"[databases]\n* = host=127.0.0.1 port={target.port}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = plain\nauth_file = {folder}/users\npool_mode = {mode}\n"
            "ignore_startup_parameters = extra_float_digits\n"
        )
        if os.geteuid() == 0:
            for path in (folder, *folder.iterdir()):
                shutil.chown(path, user)
        process = subprocess.Popen([binary, "-q", "-u", user, str(folder / "ini")], stderr=subprocess.DEVNULL)
        try:
            yield through(stack.database_url(WORKER_ROLE), port)
        finally:
            process.kill()
            process.wait()


def warnings(logs: list[Any]) -> list[str]:
    """The log's warnings and errors, without those that a loaded machine causes: PgBouncer's cancel of a slow call can
    hit the next call on its connection."""
    return [
        entry["event"] for entry in logs
        if entry["log_level"] in ("warning", "error")
        and not (entry["event"] == "workspace_slowed" or "canceling statement" in str(entry.get("error")))
    ]  # fmt: skip


@pytest.mark.long
async def test_behind_a_transaction_pooler_the_worker_polls_and_warns_once(library: Library) -> None:
    """A transaction pooler supports neither LISTEN nor prepared statements. More than five calls of each statement
    succeed."""
    assets = [await library.upload(8, seed=seed) for seed in (1, 2)]
    more = await library.upload(60, seed=3)
    with pgbouncer(library.stack, "transaction") as url, capture_logs() as logs:
        async with worker(library.stack, database_url=url, poll_interval=0.2, slots=2):
            await until(
                lambda: library.sql("select listening from autotag.workers") == [{"listening": False}], "the worker"
            )
            jobs = [library.enqueue(some) for some in (*assets, more)]
            await library.finished(*jobs)
    library.check_tags()
    audit(library.stack)
    assert warnings(logs) == ["listen_refused"]


async def test_behind_a_session_pooler_the_worker_listens(library: Library) -> None:
    assets = await library.upload(8)
    with pgbouncer(library.stack, "session") as url, capture_logs() as logs:
        async with worker(library.stack, database_url=url, poll_interval=3600):
            await until(
                lambda: library.sql("select listening from autotag.workers") == [{"listening": True}], "the worker"
            )
            await library.finished(library.enqueue(assets))
    library.check_tags()
    assert warnings(logs) == []


async def test_a_killed_connection_loses_nothing(library: Library) -> None:
    """Cuts every connection of the worker five times while it works. Every image is tagged, and the next upload starts
    at once."""
    library.stack.configure(**ONCE)
    assets = await library.upload(40)
    async with worker(library.stack):
        told = library.enqueue(assets)
        for done in (0, 7, 14, 21, 28):  # of forty: what is cut is in the middle of something
            await until(lambda n=done: library.job(told["job_id"])["completed"] > n, "more tags")  # type: ignore[misc]
            with psycopg.connect(library.stack.database_url("supabase_admin"), autocommit=True) as admin:
                admin.execute(
                    "select pg_terminate_backend(pid) from pg_stat_activity"
                    " where datname = current_database() and usename = %s", (WORKER_ROLE,),
                )  # fmt: skip
        await library.finished(told)
        # The listener is back too: the next upload is picked up without a poll.
        late = await library.upload(1, seed=9)
        await library.finished(library.enqueue(late))
    library.check_tags()
    audit(library.stack)


@pytest.fixture
async def own_server() -> AsyncIterator[tuple[LocalPostgres, Library]]:
    """A server that may be restarted without disturbing other tests."""
    with local_postgres(machine_binaries()) as server:
        install_autotag(server)
        async with local_stack(server) as stack:
            stack.simulator.plan.latency = (0.05, 0.2)
            stack.configure(**ONCE)
            yield server, Library(stack)


async def test_a_restart_of_the_server_loses_nothing(own_server: tuple[LocalPostgres, Library]) -> None:
    server, library = own_server
    assets = await library.upload(40)
    async with worker(library.stack):
        told = library.enqueue(assets)
        await until(lambda: library.job(told["job_id"])["completed"] > 0, "the first tags")
        await asyncio.to_thread(server.restart)
        await library.finished(told)
        late = await library.upload(1, seed=9)
        await library.finished(library.enqueue(late))
    library.check_tags()
    audit(library.stack)


class Wire:
    """Forwards TCP connections, and can stop carrying data without closing them."""

    def __init__(self, target: int) -> None:
        self._target = target
        self.open = asyncio.Event()
        self.open.set()
        self.port = 0

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65_536):
                await self.open.wait()
                writer.write(data)
                await writer.drain()
        writer.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        await asyncio.gather(self._carry(reader, back), self._carry(there, writer))

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        yield
        server.close()


async def test_a_pause_of_the_network_longer_than_the_lease_loses_nothing(library: Library) -> None:
    """No worker could send heartbeats, so none expires: answers from that time are accepted, and no image is requested
    again."""
    stack = library.stack
    stack.configure(**ONCE, lease="1 s")
    stack.simulator.plan.latency = (0.05, 0.2)
    assets = await library.upload(40)
    wire = Wire(urlsplit(stack.database_url()).port or 0)
    async with wire.run(), worker(stack, database_url=through(stack.database_url(WORKER_ROLE), wire.port), slots=8):
        told = library.enqueue(assets)
        await until(lambda: library.job(told["job_id"])["completed"] > 0, "the first tags")
        wire.open.clear()
        await until(
            lambda: library.sql("select 1 from autotag.workers where lease_until > clock_timestamp()") == [],
            "the lease to run out",
        )
        library.watch_failures()
        library.sql("select autotag.tick()")
        assert library.sql("select 1 from autotag.tasks where worker_id is not null") != []
        wire.open.set()
        await library.finished(told)
    assert library.failures() == 0
    check_asked_once(stack)
    library.check_tags()
    audit(stack)
