"""The throughput of workers with a provider and a Storage that answer immediately over HTTP.

A worker does everything that it does in production: claim, fetch a 2-megapixel JPEG, decode, scale, encode, call and
settle. The servers are as cheap as possible (`ceiling_servers`), because they share this machine's processors.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import random
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from PIL import Image
from rich.console import Console

from benchmarks.unlimited import UNLIMITED
from lab.ending import group, temporary_folder
from lab.machine import processor_seconds, server_processes
from lab.postgres import LocalPostgres, free_port, install_autotag, local_postgres, machine_binaries
from lab.stack import HOST, WORKER_ROLE, as_role, make_worker_role, worker_process

SIZE = (1632, 1224)  # pixels: two megapixels
WORKERS = (1, 2, 4)
IMAGES, UPLOAD = 1200, 50  # images in total, and of one upload
WARM_UP = 100  # images


@dataclass(frozen=True)
class Servers:
    """The provider and Storage, in one process."""

    url: str
    pid: int


async def measure(console: Console) -> dict[int, dict[str, Any]]:
    """By number of workers: images per second, and milliseconds of processor time per image by process group."""
    results = {}
    with local_postgres(machine_binaries()) as server, temporary_folder("autotag-photo-") as folder:
        install_autotag(server)
        make_worker_role(server.url())
        photo = folder / "photo.jpg"
        photo.write_bytes(photograph())
        async with _servers(photo) as servers:
            for count in WORKERS:
                console.print(f"{IMAGES} photographs of two megapixels, {count} worker{'s' * (count > 1)} …")
                results[count] = await _run(server, servers, count)
    return results


def photograph(seed: int = 1) -> bytes:
    """A JPEG of about 600 KB with detail at every scale, like a photograph."""
    rng = random.Random(seed)
    image = Image.new("RGB", SIZE, (127, 127, 127))
    for side in (8, 32, 128, 512, 1632):
        noise = Image.frombytes("RGB", (side, side * 3 // 4), rng.randbytes(side * (side * 3 // 4) * 3))
        image = Image.blend(image, noise.resize(SIZE, Image.Resampling.BICUBIC), 0.25 if side < 1000 else 0.08)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=88)
    return out.getvalue()


@contextlib.asynccontextmanager
async def _servers(photo: Path) -> AsyncIterator[Servers]:
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.ceiling_servers", str(port), str(photo), process_group=group()
    )
    try:
        async with asyncio.timeout(20):
            while True:
                with contextlib.suppress(OSError):
                    (await asyncio.open_connection(HOST, port))[1].close()
                    break
                await asyncio.sleep(0.05)
        yield Servers(f"http://{HOST}:{port}", process.pid)
    finally:
        process.terminate()
        await process.wait()


async def _run(server: LocalPostgres, servers: Servers, count: int) -> dict[str, Any]:
    environment = {
        "DATABASE_URL": as_role(server.url(), WORKER_ROLE),
        "SUPABASE_URL": servers.url, "SUPABASE_SECRET_KEY": "secret",
        "OPENAI_BASE_URL": f"{servers.url}/v1", "OPENAI_API_KEY": "sk", "AUTOTAG_LOG_LEVEL": "warning",
    }  # fmt: skip
    async with contextlib.AsyncExitStack() as stack:
        workers = [await stack.enter_async_context(worker_process(environment)) for _ in range(count)]
        async with await psycopg.AsyncConnection.connect(server.url(), autocommit=True) as owner:
            await owner.execute(UNLIMITED)
            await _upload(owner, WARM_UP)
            before = _spent(server, servers, workers)
            elapsed = await _upload(owner, IMAGES)
            cpu = {name: now - before[name] for name, now in _spent(server, servers, workers).items()}
    return {
        "images per second": round(IMAGES / elapsed, 1),
        **{f"{name}, ms per image": round(seconds / IMAGES * 1000, 2) for name, seconds in cpu.items()},
    }


def _spent(server: LocalPostgres, servers: Servers, workers: list[asyncio.subprocess.Process]) -> dict[str, float]:
    """Seconds of processor time so far, by process group."""
    pids_by_name = {"workers": [w.pid for w in workers], "Postgres": server_processes(server), "servers": [servers.pid]}
    return {name: processor_seconds(pids) for name, pids in pids_by_name.items()}


async def _upload(owner: psycopg.AsyncConnection[Any], images: int) -> float:
    """Tags uploads of one workspace each; returns the seconds until the last image has its tags."""
    cursor = await owner.execute(
        "insert into public.workspaces (name) select 'w' from generate_series(1, %s) returning id", (images // UPLOAD,)
    )
    workspaces = [row[0] for row in await cursor.fetchall()]
    cursor = await owner.execute(
        "insert into public.assets (workspace_id, storage_path) select w, w || '/photo.jpg'"
        " from unnest(%s::uuid[]) w, generate_series(1, %s) order by w returning id",
        (workspaces, UPLOAD),
    )
    assets = [row[0] for row in await cursor.fetchall()]
    started = time.perf_counter()
    for first in range(0, images, UPLOAD):
        await owner.execute("select public.enqueue_tagging(%s)", (assets[first : first + UPLOAD],))
    while True:
        cursor = await owner.execute("select from autotag.jobs where finished_at is null limit 1")
        if await cursor.fetchone() is None:
            break
        await asyncio.sleep(0.02)
    elapsed = time.perf_counter() - started
    cursor = await owner.execute("select sum(failed) from autotag.jobs")
    assert await cursor.fetchone() == (0,), "some images failed"
    return elapsed
