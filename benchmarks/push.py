"""Two latencies: from a commit to the callback in supabase-js, and from the provider's answer to the committed tags.

The callback runs under Node and in a page of headless Chromium, and takes its time from the clocks that Python reads
too. Commit times of rows come from Postgres (track_commit_timestamp).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psycopg
from rich.console import Console

from benchmarks.report import Figure, Result, quantile
from lab.ending import group
from lab.pictures import draw
from lab.postgres import install_autotag, local_postgres, machine_binaries
from lab.stack import Stack, local_stack, worker_process

ROUNDS = 200
TOPIC = "push-bench"
CHROMIUM = shutil.which("chromium")
NOISE_PER_SECOND = 20  # job-progress messages sent in parallel
IN_FLIGHT, IMAGES = 64, 384
LATENCY = (2.0, 5.0)  # seconds of a call, as in makespan
SEND = "select realtime.send(jsonb_build_object('n', %s::int), %s, %s, false)"


async def measure(console: Console) -> Result:
    """Measures both latencies on one stack."""
    with local_postgres(machine_binaries(), {"track_commit_timestamp": "on"}) as server:
        install_autotag(server)
        async with local_stack(server) as stack:
            latencies: dict[str, list[float]] = {}
            for runtime in ("Node", "page") if CHROMIUM else ("Node",):
                for noisy in (False, True):
                    name = f"{runtime}, {f'{NOISE_PER_SECOND} other messages per second' if noisy else 'idle'}"
                    console.print(f"{ROUNDS} messages, {name} …")
                    latencies[name] = await _callbacks(stack, runtime, noisy=noisy)
            console.print(f"{IMAGES} images, {IN_FLIGHT} calls in flight …")
            rows = await _answers(stack)
    figures = {
        "median_ms": Figure(max(map(statistics.median, latencies.values())), 5, "lower"),
        "answer_to_row_p99_ms": Figure(quantile(rows, 0.99), 50, "lower"),
    }
    details = {
        "commit to callback, ms": {
            name: {"median": round(statistics.median(values), 2), "p99": round(quantile(values, 0.99), 2)}
            for name, values in latencies.items()
        },
        "answer to row, ms": {
            "median": round(statistics.median(rows), 2), "p90": round(quantile(rows, 0.9), 2),
            "p99": round(quantile(rows, 0.99), 2), "calls in flight": IN_FLIGHT, "images": len(rows),
        },
    }  # fmt: skip
    return Result("push", figures, details)


# -- commit → callback


@contextlib.asynccontextmanager
async def _listener(stack: Stack, runtime: str) -> AsyncIterator[asyncio.StreamReader]:
    """Runs supabase-js under Node or in a page; yields its output once it has subscribed."""
    script = Path(__file__).with_name("push.mjs" if runtime == "Node" else "push_page.mjs")
    process = await asyncio.create_subprocess_exec(
        "node", "--no-warnings", str(script), stdout=asyncio.subprocess.PIPE, process_group=group(),
        env={"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp"), "TOPIC": TOPIC,
             "SUPABASE_URL": stack.supabase_url, "SUPABASE_ANON_KEY": stack.anon_key, "CHROMIUM": CHROMIUM or ""},
    )  # fmt: skip
    assert process.stdout is not None
    try:
        async with asyncio.timeout(20):
            while json.loads(await process.stdout.readline()).get("status") != "SUBSCRIBED":
                pass
        yield process.stdout
    finally:
        process.terminate()  # playwright-core ends its browser too
        await process.wait()


async def _callbacks(stack: Stack, runtime: str, *, noisy: bool) -> list[float]:
    """Milliseconds from each commit to its callback."""
    latencies = []
    async with (
        await psycopg.AsyncConnection.connect(stack.database_url(), autocommit=True) as owner,
        _listener(stack, runtime) as output,
        _noise(stack, noisy),
    ):
        for n in range(ROUNDS):
            async with owner.transaction():
                await owner.execute(SEND, (n, "ping", TOPIC))
            committed = time.monotonic_ns() / 1e6 if runtime == "Node" else time.time() * 1000
            async with asyncio.timeout(20):
                line = json.loads(await output.readline())
            assert line["n"] == n, f"received message {line['n']} instead of {n}"
            latencies.append((int(line["at"]) / 1e6 if runtime == "Node" else line["at"]) - committed)
            await asyncio.sleep(0.01)
    return latencies


@contextlib.asynccontextmanager
async def _noise(stack: Stack, on: bool) -> AsyncIterator[None]:
    """Sends progress of other uploads on the same topic while the context is open."""

    async def send_forever() -> None:
        async with await psycopg.AsyncConnection.connect(stack.database_url(), autocommit=True) as owner:
            while True:
                await owner.execute(SEND, (0, "job-progress", TOPIC))
                await asyncio.sleep(1 / NOISE_PER_SECOND)

    task = asyncio.create_task(send_forever()) if on else None
    try:
        yield
    finally:
        if task:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


# -- the provider's answer → tags committed


async def _answers(stack: Stack) -> list[float]:
    """Milliseconds from each answer of the simulator to the commit of its row."""
    stack.simulator.plan.latency = LATENCY
    stack.simulator.limits = type(stack.simulator.limits).of(10**6, 10**9, None)
    stack.configure(
        realtime_max_images=IMAGES, chunk_max_images=IMAGES, batch_max_images=IMAGES,
        realtime_requests_per_minute=10**6, realtime_tokens_per_minute=10**9,
    )  # fmt: skip
    member = stack.add_member()
    bucket = stack.storage().from_("assets")
    drawings = list(draw(IMAGES))
    semaphore = asyncio.Semaphore(8)

    async def store(number: int) -> None:
        async with semaphore:
            await bucket.upload(f"{member.workspace}/{number}.jpg", drawings[number].data,
                                {"content-type": drawings[number].content_type})  # fmt: skip

    await asyncio.gather(*(store(number) for number in range(IMAGES)))
    environment = {**stack.worker_environment(), "AUTOTAG_SLOTS": str(IN_FLIGHT), "AUTOTAG_LOG_LEVEL": "error"}
    async with worker_process(environment):
        with psycopg.connect(stack.database_url(), autocommit=True) as owner:
            owner.execute("update autotag.provider_limits set requests_per_minute = 1000000, requests_per_day = null,"
                          " tokens_per_minute = 1000000000, refilled_at = '-infinity'")  # fmt: skip
            owner.execute(
                "insert into public.assets (workspace_id, storage_path)"
                " select %s, format('%%s/%%s.jpg', %s::text, i) from generate_series(0, %s) i",
                (member.workspace, member.workspace, IMAGES - 1),
            )
            owner.execute("select autotag.enqueue(array(select id from public.assets where workspace_id = %s))",
                          (member.workspace,))  # fmt: skip
            while True:
                await asyncio.sleep(0.2)
                row = owner.execute("select count(*) from autotag.jobs where finished_at is null").fetchone()
                if row == (0,):
                    break
            rows: list[Any] = owner.execute(
                "select tags, extract(epoch from pg_xact_commit_timestamp(xmin))::float from public.assets"
                " where workspace_id = %s", (member.workspace,),
            ).fetchall()  # fmt: skip
    answer_times = {
        frozenset(e["tags"]): e["done"] for e in stack.simulator.request_log if e["status"] == 200 and e.get("tags")
    }
    return [(committed - answer_times[frozenset(tags)]) * 1000 for tags, committed in rows]
