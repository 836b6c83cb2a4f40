"""What people use instead, on the same simulator: bursts with backoff, a throttle per process, LiteLLM's Router.

Each gets the prepared requests of every upload and sends them as that design does; what came of it is read
from the provider's book. Times are divided by ``speed``, as the provider's minutes are.
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
FIRST_BACKOFF = 1.0  # seconds; doubled, with jitter, as the usual examples have it
MAX_BACKOFF = 60.0
COOKBOOK_PAUSE = 15.0  # seconds after a 429 (OpenAI's cookbook, api_request_parallel_processor.py)


@dataclass(frozen=True)
class Job:
    """One upload as a peer gets it: when, and the bodies of its requests."""

    at: float
    bodies: Sequence[dict[str, Any]]
    tokens: int  # that one request counts for


Peer = Callable[[str, str, Sequence[Job], float], Awaitable[None]]


async def _post(client: httpx.AsyncClient, body: dict[str, Any]) -> int:
    return (await client.post("/chat/completions", json=body)).status_code


def _client(url: str, key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url,
        headers={"authorization": f"Bearer {key}"},
        timeout=None,
        limits=httpx.Limits(max_connections=None),
    )


async def burst(url: str, key: str, jobs: Sequence[Job], speed: float) -> None:
    """Every image of an upload at once; whoever meets a 429 backs off exponentially and tries again."""
    dice = random.Random(1)

    async def call(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
        delay = FIRST_BACKOFF
        while await _post(client, body) == 429:
            await asyncio.sleep(delay * (0.5 + dice.random()) / speed)
            delay = min(delay * 2, MAX_BACKOFF)

    async def upload(client: httpx.AsyncClient, job: Job) -> None:
        await asyncio.sleep(job.at / speed)
        await asyncio.gather(*(call(client, body) for body in job.bodies))

    async with _client(url, key) as client:
        await asyncio.gather(*(upload(client, job) for job in jobs))


async def throttle(url: str, key: str, jobs: Sequence[Job], speed: float) -> None:
    """The cookbook's parallel processor, one for each upload: a bucket of the whole limit in every process."""

    async def upload(client: httpx.AsyncClient, job: Job) -> None:
        await asyncio.sleep(job.at / speed)
        loop = asyncio.get_running_loop()
        requests, tokens, at, paused = 500.0, 200_000.0, loop.time(), 0.0
        waiting = list(job.bodies)
        flying: set[asyncio.Task[None]] = set()

        async def call(body: dict[str, Any]) -> None:
            nonlocal paused
            if await _post(client, body) == 429:
                paused = loop.time()
                waiting.append(body)

        while waiting or flying:
            now = loop.time()
            requests = min(500.0, requests + 500 * (now - at) * speed / 60)
            tokens = min(200_000.0, tokens + 200_000 * (now - at) * speed / 60)
            at = now
            if waiting and requests >= 1 and tokens >= job.tokens:
                requests, tokens = requests - 1, tokens - job.tokens
                task = asyncio.create_task(call(waiting.pop(0)))
                flying.add(task)
                task.add_done_callback(flying.discard)
            await asyncio.sleep(0.001)
            if paused and (rest := COOKBOOK_PAUSE / speed - (loop.time() - paused)) > 0:
                await asyncio.sleep(rest)

    async with _client(url, key) as client:
        await asyncio.gather(*(upload(client, job) for job in jobs))


async def litellm(url: str, key: str, jobs: Sequence[Job], speed: float) -> None:
    """LiteLLM's Router with rpm and tpm set, in a Python environment of its own (its pins differ from ours)."""
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
            _, said = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            raise
    if process.returncode != 0:
        raise RuntimeError(f"LiteLLM's peer failed:\n{said.decode()[-2000:]}")


def litellm_python() -> Path:
    """The environment beside this one's, made when it is needed first."""
    folder = Path(sys.prefix).parent / ".venv-litellm"
    python = folder / "bin" / "python"
    if not (folder / ".ready").exists():
        print("bench: installing LiteLLM into .venv-litellm …", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", LITELLM], check=True)
        (folder / ".ready").write_text(LITELLM)
    return python


PEERS: dict[str, Peer] = {"burst with backoff": burst, "throttle per process": throttle, "LiteLLM Router": litellm}
