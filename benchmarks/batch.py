"""Runs a batch of 50,000 images through a real worker and compares it with a plain script (`batch_plain`).

The worker fetches every image from Storage and encodes it, as in production. All images are the same small picture, so
that their requests fit into one file of at most 200 MB. The plain script encodes the picture once, holds whole files in
memory and stores row by row.
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
STARTUP = 3.0  # seconds until a new worker is idle
SETTINGS = {
    "job_max_images": LARGE, "batch_max_images": LARGE, "express_images": 0, "batch_images_per_hour": 10 * LARGE,
    "batch_poll_interval": "0.5 s",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One upload.

    Attributes:
        submit: seconds from the creation of the batch to its submission to OpenAI.
        store: seconds from the batch's end at OpenAI to the last stored row.
        peak_mb: the worker's peak memory in megabytes.
    """

    lines: int
    submit: float
    store: float
    peak_mb: float


async def measure(console: Console) -> Result:
    """Runs a small and a large batch in one worker, then the large one in the plain script."""
    plan = Plan(
        batch_latency=(0.0, 0.0), queued_batch_tokens=10**12, requests_per_minute=10**6, tokens_per_minute=10**9
    )
    with local_postgres(machine_binaries(), {"shared_buffers": "256MB"}) as server:
        install_autotag(server)
        async with local_stack(server, plan=plan) as stack:
            stack.configure(**SETTINGS)
            stack.prove()  # otherwise one image of the first batch would be sent ahead as a probe
            with psycopg.connect(stack.database_url(), autocommit=True) as owner:
                owner.execute("update autotag.provider_limits set queued_batch_tokens = 1000000000000")
            member = stack.add_member()
            await _store_picture(stack, member)
            async with worker_process(stack.worker_environment()) as worker:
                await asyncio.sleep(STARTUP)
                idle = memory(worker.pid, "VmRSS")
                runs = [await _run(console, stack, member, worker.pid, lines) for lines in (SMALL, LARGE)]
            console.print(f"plain script: {LARGE:,} images …")
            plain = await _plain(stack, member)
    small, large = runs
    per_line = [(run.submit + run.store) / run.lines for run in runs]
    figures = {
        "peak_mb_over_idle": Figure(large.peak_mb - idle, 150, "lower"),
        "rows_per_s": Figure(large.lines / large.store, 10_000, "higher"),
        "time_linearity": Figure(per_line[1] / per_line[0], 1.15, "lower"),
    }
    details = {
        "idle memory, MB": round(idle, 1),
        **{f"{run.lines} images": {
            "build and upload, s": round(run.submit, 2), "download and store, s": round(run.store, 2),
            "rows stored per second": round(run.lines / run.store), "peak above idle, MB": round(run.peak_mb - idle, 1),
        } for run in (small, large)},
        "plain script": plain,
    }  # fmt: skip
    return Result("batch", figures, details)


async def _store_picture(stack: Stack, member: Member) -> None:
    out = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (200, 30, 30)).save(out, "JPEG")
    bucket = stack.storage().from_("assets")
    await bucket.upload(f"{member.workspace}/small.jpg", out.getvalue(), {"content-type": "image/jpeg"})


async def _run(console: Console, stack: Stack, member: Member, pid: int, lines: int) -> Run:
    console.print(f"autotag: {lines:,} images …")
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
    """Runs the plain script in a separate process, so that its memory can be measured."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.batch_plain", str(LARGE), member.workspace,
        env={"PATH": os.environ.get("PATH", ""), "OWNER_URL": stack.database_url(), **stack.worker_environment()},
        stdout=asyncio.subprocess.PIPE, process_group=group(),
    )  # fmt: skip
    out, _ = await process.communicate()
    result: dict[str, Any] = json.loads(out)
    return result
