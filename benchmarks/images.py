"""Memory of a worker that gets hostile files, and processor time of ordinary photographs compared with Pillow alone.

Memory is the proportional set size of the worker's process and its descendants, plus the files in memory that they hold
(which no process has mapped). It is sampled while a real worker tags the set of `hostile_files`.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from PIL import Image
from rich.console import Console

from autotag.config import Settings
from autotag.images.children import FORK_SERVER, cpu_seconds
from autotag.images.decode import Budget, Decoder
from autotag.images.files import Download, Space
from benchmarks.report import Figure, Result
from lab.edge.storage import put_files
from lab.image_files import encoded, flat_png, photograph, quarters, slow_jpeg
from lab.postgres import install_autotag, local_postgres, machine_binaries
from lab.stack import Member, Stack, local_stack, worker_process

MEMORY = int(Settings.model_fields["memory"].default)  # MB
SIDE = 512
PHOTOS = 40  # of each size
SAMPLE = 0.05  # seconds
LONGEST = 900.0  # seconds of the hostile set
MEGABYTE = 1e6


async def measure(console: Console) -> Result:
    """Measures both."""
    console.print(f"{PHOTOS} photographs of 2 and of 12 megapixels …")
    ratios = {f"{size:g} megapixels": await _compare(size) for size in (2, 12)}
    with local_postgres(machine_binaries()) as server:
        install_autotag(server)
        async with local_stack(server) as stack:
            console.print("A worker with hostile files …")
            memory = await _hostile(stack)
    figures = {
        "peak_mb_over_limit": Figure(memory["peak_mb"] - MEMORY, 100, "lower"),
        "cpu_vs_pillow": Figure(max(ratio["ratio"] for ratio in ratios.values()), 1.6, "lower"),
    }
    return Result("images", figures, {"memory": memory, "cpu": ratios})


# -- processor time


async def _compare(megapixels: float) -> dict[str, float]:
    photos = [photograph(megapixels, seed=seed) for seed in range(4)]
    ours, alone = [], []
    async with Decoder(Budget(10 * MEMORY * 10**6, 25_000_000)) as decoder:
        await _prepare(decoder, photos[0])
        for _ in range(PHOTOS // len(photos)):  # alternately, because the machine's speed drifts
            ours.append(await _ours(decoder, photos))
            began = time.process_time()
            for photo in photos:
                _pillow(photo)
            alone.append(time.process_time() - began)
    count = len(photos) * len(ours)
    return {
        "ratio": sum(ours) / sum(alone), "worker_ms": round(1000 * sum(ours) / count, 2),
        "pillow_ms": round(1000 * sum(alone) / count, 2), "file_mb": round(len(photos[0]) / MEGABYTE, 2),
    }  # fmt: skip


async def _ours(decoder: Decoder, photos: list[bytes]) -> float:
    """Processor time of this process and its children."""
    before = time.process_time() + sum(map(cpu_seconds, descendants(FORK_SERVER.pid or 0)))
    await asyncio.gather(*(_prepare(decoder, photo) for photo in photos))
    return time.process_time() + sum(map(cpu_seconds, descendants(FORK_SERVER.pid or 0))) - before


async def _prepare(decoder: Decoder, photo: bytes) -> None:
    async with Download(Space(len(photo)), len(photo)) as download:
        await download.begin(len(photo))
        for at in range(0, len(photo), 16_384):  # as it comes from the network
            await download.write(photo[at : at + 16_384])
        await decoder.decode(download.finish(), SIDE, "")


def _pillow(photo: bytes) -> None:
    image = Image.open(io.BytesIO(photo))
    image.draft("RGB", (SIDE, SIDE))
    image.thumbnail((SIDE, SIDE), Image.Resampling.HAMMING, reducing_gap=2.0)
    image.convert("RGB").save(io.BytesIO(), "JPEG", quality=85)


# -- memory


def hostile_files() -> dict[str, list[bytes]]:
    """The files, by the tenant that uploads them."""
    video = b"\0\0\0\x20ftypisom" + bytes(300_000_000)
    tile = io.BytesIO()
    Image.new("L", (22_000, 22_000)).save(tile, "TIFF", compression="tiff_adobe_deflate", tile=(22_000, 22_000))
    large = quarters((10_000, 10_000))
    return {
        "videos": [video] * 3,
        "large pictures": [
            flat_png(10_000, 10_000), flat_png(20_000, 20_000, depth=1, colour=0), tile.getvalue(),
            encoded(large, "JPEG"), encoded(large, "JPEG", progressive=True),
            encoded(large.resize((20_000, 10_000)), "JPEG"),
            encoded(large, "WEBP", quality=50), encoded(large, "TIFF", compression="tiff_lzw"),
        ],
        "bombs": [slow_jpeg(8000, 90), slow_jpeg(4000, 90), flat_png(60_000, 60_000, depth=1, colour=0)],
        "sixteen at once": [photograph(12, "PNG" if n % 2 else "JPEG", seed=n) for n in range(16)],
        "photographs": [photograph(2, seed=n) for n in range(40)],
    }  # fmt: skip


async def _hostile(stack: Stack) -> dict[str, Any]:
    stack.prove()
    files = hostile_files()
    environment = stack.worker_environment() | {"AUTOTAG_MEMORY": str(MEMORY)}
    async with worker_process(environment) as worker:
        await _until(lambda: len(descendants(worker.pid)) > 1, 60)
        await asyncio.sleep(2)
        idle = memory_of(worker.pid)
        async with _sampled(worker.pid) as samples:
            jobs = {name: _upload(stack, name, datas) for name, datas in files.items()}
            began, seconds = time.monotonic(), dict[str, float]()
            while len(seconds) < len(jobs) and time.monotonic() < began + LONGEST and worker.returncode is None:
                await asyncio.sleep(0.5)
                for name, job in jobs.items():
                    if name not in seconds and await asyncio.to_thread(_is_finished, stack, job):
                        seconds[name] = round(time.monotonic() - began, 1)
        alive = worker.returncode is None
    return {
        "peak_mb": max(samples) / MEGABYTE, "idle_mb": round(idle / MEGABYTE), "limit_mb": MEMORY,
        "worker_lived": alive, "seconds": seconds, "outcomes": _outcomes(stack, jobs),
    }  # fmt: skip


def _upload(stack: Stack, name: str, datas: list[bytes]) -> str:
    member: Member = stack.add_member(name)
    assert stack.files
    paths = [f"{member.workspace}/{n}" for n in range(len(datas))]
    with stack.connect(stack.database_url()) as connection:
        put_files(connection, stack.files, "assets", [(p, "image/jpeg", d) for p, d in zip(paths, datas, strict=True)])
        rows = connection.execute(
            "insert into public.assets (workspace_id, storage_path) select %s, p from unnest(%s::text[]) p"
            " returning id",
            (member.workspace, paths),
        ).fetchall()
        row = connection.execute(
            "select job_id from public.enqueue_tagging(%s)", ([row[0] for row in rows],)
        ).fetchone()
    assert row
    return str(row[0])


def _is_finished(stack: Stack, job: str) -> bool:
    with stack.connect(stack.database_url()) as connection:
        row = connection.execute("select finished_at from autotag.jobs where id = %s", (job,)).fetchone()
    return row is not None and row[0] is not None


def _outcomes(stack: Stack, jobs: dict[str, str]) -> dict[str, dict[str, int]]:
    outcomes = {}
    with stack.connect(stack.database_url()) as connection:
        for name, job in jobs.items():
            failed = connection.execute(
                "select error_code from autotag.tasks where job_id = %s and finished_at is not null", (job,)
            ).fetchall()
            row = connection.execute("select completed from autotag.jobs where id = %s", (job,)).fetchone()
            outcomes[name] = {"tagged": row[0] if row else 0, **Counter(code for (code,) in failed)}
    return outcomes


@contextlib.asynccontextmanager
async def _sampled(pid: int) -> AsyncIterator[list[int]]:
    samples = [0]

    async def sample() -> None:
        while True:
            samples.append(await asyncio.to_thread(memory_of, pid))
            await asyncio.sleep(SAMPLE)

    task = asyncio.create_task(sample())
    try:
        yield samples
    finally:
        task.cancel()


async def _until(condition: Any, patience: float) -> None:
    async with asyncio.timeout(patience):
        while not condition():  # noqa: ASYNC110 (other processes)
            await asyncio.sleep(0.1)


def memory_of(pid: int) -> int:
    """Bytes of a process, of its descendants, and of the files in memory that they have open."""
    total, files = 0, dict[int, int]()
    for process in descendants(pid):
        with contextlib.suppress(OSError):
            with open(f"/proc/{process}/smaps_rollup", encoding="ascii") as file:
                total += sum(1024 * int(line.split()[1]) for line in file if line.startswith("Pss:"))
            for entry in os.scandir(f"/proc/{process}/fd"):
                if os.readlink(entry.path).startswith("/memfd:"):
                    stat = os.stat(entry.path)
                    files[stat.st_ino] = 512 * stat.st_blocks
    return total + sum(files.values())


def descendants(pid: int) -> list[int]:
    """A process and all its descendants."""
    found = [pid]
    for process in found:
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{process}/task"):
                with open(f"/proc/{process}/task/{task}/children", encoding="ascii") as file:
                    found += [int(child) for child in file.read().split()]
    return found
