"""Edge functions, run by Deno as Supabase does."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

import httpx

from autotag_local.postgres import free_port
from autotag_local.stack import Stack
from conftest import ROOT
from support import PATIENCE

FUNCTIONS = ROOT / "supabase" / "functions"
DENO = ROOT / "node_modules" / ".bin" / "deno"


@contextlib.asynccontextmanager
async def served(name: str, stack: Stack, **environment: str) -> AsyncIterator[str]:
    """The function's address; npm packages come from node_modules, as they are locked."""
    folder, port = FUNCTIONS / name, free_port()
    process = await asyncio.create_subprocess_exec(
        str(DENO), "run", "--allow-net", "--allow-env", "--allow-read", "--node-modules-dir=manual", "--no-remote",
        "--config", str(folder / "deno.json"), str(folder / "index.ts"),
        env={
            "PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/tmp"), "NO_COLOR": "1",
            "DENO_SERVE_ADDRESS": f"tcp:127.0.0.1:{port}", "DENO_NO_UPDATE_CHECK": "1",
            "SUPABASE_URL": stack.supabase_url, "SUPABASE_SERVICE_ROLE_KEY": stack.secret_key,
            "SUPABASE_ANON_KEY": stack.anon_key, **environment,
        },
        stdout=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}/{name}"
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
