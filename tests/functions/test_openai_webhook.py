"""The edge function openai-webhook, run by Deno: verifies, and forwards by the RPC."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator

import httpx
import pytest

from autotag_local.openai_sim.webhooks import batch_event, make_secret, sign
from autotag_local.postgres import free_port
from autotag_local.stack import Stack
from conftest import ROOT
from support import PATIENCE, Library, worker

FUNCTION = ROOT / "supabase" / "functions" / "openai-webhook"
DENO = ROOT / "node_modules" / ".bin" / "deno"
SECRET = make_secret()


@contextlib.asynccontextmanager
async def served(stack: Stack, **environment: str) -> AsyncIterator[str]:
    """The function's address; npm packages come from node_modules, as they are locked."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        str(DENO), "run", "--allow-net", "--allow-env", "--allow-read", "--node-modules-dir=manual", "--no-remote",
        "--config", str(FUNCTION / "deno.json"), str(FUNCTION / "index.ts"),
        env={
            "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp"), "NO_COLOR": "1",
            "DENO_SERVE_ADDRESS": f"tcp:127.0.0.1:{port}", "DENO_NO_UPDATE_CHECK": "1",
            "SUPABASE_URL": stack.supabase_url, "SUPABASE_SERVICE_ROLE_KEY": stack.secret_key, **environment,
        },
        stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/openai-webhook"
    try:
        async with asyncio.timeout(PATIENCE), httpx.AsyncClient() as client:
            while True:
                assert process.returncode is None, "Deno ended"
                with contextlib.suppress(httpx.ConnectError):
                    await client.get(url)
                    break
                await asyncio.sleep(0.1)
        yield url
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def test_a_project_whose_worker_has_no_address_is_told_at_once(library: Library) -> None:
    """OpenAI delivers to the function: polls are an hour apart, and the batch finishes all the same."""
    stack, plan = library.stack, library.stack.simulator.plan
    stack.configure(batch_poll_interval="1 h")
    assets = await library.upload(60)
    async with served(stack, OPENAI_WEBHOOK_SECRET=SECRET) as url, worker(stack):
        plan.webhook_url, plan.webhook_secret = url, SECRET
        await library.finished(library.enqueue(assets))
    library.check_tags()
    assert library.sql("select count(*) as n from autotag.webhooks")[0]["n"] == 1


async def test_what_is_not_genuine_does_not_reach_the_database(library: Library) -> None:
    stack = library.stack
    body = batch_event("completed", "batch_1")
    async with served(stack, OPENAI_WEBHOOK_SECRET=SECRET) as url, httpx.AsyncClient() as client:

        async def post(content: bytes, headers: dict[str, str]) -> int:
            answer = await client.post(url, content=content, headers=headers)
            if answer.status_code != 204:
                assert answer.json()["error"]["message"]
            return answer.status_code

        assert await post(body, sign(make_secret(), body)) == 400
        assert await post(body.replace(b"batch_1", b"batch_2"), sign(SECRET, body)) == 400
        assert await post(body, sign(SECRET, body, at=1_000_000_000)) == 400
        assert await post(body, {}) == 400
        assert await post(b"x" * 70_000, sign(SECRET, b"x")) == 413
        assert (await client.get(url)).status_code == 405
        assert library.sql("select * from autotag.webhooks") == []
        other = b'{"object": "event", "id": "evt_1", "type": "response.completed", "data": {"id": "resp_1"}}'
        assert await post(other, sign(SECRET, other)) == 204
        assert library.sql("select * from autotag.webhooks") == []
        once = sign(SECRET, body, webhook_id="wh_1")
        assert [await post(body, once), await post(body, once)] == [204, 204]
        assert library.sql("select id, openai_batch_id from autotag.webhooks") == [
            {"id": "wh_1", "openai_batch_id": "batch_1"}
        ]


async def test_without_its_secret_it_says_so(library: Library) -> None:
    body = batch_event("completed", "batch_1")
    async with served(library.stack) as url, httpx.AsyncClient() as client:
        answer = await client.post(url, content=body, headers=sign(SECRET, body))
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "no_secret")


@pytest.mark.parametrize(
    "command", [["fmt", "--check"], ["lint"], ["check", "--node-modules-dir=manual", "index.ts"]], ids=lambda c: c[0]
)
def test_deno_finds_nothing(command: list[str]) -> None:
    done = subprocess.run([DENO, *command], cwd=FUNCTION, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
