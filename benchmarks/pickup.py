"""The pick-up latency: from an upload's commit to the request at the provider, idle and with 64 calls in flight.

It includes the notification, the claim, the download from Storage, and the preparation of the image.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Iterator

import psycopg
from rich.console import Console

from benchmarks.report import quantile
from lab.openai_sim.app import Plan
from lab.pictures import Drawing, draw
from lab.postgres import install_autotag, local_postgres, machine_binaries
from lab.stack import Member, Stack, local_stack, worker_process

ALONE, BUSY = 150, 400  # uploads of one image
IN_FLIGHT, LATENCY = 64, 3.5  # calls, and seconds of each
WARM_UP = 80  # uploads until IN_FLIGHT calls are in flight


async def measure(console: Console) -> dict[str, tuple[float, float]]:
    """Median and 99th percentile in milliseconds, idle and busy."""
    drawings = draw(ALONE + BUSY + WARM_UP)
    with local_postgres(machine_binaries()) as server:
        install_autotag(server)
        plan = Plan(requests_per_minute=10**6, tokens_per_minute=10**9, requests_per_day=None, latency=(0.01, 0.01))
        async with local_stack(server, plan=plan) as stack:
            stack.configure(realtime_requests_per_minute=10**6, realtime_tokens_per_minute=10**9)
            member = stack.add_member()
            async with worker_process(stack.worker_environment()):
                console.print(f"{ALONE} uploads, one after another …")
                uploads = await _store(stack, member, drawings, ALONE)
                alone = await _run(stack, uploads, pause=0.05)
                stack.simulator.plan.latency = (LATENCY, LATENCY)
                console.print(f"{BUSY} uploads, {IN_FLIGHT} calls in flight …")
                uploads = await _store(stack, member, drawings, WARM_UP + BUSY)
                busy = (await _run(stack, uploads, pause=LATENCY / IN_FLIGHT))[WARM_UP:]
                max_in_flight = stack.simulator.max_in_flight
    assert max_in_flight >= IN_FLIGHT * 0.9, f"only {max_in_flight} calls were in flight"
    return {
        name: (statistics.median(latencies), quantile(latencies, 0.99))
        for name, latencies in (("idle", alone), (f"{IN_FLIGHT} calls in flight", busy))
    }


async def _store(stack: Stack, member: Member, drawings: Iterator[Drawing], count: int) -> list[tuple[Drawing, str]]:
    """Stores ``count`` pictures; returns them with the ids of their rows."""
    bucket, stored = stack.storage().from_("assets"), []
    async with await psycopg.AsyncConnection.connect(stack.database_url(), autocommit=True) as owner:
        for _ in range(count):
            drawing = next(drawings)
            path = f"{member.workspace}/{drawing.name}"
            await bucket.upload(path, drawing.data, {"content-type": drawing.content_type})
            cursor = await owner.execute(
                "insert into public.assets (workspace_id, storage_path) values (%s, %s) returning id::text",
                (member.workspace, path),
            )
            row = await cursor.fetchone()
            assert row is not None
            stored.append((drawing, str(row[0])))
    return stored


async def _run(stack: Stack, uploads: list[tuple[Drawing, str]], *, pause: float) -> list[float]:
    """Makes one upload every ``pause`` seconds; returns the milliseconds from each commit to the request."""
    committed = {}
    async with await psycopg.AsyncConnection.connect(stack.database_url(), autocommit=True) as owner:
        for drawing, asset in uploads:
            async with owner.transaction():
                await owner.execute("select public.enqueue_tagging(array[%s::uuid])", (asset,))
                committed[drawing.tags] = time.time()  # just before the commit, so the latency is never understated
            await asyncio.sleep(pause)
    requests: dict[frozenset[str], float] = {}
    async with asyncio.timeout(60):
        while not committed.keys() <= requests.keys():
            await asyncio.sleep(0.1)
            requests = {frozenset(e["tags"]): e["at"] for e in stack.simulator.request_log if e.get("tags")}
    return [(requests[tags] - commit_time) * 1000 for tags, commit_time in committed.items()]
