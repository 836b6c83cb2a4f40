"""The cost of an exact sliding window: `check_rate_limit` compared with a one-row UPDATE and with two libraries.

A window is measured in two states, because their costs differ. A full window, the steady state, refuses most calls,
which write nothing, and admits a call whenever an older one leaves it. An empty window admits every call, and each call
writes a row whose arrays grow.

pgbench runs the two statements alternately on the same server, so that drift of the machine's speed does not change the
ratio. The libraries, and `check_rate_limit` for comparison, are called from Python with 8 threads.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console

from benchmarks.report import Figure, Result
from lab.ending import group, temporary_folder
from lab.postgres import LocalPostgres, free_port, install_autotag, local_postgres, machine_binaries

SECONDS = 5  # seconds of one pgbench run
ROUNDS = 3  # pairs of runs; the median ratio counts
WORKSPACES = 1000
LIBRARY_SECONDS = 3.0
THREADS = 8
#: Postgres's defaults: commits are durable.
SAFE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}

CHECK = "select allowed from public.check_rate_limit({workspace}, 'realtime', 1);"
UPDATE = "update public.plain set n = n + 1 where workspace_id = {workspace};"


def measure(console: Console) -> Result:
    """Measures both statements with 1 and 8 clients, on one hot workspace and on 1,000, then the libraries."""
    pgbench = shutil.which("pgbench") or str((machine_binaries() or Path("/usr/bin")) / "pgbench")
    ratios: dict[str, float] = {}
    admitting: dict[str, float] = {}
    details: dict[str, Any] = {}
    with local_postgres(machine_binaries(), SAFE) as server:
        install_autotag(server)
        ids = _prepare(server)
        for clients in (1, 8):
            for name, hot in (("one hot workspace", True), (f"{WORKSPACES} workspaces", False)):
                key = f"{clients} clients, {name}" if clients > 1 else f"1 client, {name}"
                for state, fill in (("full", True), ("admitting", False)):
                    if hot and not fill:
                        continue  # the window of one hot workspace is full within milliseconds
                    console.print(f"{key}, {state} …")
                    pairs = []
                    for _ in range(ROUNDS):
                        _reset_windows(server, fill=fill)
                        check = _pgbench(pgbench, server, CHECK, clients, hot)
                        plain = _pgbench(pgbench, server, UPDATE, clients, hot)
                        pairs.append((check / plain, check, plain))
                    ratio, check, plain = sorted(pairs)[ROUNDS // 2]
                    (ratios if fill else admitting)[key] = ratio
                    details[f"{key}, {state}"] = {
                        "ratio": round(ratio, 3), "check_per_s": round(check), "update_per_s": round(plain),
                    }  # fmt: skip
        console.print("libraries …")
        details["from Python, 8 threads, calls per second"] = _libraries(server, ids)
    figures = {
        "min_ratio": Figure(min(ratios.values()), 0.75, "higher"),
        "admitting_ratio": Figure(min(admitting.values()), 0.75, "higher"),
    }
    return Result("limiter", figures, details)


def _prepare(server: LocalPostgres) -> list[str]:
    with psycopg.connect(server.url(), autocommit=True) as owner:
        owner.execute("create table public.plain (workspace_id uuid primary key, n bigint not null default 0)"
                      " with (fillfactor = 50)")  # fmt: skip
        owner.execute(
            "insert into public.plain select ('00000000-0000-4000-8000-' || lpad(i::text, 12, '0'))::uuid"
            " from generate_series(1, %s) i",
            (WORKSPACES,),
        )
        return [str(row[0]) for row in owner.execute("select workspace_id from public.plain order by 1")]


def _reset_windows(server: LocalPostgres, *, fill: bool = False) -> None:
    """Empties every window, or fills each with a minute of evenly spread calls; vacuums the tables."""
    with psycopg.connect(server.url(), autocommit=True) as owner:
        owner.execute("truncate autotag.windows")
        if fill:
            owner.execute(
                "insert into public.workspace_rate_limits (workspace_id, request_type, admitted_at, requests, units)"
                " select workspace_id, 'realtime',"
                "   array(select now() - (61 - 2 * i) * interval '1 s' from generate_series(1, 30) i),"
                "   array_fill(1, array[30]), array_fill(1000, array[30])"
                " from public.plain"
            )
            owner.execute("vacuum analyze autotag.windows")
        owner.execute("vacuum public.plain")


def _pgbench(binary: str, server: LocalPostgres, statement: str, clients: int, hot: bool) -> float:
    """Transactions per second."""
    number = "1" if hot else f"random(1, {WORKSPACES})"
    script = f"\\set w {number}\n" + statement.format(
        workspace="('00000000-0000-4000-8000-' || lpad(:w::text, 12, '0'))::uuid"
    )
    with temporary_folder("autotag-pgbench-") as folder:
        file = folder / "script.sql"
        file.write_text(script)
        stop = subprocess.run(
            [binary, "-n", "-M", "prepared", "-c", str(clients), "-j", str(min(clients, 2)), "-T", str(SECONDS),
             "-f", file, server.url()],
            capture_output=True, text=True, check=True, process_group=group(),
        )  # fmt: skip
    match = re.search(r"tps = ([\d.]+)", stop.stdout)
    assert match, stop.stdout
    return float(match[1])


# -- libraries


def _libraries(server: LocalPostgres, ids: list[str]) -> dict[str, int]:
    """Calls per second from Python on 1,000 keys."""
    _reset_windows(server)
    result = {"autotag check_rate_limit": _rate(lambda: _autotag_caller(server), ids)}
    with _redis() as port:
        if port:
            _limits_caller(port)  # the first use imports modules, which is not thread-safe
            result["limits, Redis moving window"] = _rate(lambda: _limits_caller(port), ids)
    result["pyrate-limiter, Postgres"] = _rate(lambda: _pyrate_caller(server), ids)
    return result


def _rate(make: Callable[[], Callable[[str], object]], ids: list[str]) -> int:
    """Calls per second of `THREADS` threads, each with its own caller."""
    counts = [0] * THREADS
    stop = threading.Event()

    def run(number: int) -> None:
        call = make()
        i = number
        while not stop.is_set():
            call(ids[i % len(ids)])
            counts[number] += 1
            i += THREADS

    threads = [threading.Thread(target=run, args=(n,)) for n in range(THREADS)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    stop.wait(LIBRARY_SECONDS)
    stop.set()
    for thread in threads:
        thread.join()
    return round(sum(counts) / (time.monotonic() - started))


def _autotag_caller(server: LocalPostgres) -> Callable[[str], object]:
    connection = psycopg.connect(server.url(), autocommit=True)
    return lambda key: connection.execute(
        "select allowed from public.check_rate_limit(%s, 'realtime', 1)", (key,)
    ).fetchone()


def _limits_caller(port: int) -> Callable[[str], object]:
    from limits.storage import storage_from_string
    from limits.strategies import MovingWindowRateLimiter

    from limits import RateLimitItemPerMinute

    limiter = MovingWindowRateLimiter(storage_from_string(f"redis://127.0.0.1:{port}"))
    item = RateLimitItemPerMinute(30)
    return lambda key: limiter.hit(item, key)


def _pyrate_caller(server: LocalPostgres) -> Callable[[str], object]:
    """One bucket (a table) for all keys, because the library's Postgres backend does not support keys."""
    from psycopg_pool import ConnectionPool
    from pyrate_limiter import Duration, Limiter, PostgresBucket, Rate

    pool = ConnectionPool(server.url(), min_size=1, max_size=1, open=True)
    limiter = Limiter(PostgresBucket(pool, f"pyrate_{threading.get_ident()}", [Rate(30, Duration.MINUTE)]))
    return lambda key: limiter.try_acquire(key, blocking=False)


@contextmanager
def _redis() -> Iterator[int | None]:
    """Runs redis-server on a free port; yields None if it is not installed."""
    binary = shutil.which("redis-server")
    if binary is None:
        yield None
        return
    port = free_port()
    process = subprocess.Popen(
        [binary, "--port", str(port), "--save", "", "--bind", "127.0.0.1"],
        stdout=subprocess.DEVNULL,
        process_group=group(),
    )
    try:
        time.sleep(1)  # redis-server is ready within milliseconds, but does not announce it
        yield port
    finally:
        process.terminate()
        process.wait()
