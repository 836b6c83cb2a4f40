"""llmock (https://pypi.org/project/llmock) breaks answers at random and judges how its client retries.

Its verdict is an opinion from outside: attempts are the same call when their bodies are equal, and the waits between
them are measured at the server. `report --strict` fails on

- a retry before Retry-After is over, whatever the status (0.05 s and 5 % are forgiven),
- a retry of a 400, 401, 403, 404 or 422,
- more than 10 attempts at one call,
- two or more waits after failures without Retry-After, none of them at least 1.1 times as long as the one before,
- a failed call that was never tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from lab.pictures import draw
from lab.postgres import free_port
from lab.stack import Stack
from support import PATIENCE, Library, audit, until, worker

pytest.importorskip("llmock")

RATES = {429: 0.15, 500: 0.10, 503: 0.10, 408: 0.03}
# llmock draws its faults from Python's own generator and has no option for the seed.
SEEDED = "import random; random.seed({seed}); from llmock.cli import app; app()"
WORKSPACES, IMAGES = 4, 12  # an upload of 12 goes by single calls: llmock's batches have nothing to do with its faults
LLMOCK_TAG, LLMOCK_CAPTION = "mock-tag", "mock-caption"  # what it makes of our JSON schema


@contextlib.asynccontextmanager
async def llmock(seed: int, log: Path, *options: str) -> AsyncIterator[str]:
    """Starts a real ``llmock serve`` on a port of its own, and yields its URL."""
    port = free_port()
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", SEEDED.format(seed=seed), "serve", "--port", str(port), "--log-level", "warning", *options,
            stdin=asyncio.subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
        url = f"http://127.0.0.1:{port}"
        try:
            await until(lambda: process.returncode is not None or is_up(url), "llmock to serve")
            assert process.returncode is None, f"llmock ended; {log} has what it said"
            yield url
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False


async def journal(url: str) -> list[dict[str, Any]]:
    """All requests that llmock has recorded (it keeps the last 10,000)."""
    async with httpx.AsyncClient(timeout=PATIENCE) as client:
        answer = await client.get(f"{url}/_llmock/requests")
    requests: list[dict[str, Any]] = answer.json()["requests"]
    return requests


async def strict_report(url: str) -> tuple[int, str]:
    """The exit code and the output of ``llmock report --strict``."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "llmock.cli", "report", "--strict", "--url", url,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


async def upload_everything(stack: Stack) -> list[tuple[Library, list[str], dict[str, Any]]]:
    """Uploads to several workspaces at a time. All pictures differ, so all calls do."""
    drawings = list(draw(WORKSPACES * IMAGES, seed=3))
    uploads = []
    for number in range(WORKSPACES):
        library = Library(stack)
        assets = await library.upload(drawings[number * IMAGES : (number + 1) * IMAGES], seed=number)
        uploads.append((library, assets, library.enqueue(assets)))
    return uploads


@pytest.mark.long
@pytest.mark.parametrize("seed", [1])
async def test_a_stranger_finds_no_fault_with_how_calls_are_tried_again(
    stack: Stack, tmp_path: Path, seed: int
) -> None:
    """With 15 % 429, 10 % 500, 10 % 503 and 3 % 408, every image is tagged, and the strict report has no complaint."""
    stack.configure(
        realtime_requests_per_minute=1000, realtime_tokens_per_minute=10_000_000, chunk_delay="0.1 s", retry_delay="4 s",
        max_failures=20, min_output_tokens=400, max_output_tokens=400,  # learning would change the body of a second try
    )  # fmt: skip
    rates = [option for status, rate in RATES.items() for option in ("--error-rate", f"{status}={rate}")]
    async with llmock(seed, tmp_path / "llmock.log", *rates, "--latency-ms", "20") as url:
        # As a provider that has answered before and was asked about the model today: llmock knows none.
        replace(stack, openai_url=f"{url}/v1").prove()
        Library(stack).sql("update autotag.provider_limits set checked_at = now()")
        async with worker(stack, openai_base_url=f"{url}/v1"):
            uploads = await upload_everything(stack)
            for library, _, told in uploads:
                [job] = await library.finished(told)
                assert (job["completed"], job["failed"]) == (IMAGES, 0), job
        requests = await journal(url)
        code, verdict = await strict_report(url)

    for library, assets, _ in uploads:
        rows = library.assets()
        assert [(rows[a]["tags"], rows[a]["tagging_result"]["caption"]) for a in assets] == [
            ([LLMOCK_TAG], LLMOCK_CAPTION)
        ] * IMAGES
    answers = Counter(r["status"] for r in requests)
    assert answers[200] == WORKSPACES * IMAGES, "an image was paid for twice"
    assert set(answers) == {200, *RATES}, "llmock did not break what it was told to break"
    assert {r["path"] for r in requests} == {"/v1/chat/completions"}
    audit(stack)
    assert code == 0, f"{verdict}\n{waits(requests)}"


def waits(requests: list[dict[str, Any]]) -> str:
    """A line for each call that failed: status and Retry-After of each attempt, and the seconds until the next."""
    calls: dict[str, list[dict[str, Any]]] = {}
    for request in requests:
        calls.setdefault(request["fingerprint"], []).append(request)
    lines = []
    for attempts in calls.values():
        steps = [f"#{attempts[0]['seq']}"]
        for attempt, following in itertools.pairwise(attempts):
            waited = following["started_at"] - attempt["ended_at"]
            steps.append(f"{attempt['status']}({json.dumps(attempt['retry_after'])}) {waited:.2f} s")
        if len(attempts) > 1:
            lines.append("  ".join([*steps, str(attempts[-1]["status"])]))
    return "\n".join(lines)
