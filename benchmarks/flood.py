"""A worker whose ports are flooded: how long its health check takes, how fast it goes on tagging, what it logs.

The flood is 1,000 connections that send a byte a second, each opened again when it is closed, beside 100 requests of
rubbish a second, first at the port for health and then at the webhook's. It comes from a process of its own, but from
the same machine: that process, Postgres and the stand-ins for Storage and the provider take their share of the same
processors, which no attacker elsewhere would. A worker that tags as fast as it can would therefore be slower beside the
flood even if it ignored it. So what is compared is a rate that the provider's limits set and not the processor: `RATE`
images a second, somewhat more than OpenAI's tier 1 allows, for which a worker needs a fifth of a core. It keeps that
rate exactly as long as the flood holds up neither its claims, nor its calls, nor its reports. What the flood costs the
worker in processor time is in the details.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
from rich.console import Console

from benchmarks.report import Figure, Result, quantile
from lab.ending import group, temporary_folder
from lab.machine import processor_seconds
from lab.openai_sim.app import Plan, Simulator
from lab.openai_sim.limits import Limits
from lab.pictures import draw
from lab.postgres import LocalPostgres, free_port, install_autotag, local_postgres, machine_binaries
from lab.stack import HOST, Stack, local_stack, worker_process

RATE = 10  # images a second that the provider's limits allow
SLOW, RUBBISH = 1000, 100  # connections; requests a second
FILES = 1024  # that the worker may have open, as processes usually may
SETTLE = 3.0  # seconds at the beginning of a phase that do not count: connections are made, the bucket is empty
PROBE = 0.25  # seconds between health checks
PICTURES = 20
ORDER = (None, "health", "webhook", None)
#: Settings by which one upload of any size goes as single calls that wait for the provider's limits alone.
UNPACED = {
    "realtime_requests_per_minute": 10**6, "realtime_tokens_per_minute": 10**9, "realtime_max_wait": "1 day",
    "realtime_max_images": 40_000, "chunk_max_images": 40_000, "batch_max_images": 40_000,
}  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """What was measured while one port was flooded, or none."""

    flooded: str | None
    images: float  # a second
    healthz: list[float]  # seconds
    log: float  # bytes a minute
    processor: float  # milliseconds of the worker's an image, whatever else it did

    def as_json(self) -> dict[str, Any]:
        """For the details."""
        median, worst = (round(seconds * 1000, 1) for seconds in (quantile(self.healthz, 0.5), max(self.healthz)))
        return {
            "flooded": self.flooded, "images a second": round(self.images, 2),
            "worker's processor ms an image": round(self.processor, 1),
            "healthz ms": {"median": median, "worst": worst},
            "log bytes a minute": round(self.log),
        }  # fmt: skip


async def measure(console: Console, *, seconds: float = 60) -> Result:
    """Quiet, flooded at one port, flooded at the other, quiet again; so many seconds each."""
    with local_postgres(machine_binaries()) as server:
        install_autotag(server)
        phases = await phases_of(server, "postgres", console, seconds)
    return judge(phases)


def judge(phases: list[Phase]) -> Result:
    """The figures: the worst of the flooded phases against the mean of the quiet ones."""
    flooded = [phase for phase in phases if phase.flooded]
    # What piled up beside the flood is caught up with afterwards, faster than the limits' rate.
    quiet = [min(phase.images, RATE) for phase in phases if not phase.flooded]
    figures = {
        "healthz_worst_ms": Figure(max(max(phase.healthz) for phase in flooded) * 1000, 1000, "lower"),
        "tagging_ratio": Figure(min(phase.images for phase in flooded) / (sum(quiet) / len(quiet)), 0.9, "higher"),
        "log_bytes_per_minute": Figure(max(phase.log for phase in flooded), 1_000_000, "lower"),
    }
    return Result("flood", figures, {"phases": [phase.as_json() for phase in phases]})


async def phases_of(
    server: LocalPostgres, database: str, console: Console, seconds: float, order: tuple[str | None, ...] = ORDER
) -> list[Phase]:
    """One worker, and which of its ports is flooded in each phase."""
    plan = Plan(latency=(0.2, 0.4), requests_per_day=None)
    ports = {"health": free_port(), "webhook": free_port()}
    phases = []
    with temporary_folder("autotag-flood-") as folder:
        path = folder / "log"
        async with local_stack(server, database, plan=plan) as stack:
            await _fill(stack, images=int(RATE * 4 * (seconds + SETTLE) * 1.5) + 100)
            environment = stack.worker_environment() | {
                "AUTOTAG_HTTP": f"{HOST}:{ports['health']}", "AUTOTAG_WEBHOOK": f"{HOST}:{ports['webhook']}",
                "OPENAI_WEBHOOK_SECRET": plan.webhook_secret,
            }  # fmt: skip
            with path.open("wb") as log:
                async with worker_process(environment, log) as process:
                    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (FILES, FILES))
                    await _begun(stack.simulator)
                    for flooded_port in order:
                        console.print(
                            f"{seconds:g} s, {f'the port for {flooded_port} flooded' if flooded_port else 'quiet'} …"
                        )
                        async with flooded(ports[flooded_port]) if flooded_port else contextlib.nullcontext():
                            phases.append(
                                await _phase(stack, process.pid, path, ports["health"], flooded_port, seconds)
                            )
    return phases


async def _phase(stack: Stack, pid: int, log: Path, port: int, flooded_port: str | None, seconds: float) -> Phase:
    logged = os.stat(log).st_size  # what the flood's first seconds write counts
    began = time.time()
    await asyncio.sleep(SETTLE)
    started, used = time.time(), processor_seconds([pid])
    waits: list[float] = []
    while time.time() < started + seconds:
        waits.append(await _ask_health(port))
        await asyncio.sleep(PROBE)
    ended = time.time()
    images = sum(
        started <= entry.get("done", 0) < ended and entry["status"] == 200 for entry in stack.simulator.request_log
    )
    return Phase(
        flooded_port, images / (ended - started), waits, (os.stat(log).st_size - logged) / (ended - began) * 60,
        (processor_seconds([pid]) - used) * 1000 / max(images, 1),
    )  # fmt: skip


async def _ask_health(port: int) -> float:
    """Seconds of one health check, over a connection of its own as a probe's is."""
    async with httpx.AsyncClient(timeout=10) as client:
        began = time.monotonic()
        answer = await client.get(f"http://{HOST}:{port}/healthz")
        took = time.monotonic() - began
    assert answer.status_code == 200, answer.text
    return took


@contextlib.asynccontextmanager
async def flooded(port: int) -> AsyncIterator[None]:
    """The flood, for as long as the context is open."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.flood_client",
        str(port),
        str(SLOW),
        str(RUBBISH),
        process_group=group(),
    )
    try:
        yield
        assert process.returncode is None, "the flood ended"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _fill(stack: Stack, images: int) -> None:
    """One upload that lasts for all phases, and buckets whose burst is over."""
    member, bucket = stack.add_member(), stack.storage().from_("assets")
    paths = []
    for drawing in draw(PICTURES):
        paths.append(f"{member.workspace}/{drawing.name}")
        await bucket.upload(paths[-1], drawing.data, {"content-type": drawing.content_type})
    stack.configure(**UNPACED)
    stack.prove()
    stack.simulator.limits = Limits.of(RATE * 60, 10**9, None)
    stack.simulator.limits.requests.left = 0.0
    with psycopg.connect(stack.database_url(), autocommit=True) as owner:
        owner.execute(
            "update autotag.provider_limits set requests_per_minute = %s, requests_left = 0, requests_per_day = null,"
            " tokens_per_minute = 1000000000, tokens_left = 1000000000, refilled_at = autotag.now()",
            (RATE * 60,),
        )
        owner.execute(
            "insert into public.assets (workspace_id, storage_path) select %s, (%s::text[])[1 + i %% %s]"
            " from generate_series(1, %s) i",
            (member.workspace, paths, len(paths), images),
        )
        owner.execute(
            "select public.enqueue_tagging(array_agg(id)) from public.assets where workspace_id = %s",
            (member.workspace,),
        )


async def _begun(simulator: Simulator) -> None:
    """Waits for the first answer."""
    for _ in range(600):
        if any(entry.get("done") for entry in simulator.request_log):
            return
        await asyncio.sleep(0.1)
    raise TimeoutError("No image was tagged within a minute.")
