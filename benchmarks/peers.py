"""Common alternatives on the same simulator: bursts with backoff, a throttle per process, and LiteLLM's Router.

Each gets the prepared requests of every upload. The results come from the simulator's request log. Times are divided by
``speed``, like the provider's minutes.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from lab.ending import group, temporary_folder

LITELLM = "litellm==1.110.2"
MIN_BACKOFF = 1.0  # seconds; doubled after each 429, with jitter, as in the usual examples
MAX_BACKOFF = 60.0  # seconds
COOKBOOK_PAUSE = 15.0  # seconds after a 429 (OpenAI's cookbook, api_request_parallel_processor.py)


@dataclass(frozen=True)
class Job:
    """One upload for a peer: its time and the bodies of its requests."""

    at: float
    bodies: Sequence[dict[str, Any]]
    tokens: int  # of one request


Peer = Callable[[str, str, Sequence[Job], float], Awaitable[None]]


async def _post(client: httpx.AsyncClient, body: dict[str, Any]) -> int:
    return (await client.post("/chat/completions", json=body)).status_code


def _client(url: str, key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url,
        headers={"authorization": f"Bearer {key}"},
        timeout=None,
        # shorter than the server's 5 s, so that no request is sent on a connection that the server is closing
        limits=httpx.Limits(max_connections=None, keepalive_expiry=1),
    )


async def burst(url: str, key: str, jobs: Sequence[Job], speed: float) -> None:
    """Sends every image of an upload immediately; a 429 is retried with exponential backoff."""
    rng = random.Random(1)

    async def call(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        delay = MIN_BACKOFF
        while await _post(client, body) == 429:
            await asyncio.sleep(delay * (0.5 + rng.random()) / speed)
            delay = min(delay * 2, MAX_BACKOFF)

    async def upload(client: httpx.AsyncClient, job: Job) -> None:
        await asyncio.sleep(job.at / speed)
        await asyncio.gather(*(call(client, body) for body in job.bodies))

    async with _client(url, key) as client:
        await asyncio.gather(*(upload(client, job) for job in jobs))


async def throttle(url: str, key: str, jobs: Sequence[Job], speed: float) -> None:
    """One parallel processor of OpenAI's cookbook per upload, each with a bucket for the whole limit."""

    async def upload(client: httpx.AsyncClient, job: Job) -> None:
        await asyncio.sleep(job.at / speed)
        loop = asyncio.get_running_loop()
        requests, tokens, at, paused = 500.0, 200_000.0, loop.time(), 0.0
        waiting = list(job.bodies)
        in_flight: set[asyncio.Task[None]] = set()

        async def call(body: dict[str, Any]) -> None:
            nonlocal paused
            if await _post(client, body) == 429:
                paused = loop.time()
                waiting.append(body)

        while waiting or in_flight:
            now = loop.time()
            requests = min(500.0, requests + 500 * (now - at) * speed / 60)
            tokens = min(200_000.0, tokens + 200_000 * (now - at) * speed / 60)
            at = now
            if waiting and requests >= 1 and tokens >= job.tokens:
                requests, tokens = requests - 1, tokens - job.tokens
                task = asyncio.create_task(call(waiting.pop(0)))
                in_flight.add(task)
                task.add_done_callback(in_flight.discard)
            await asyncio.sleep(0.001)
            if paused and (pause := COOKBOOK_PAUSE / speed - (loop.time() - paused)) > 0:
                await asyncio.sleep(pause)

    async with _client(url, key) as client:
        await asyncio.gather(*(upload(client, job) for job in jobs))


async def litellm(url: str, key: str, jobs: Sequence[Job], speed: float) -> None:
    """LiteLLM's Router with rpm and tpm set, in a separate Python environment, because it needs other versions."""
    python = await asyncio.to_thread(litellm_python)
    script = Path(__file__).parent / "litellm_peer.py"
    with temporary_folder("autotag-peers-") as folder:
        file = folder / "jobs.json"
        file.write_text(json.dumps([{"at": job.at, "bodies": list(job.bodies)} for job in jobs]))
        process = await asyncio.create_subprocess_exec(
            str(python), str(script), url, key, str(file), str(speed), stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE, process_group=group(),
        )  # fmt: skip
        try:
            _, stderr = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            raise
    if process.returncode != 0:
        raise RuntimeError(f"The LiteLLM peer failed:\n{stderr.decode()[-2000:]}")


def litellm_python() -> Path:
    """The Python of LiteLLM's environment, which the first call creates next to this one."""
    folder = Path(sys.prefix).parent / ".venv-litellm"
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        print("bench: installing LiteLLM into .venv-litellm …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", LITELLM], check=True)
        (folder / ".ready").write_text(LITELLM)
    return python


PEERS: dict[str, Peer] = {"burst with backoff": burst, "throttle per process": throttle, "LiteLLM Router": litellm}
