"""Hostile files in a real worker: the process survives within its memory, and other tenants notice nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from benchmarks.images import descendants, memory_of
from lab.edge.storage import put_files
from lab.image_files import encoded, flat_png, quarters, slow_jpeg
from lab.stack import Stack, worker_process
from support import Library, connected, until

MEMORY = 512  # MB, the default
SLACK = 100  # MB, as in ./scripts/bench images
VIDEO = b"\0\0\0\x20ftypisom" + bytes(60_000_000)


def store(library: Library, files: Sequence[bytes]) -> list[str]:
    """Stores these files, with rows in the library's workspace."""
    stack, workspace = library.stack, library.member.workspace
    paths = [f"{workspace}/hostile-{n}-{len(data)}" for n, data in enumerate(files)]
    assert stack.files
    with connected(stack.database_url()) as connection:
        stored = [(path, "image/jpeg", data) for path, data in zip(paths, files, strict=True)]
        put_files(connection, stack.files, "assets", stored)
    return library.insert(paths)


@contextlib.asynccontextmanager
async def sampled(pid: int) -> AsyncIterator[list[int]]:
    peaks = [0]

    async def sample() -> None:
        while True:
            peaks[0] = max(peaks[0], await asyncio.to_thread(memory_of, pid))
            await asyncio.sleep(0.03)

    task = asyncio.create_task(sample())
    try:
        yield peaks
    finally:
        task.cancel()


def environment(stack: Stack) -> dict[str, str]:
    return {**stack.worker_environment(), "AUTOTAG_MEMORY": str(MEMORY)}


def busy_child(worker: int) -> int | None:
    """A process that decodes for this worker: one with processor time of its own that is not the fork server."""
    for pid in descendants(worker)[2:]:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            if fields[0] == "R" and int(fields[11]) > 5:
                return pid
    return None


async def test_hostile_files_cost_their_tenant_and_nobody_else(library: Library) -> None:
    hostile, quiet = Library(library.stack), library
    library.stack.prove()
    files = [
        VIDEO, flat_png(9000, 9000), slow_jpeg(3000, 90), flat_png(3600, 3600), encoded(quarters((9000, 9000)), "JPEG"),
        b"\x89PNG\r\n\x1a\nrubbish", b"",
    ]  # fmt: skip
    async with worker_process(environment(library.stack)) as worker, sampled(worker.pid) as peaks:
        bad = hostile.enqueue_as_server(store(hostile, files))
        good = quiet.enqueue(await quiet.upload(12))
        [job] = await quiet.finished(good)
        assert job["completed"] == 12
        quiet.check_tags()
        [job] = await hostile.finished(bad)
        assert job["completed"] + job["failed"] == len(files)
        assert worker.returncode is None, "the worker lives"
        assert peaks[0] < (MEMORY + SLACK) * 1_000_000
    rows = library.sql("select error_code, error from autotag.tasks where job_id = %s", bad["job_id"])
    codes = {row["error_code"] for row in rows}
    assert "file_too_large" in codes
    assert codes <= {
        "file_too_large", "image_too_large", "image_too_expensive", "unsupported_format", "damaged_image", "empty_file",
        "unreadable_image", "not_an_image",
    }  # fmt: skip


async def test_a_child_that_the_kernel_kills_costs_one_more_try(library: Library) -> None:
    library.stack.prove()
    async with worker_process(environment(library.stack)) as worker:
        job = library.enqueue_as_server(store(library, [slow_jpeg(4000, 95)]))
        await until(lambda: busy_child(worker.pid) is not None, "a child to decode")
        child = busy_child(worker.pid)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child or 0, signal.SIGKILL)
        [ended] = await library.finished(job)
        assert (ended["completed"], worker.returncode) == (1, None)


async def test_no_child_survives_its_worker_and_a_stop_waits_for_an_image(library: Library) -> None:
    library.stack.prove()
    for number, completed in ((signal.SIGTERM, 1), (signal.SIGKILL, 0)):
        async with worker_process(environment(library.stack)) as worker:
            job = library.enqueue_as_server(store(library, [slow_jpeg(4000, 60 + completed)]))
            await until(lambda pid=worker.pid: busy_child(pid) is not None, "a child to decode")  # type: ignore[misc]
            children = descendants(worker.pid)[1:]
            worker.send_signal(number)
            assert await worker.wait() == (0 if number == signal.SIGTERM else -signal.SIGKILL)
            await until(lambda pids=children: not any(map(is_alive, pids)), "the children to end")  # type: ignore[misc]
        assert library.job(job["job_id"])["completed"] == completed


def is_alive(pid: int) -> bool:
    """Whether a process runs. (A zombie does not.)"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
