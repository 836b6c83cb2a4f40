"""A batch of 50,000 lines through a real worker: built, uploaded, downloaded and stored, next to the plain way.

Every image is fetched from storage and encoded by the worker, as always; all of them are the same small picture, so
that one file (of at most 200 MB) holds them. The plain way gets its lines for free, holds whole files in memory and
stores row by row.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import sys
from dataclasses import dataclass
from typing import Any

import psycopg
from PIL import Image
from psycopg.rows import dict_row
from rich.console import Console

from benchmarks.report import Figure, Result
from lab.ending import group
from lab.machine import memory
from lab.openai_sim.app import Plan
from lab.postgres import install_autotag, local_postgres, machine_binaries
from lab.stack import Member, Stack, local_stack, worker_process

SMALL, LARGE = 5_000, 50_000
SIDE = 48  # pixels of the picture
IDLE = 3.0  # seconds until a worker that has just started is at rest
SETTINGS = {
    "job_max_images": LARGE, "batch_max_images": LARGE, "express_images": 0, "batch_images_per_hour": 10 * LARGE,
    "batch_poll_interval": "0.5 s",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One upload: seconds from the upload to OpenAI's having it, and from OpenAI's being done to the last row."""

    lines: int
    submit: float
    store: float
    peak_mb: float


async def measure(console: Console) -> Result:
    """A worker with a small and a large batch, then the plain way with the large one."""
    plan = Plan(
        batch_latency=(0.0, 0.0), queued_batch_tokens=10**12, requests_per_minute=10**6, tokens_per_minute=10**9
    )
    with local_postgres(machine_binaries(), {"shared_buffers": "256MB"}) as server:
        install_autotag(server)
        async with local_stack(server, plan=plan) as stack:
            stack.configure(**SETTINGS)
            with psycopg.connect(stack.database_url(), autocommit=True) as owner:
                owner.execute("update autotag.provider_limits set queued_batch_tokens = 1000000000000")
            member = stack.add_member()
            await _store_picture(stack, member)
            async with worker_process(stack.worker_environment()) as worker:
                await asyncio.sleep(IDLE)
                idle = memory(worker.pid, "VmRSS")
                runs = [await _run(console, stack, member, worker.pid, lines) for lines in (SMALL, LARGE)]
            console.print(f"the plain way, {LARGE:,} lines …")
            plain = await _plain(stack, member)
    small, large = runs
    per_line = [(run.submit + run.store) / run.lines for run in runs]
    figures = {
        "peak_mb_over_idle": Figure(large.peak_mb - idle, 150, "lower"),
        "rows_per_s": Figure(large.lines / large.store, 10_000, "higher"),
        "time_linearity": Figure(per_line[1] / per_line[0], 1.15, "lower"),
    }
    details = {
        "idle, MB": round(idle, 1),
        **{f"{run.lines} lines": {
            "build and upload, s": round(run.submit, 2), "download and store, s": round(run.store, 2),
            "rows stored a second": round(run.lines / run.store), "peak over idle, MB": round(run.peak_mb - idle, 1),
        } for run in (small, large)},
        "the plain way": plain,
    }  # fmt: skip
    return Result("batch", figures, details)


async def _store_picture(stack: Stack, member: Member) -> None:
    out = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (200, 30, 30)).save(out, "JPEG")
    bucket = stack.storage().from_("assets")
    await bucket.upload(f"{member.workspace}/small.jpg", out.getvalue(), {"content-type": "image/jpeg"})


async def _run(console: Console, stack: Stack, member: Member, pid: int, lines: int) -> Run:
    console.print(f"{lines:,} lines …")
    with psycopg.connect(stack.database_url(), autocommit=True, row_factory=dict_row) as owner:
        owner.execute(
            "insert into public.assets (workspace_id, storage_path)"
            " select %s, %s || '/small.jpg' from generate_series(1, %s)",
            (member.workspace, member.workspace, lines),
        )
        owner.execute("analyze public.assets")
        owner.execute(
            "select autotag.enqueue(array("
            "  select id from public.assets where tagging_stage is null and workspace_id = %s))",
            (member.workspace,),
        )
        while True:
            row = owner.execute(
                "select b.state, extract(epoch from b.submitted_at - b.created_at)::float as submit,"
                " extract(epoch from b.finished_at - b.ended_at)::float as store, j.completed"
                " from autotag.batches b join autotag.jobs j on j.id = b.job_id order by j.created_at desc limit 1"
            ).fetchone()
            assert row is not None
            if row["state"] == "done":
                break
            await asyncio.sleep(0.2)
    assert row["completed"] == lines, f"{row['completed']} of {lines} images were tagged"
    return Run(lines, row["submit"], row["store"], memory(pid, "VmHWM"))


async def _plain(stack: Stack, member: Member) -> dict[str, Any]:
    """The plain way in a process of its own."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.batch_plain", str(LARGE), member.workspace,
        env={"PATH": os.environ.get("PATH", ""), "OWNER_URL": stack.database_url(), **stack.worker_environment()},
        stdout=asyncio.subprocess.PIPE, process_group=group(),
    )  # fmt: skip
    out, _ = await process.communicate()
    result: dict[str, Any] = json.loads(out)
    return result
