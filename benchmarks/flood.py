"""A worker whose ports are flooded: the latency of its health check, its tagging rate and the volume of its log.

The flood consists of 1,000 connections that send one byte per second and reconnect when they are closed, and of 100
invalid requests per second, first to the health port and then to the webhook port.

The flood, Postgres, Storage and the provider run on the same machine as the worker and share its processors, so a
worker at full speed would slow down even if it ignored the flood. Therefore the provider limits the rate to `RATE`
images per second, somewhat more than OpenAI's tier 1 allows, for which a worker needs a fifth of a core. The worker
keeps this rate unless the flood delays its claims, calls or reports. The details have the processor time.
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

RATE = 10  # images per second that the provider's limits allow
SLOW, GARBAGE = 1000, 100  # slow connections; invalid requests per second
MAX_FILES = 1024  # open files of the worker: the usual limit of a process
SETTLE = 3.0  # seconds at the start of a phase that do not count: connections open, and the bucket is empty
PROBE = 0.25  # seconds between health checks
PICTURES = 20
ORDER = (None, "health", "webhook", None)
#: Settings with which an upload of any size becomes single calls that only the provider's limits delay.
UNPACED = {
    "realtime_requests_per_minute": 10**6, "realtime_tokens_per_minute": 10**9, "realtime_max_wait": "1 day",
    "realtime_max_images": 40_000, "chunk_max_images": 40_000, "batch_max_images": 40_000,
}  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """The measurements while one port, or none, was flooded."""

    flooded: str | None
    images: float  # per second
    healthz: list[float]  # seconds of each health check
    log: float  # bytes per minute
    processor: float  # milliseconds of the worker's processor time per image, including the flood's cost

    def as_json(self) -> dict[str, Any]:
        """For the details."""
        median, worst = (round(seconds * 1000, 1) for seconds in (quantile(self.healthz, 0.5), max(self.healthz)))
        return {
            "flooded": self.flooded, "images per second": round(self.images, 2),
            "worker's processor time per image, ms": round(self.processor, 1),
            "healthz, ms": {"median": median, "worst": worst},
            "log bytes per minute": round(self.log),
        }  # fmt: skip


async def measure(console: Console, *, seconds: float = 60) -> Result:
    """Runs four phases of ``seconds``: quiet, health port flooded, webhook port flooded, quiet."""
    with local_postgres(machine_binaries()) as server:
        install_autotag(server)
        phases = await phases_of(server, "postgres", console, seconds)
    return evaluate(phases)


def evaluate(phases: list[Phase]) -> Result:
    """The figures: the worst flooded phase compared with the mean of the quiet phases."""
    flooded = [phase for phase in phases if phase.flooded]
    # After a flood the worker catches up faster than RATE, so cap the quiet phases at RATE.
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
    """Runs one worker through the phases; ``order`` has the flooded port of each."""
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
                    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (MAX_FILES, MAX_FILES))
                    await _wait_for_first_answer(stack.simulator)
                    for flooded_port in order:
                        console.print(f"{seconds:g} s, {f'{flooded_port} port flooded' if flooded_port else 'quiet'} …")
                        async with flooded(ports[flooded_port]) if flooded_port else contextlib.nullcontext():
                            phases.append(
                                await _phase(stack, process.pid, path, ports["health"], flooded_port, seconds)
                            )
    return phases


async def _phase(stack: Stack, pid: int, log: Path, port: int, flooded_port: str | None, seconds: float) -> Phase:
    logged = os.stat(log).st_size  # before SETTLE, because the log of the flood's first seconds counts
    phase_start = time.time()
    await asyncio.sleep(SETTLE)
    started, cpu_before = time.time(), processor_seconds([pid])
    waits: list[float] = []
    while time.time() < started + seconds:
        waits.append(await _ask_health(port))
        await asyncio.sleep(PROBE)
    ended = time.time()
    images = sum(
        started <= entry.get("done", 0) < ended and entry["status"] == 200 for entry in stack.simulator.request_log
    )
    return Phase(
        flooded_port, images / (ended - started), waits, (os.stat(log).st_size - logged) / (ended - phase_start) * 60,
        (processor_seconds([pid]) - cpu_before) * 1000 / max(images, 1),
    )  # fmt: skip


async def _ask_health(port: int) -> float:
    """Seconds of one health check over a new connection, as probes make it."""
    async with httpx.AsyncClient(timeout=10) as client:
        started = time.monotonic()
        answer = await client.get(f"http://{HOST}:{port}/healthz")
        elapsed = time.monotonic() - started
    assert answer.status_code == 200, answer.text
    return elapsed


@contextlib.asynccontextmanager
async def flooded(port: int) -> AsyncIterator[None]:
    """Floods a port while the context is open."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "benchmarks.flood_client",
        str(port),
        str(SLOW),
        str(GARBAGE),
        process_group=group(),
    )
    try:
        yield
        assert process.returncode is None, "the flood ended early"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()


async def _fill(stack: Stack, images: int) -> None:
    """Enqueues one upload that lasts for all phases, and empties the buckets, so that there is no initial burst."""
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


async def _wait_for_first_answer(simulator: Simulator) -> None:
    """Waits for the provider's first answer."""
    for _ in range(600):
        if any(entry.get("done") for entry in simulator.request_log):
            return
        await asyncio.sleep(0.1)
    raise TimeoutError("No image was tagged within a minute.")
