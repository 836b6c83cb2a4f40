"""The engine's throughput compared with general job queues, the pick-up latency, and the throughput of workers.

The engine's part runs the worker's loop (claim, report, settle) with a provider that answers immediately inside the
process. Everything else is as in production: limits, fairness, stages, tags, usage, progress and broadcasts. The jobs
of the other queues do nothing.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import psycopg
from rich.console import Console

import autotag
from autotag.config import Settings
from autotag.db import Database, DatabaseSettings, Image, listen
from autotag.openai.answers import read_completion, read_usage
from autotag.worker import realtime
from autotag.worker.claims import Claims
from autotag.worker.observations import Observations
from autotag.worker.outcomes import Outcomes
from autotag.worker.slow import SlowWorkspaces
from autotag.worker.stages import Stages
from autotag.worker.wake import Wake
from benchmarks import ceiling, pickup, queue_peers
from benchmarks.report import Figure, Result
from benchmarks.unlimited import UNLIMITED
from lab.openai_sim.answers import complete
from lab.openai_sim.completion_request import CompletionRequest
from lab.openai_sim.models import MODELS
from lab.openai_sim.vision import Picture
from lab.postgres import LocalPostgres, install_autotag, local_postgres, machine_binaries

IMAGES = 20_000
UPLOAD = 50  # images of one call of enqueue_tagging; each upload has its own workspace
LONG_READ = 40_000  # images through the engine while one transaction keeps its snapshot
ROUNDS = 3  # each system drains once per round; the median counts
SERVER = {"full_page_writes": "on", "max_wal_size": "8GB"}
PICTURE = Picture(512, 384, (
    "top left red", "top right green", "bottom left blue", "bottom right white", "landscape", "bright"))  # fmt: skip
#: the simulator's answer for PICTURE: six tags and a caption
ANSWER = complete(CompletionRequest(MODELS["gpt-4.1-mini"], cap=400, text_tokens=200, image_tokens=312), PICTURE)
RESULT, USAGE = read_completion(ANSWER, max_tags=10), read_usage(ANSWER)


@dataclass(frozen=True)
class Drain:
    """One run of all images through the engine."""

    seconds: float  # from the first enqueue_tagging to the last image's commit
    enqueue: float  # seconds until the last upload was enqueued, with the worker running
    transactions: int  # each statement of the engine is one transaction
    wal: int  # bytes


async def measure(console: Console) -> Result:
    """Measures the drains, then the pick-up, then the workers."""
    drains, queues = [], dict[str, list[float]]()
    with local_postgres(machine_binaries(), SERVER) as server:
        for number in range(ROUNDS):
            console.print(f"round {number + 1} of {ROUNDS}: {IMAGES:,} images through the engine …")
            drains.append(await _drain(server, f"engine_{number}"))
            for name, empty in queue_peers.PEERS.items():
                console.print(f"round {number + 1} of {ROUNDS}: {IMAGES:,} empty jobs through {name} …")
                url = _database(server, f"queue_{uuid.uuid4().hex}")
                queues.setdefault(name, []).append(IMAGES / await empty(url, IMAGES))
        console.print(f"{LONG_READ:,} images through the engine beside a long read …")
        quarters = await _long_read(server)
    rates = sorted(IMAGES / drain.seconds for drain in drains)
    peers = {name: sorted(rates)[len(rates) // 2] for name, rates in queues.items()}
    drain = sorted(drains, key=lambda d: d.seconds)[ROUNDS // 2]
    pickups = await pickup.measure(console)
    ceilings = await ceiling.measure(console)
    figures = {
        "vs_pgqueuer": Figure(
            rates[ROUNDS // 2] / max(rate for name, rate in peers.items() if "PgQueuer" in name), 3, "higher"
        ),
        "statements_per_image": Figure(drain.transactions / IMAGES, 0.25, "lower"),
        "wal_bytes_per_image": Figure(drain.wal / IMAGES, 2000, "lower"),
        "long_read_slowdown": Figure(quarters[-1] / quarters[0], 1.5, "lower"),
        "pickup_p99_ms": Figure(max(p99 for _, p99 in pickups.values()), 100, "lower"),
        "worker_images_per_s": Figure(ceilings[1]["images per second"], 100, "higher"),
    }
    details: dict[str, Any] = {
        "images per second, including enqueue": [round(rate) for rate in rates],
        "enqueue, ms per image": round(drain.enqueue / IMAGES * 1000, 3),
        "empty jobs per second": {name: round(rate) for name, rate in peers.items()},
        f"seconds of each quarter of {LONG_READ:,} images beside a long read": [round(q, 2) for q in quarters],
        "commit to request, ms": {
            name: {"median": round(median, 1), "p99": round(p99, 1)} for name, (median, p99) in pickups.items()
        },
        "workers": ceilings,
    }
    return Result("engine", figures, details)


def _database(server: LocalPostgres, name: str) -> str:
    with psycopg.connect(server.url("supabase_admin"), autocommit=True) as admin:
        admin.execute(f"create database {name} owner postgres".encode())
    return server.url(database=name)


async def _start(server: LocalPostgres, name: str, images: int) -> tuple[Database, str, list[list[uuid.UUID]]]:
    """A database with so many images: its worker, its URL, and the ids of each upload."""
    with psycopg.connect(server.url("supabase_admin"), autocommit=True) as admin:
        admin.execute(f"create database {name}".encode())
    install_autotag(server, name)
    url = server.url(database=name)
    uploads = _fill(url, images)
    db = Database(url, uuid.uuid4())
    await db.open()
    await db.register("bench", autotag.__version__, True, "http://bench", "bench")
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute("update autotag.provider_limits set proven_at = now()")
    return db, url, uploads


async def _long_read(server: LocalPostgres) -> list[float]:
    """Seconds of each quarter of the images, while an open snapshot keeps every dead row."""
    db, url, uploads = await _start(server, "engine_long_read", LONG_READ)
    with psycopg.connect(url) as reader:
        reader.execute("set transaction isolation level repeatable read")
        reader.execute("select count(*) from public.assets")
        _enqueue(url, uploads)
        times = [time.perf_counter()]
        await _work(db, url, LONG_READ, times)
    await db.close()
    return [after - before for before, after in pairwise(times)]


async def _drain(server: LocalPostgres, name: str) -> Drain:
    db, url, uploads = await _start(server, name, IMAGES)
    before = await _counters(url)
    started = time.perf_counter()
    enqueued, _ = await asyncio.gather(asyncio.to_thread(_enqueue, url, uploads), _work(db, url, IMAGES, []))
    elapsed = time.perf_counter() - started
    await db.close()
    after = await _counters(url)
    with psycopg.connect(url) as owner:
        counts = owner.execute(
            "select count(*), (select sum(completed) from autotag.jobs), (select sum(images) from autotag.usage)"
            " from public.assets where tagging_stage = 'completed' and cardinality(tags) = 6"
        ).fetchone()
    assert counts == (IMAGES, IMAGES, IMAGES), f"of {IMAGES} images, {counts} were tagged, counted and billed"
    return Drain(elapsed, enqueued - started, after[0] - before[0], after[1] - before[1])


def _fill(url: str, images: int) -> list[list[uuid.UUID]]:
    """Inserts the rows, those of one upload next to each other; returns the ids of each upload."""
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute(UNLIMITED)
        owner.execute(
            "insert into public.workspaces (name) select 'w' || n from generate_series(1, %s) n", (images // UPLOAD,)
        )
        owner.execute(
            "insert into public.assets (workspace_id, storage_path)"
            " select w.id, w.id || '/' || n || '.jpg' from public.workspaces w, generate_series(1, %s) n"
            " order by w.id, n",
            (UPLOAD,),
        )
        owner.execute("vacuum analyze public.assets")
        rows = owner.execute("select array_agg(id order by ctid) from public.assets group by workspace_id").fetchall()
    return [row[0] for row in rows]


def _enqueue(url: str, uploads: list[list[uuid.UUID]]) -> float:
    """Enqueues the uploads one after another; returns the time after the last one."""
    with psycopg.connect(url, autocommit=True) as owner:
        for assets in uploads:
            owner.execute("select public.enqueue_tagging(%s)", (assets,))
    return time.perf_counter()


async def _work(db: Database, url: str, images: int, times: list[float]) -> None:
    """Runs the worker's loop for single calls until every image is settled; adds each quarter's end to ``times``."""
    wake, observations, claims, slow, done = Wake(), Observations(), Claims(), SlowWorkspaces(), 0
    stages = Stages(db, observations, slow)
    outcomes = Outcomes(db, stages, observations, claims, slow)

    async def answer(image: Image, _: DatabaseSettings) -> None:
        nonlocal done
        stages.reach(image, "processing")
        observations.count_sent()
        outcomes.add(image, {"called": True, "usage": USAGE, "result": RESULT})
        done += 1
        if done % (images // 4) == 0:
            times.append(time.perf_counter())
        if done == images:
            wake.request_stop()

    helpers = [asyncio.create_task(work) for work in (
        listen(url, wake.notify), outcomes.run(), stages.run())]  # fmt: skip
    await realtime.run(db, wake, claims, stages, Settings.model_fields["slots"].default, answer, deadline=10)
    await outcomes.idle.wait()
    for helper in helpers:
        helper.cancel()


async def _counters(url: str) -> tuple[int, int]:
    """Committed transactions and bytes of WAL so far."""
    await asyncio.sleep(1.1)  # idle sessions report their counts within a second
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as owner:
        row = await (
            await owner.execute(
                "select d.xact_commit, pg_current_wal_insert_lsn() - '0/0' from pg_stat_database d"
                " where d.datname = current_database()"
            )
        ).fetchone()
    assert row is not None
    return int(row[0]), int(row[1])
