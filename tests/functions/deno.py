"""Edge functions, run by Deno as Supabase does."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

import httpx

from conftest import ROOT
from lab.postgres import free_port
from lab.stack import Stack
from support import PATIENCE

FUNCTIONS = ROOT / "supabase" / "functions"
DENO = ROOT / "node_modules" / ".bin" / "deno"
#: Deno 2.9 asks the registry about each package of a lock file of version 4, the newest that Supabase's Deno reads. test_deno.py
#: compares the lock files with package-lock.json instead.
NO_LOCK = "--no-lock"


async def endless(url: str, headers: dict[str, str], most: int) -> tuple[int, int]:
    """Sends a chunked body for as long as it is read; the answer's status, and the bytes sent until it came.

    Fails when more than ``most`` bytes go out without an answer.
    """
    address = httpx.URL(url)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    lines = [f"POST {address.path} HTTP/1.1", f"host: {address.host}", "transfer-encoding: chunked"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode())
    answer, sent = asyncio.create_task(reader.readline()), 0
    try:
        async with asyncio.timeout(PATIENCE):
            while not answer.done():
                assert sent <= most, f"{sent:,} bytes were taken without an answer"
                writer.write(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
                sent += 0x4000
                with contextlib.suppress(ConnectionError):
                    await writer.drain()
                await asyncio.sleep(0.005)
            return int((await answer).split(b" ")[1]), sent
    finally:
        answer.cancel()
        writer.transport.abort()


@contextlib.asynccontextmanager
async def served(name: str, stack: Stack, **environment: str) -> AsyncIterator[str]:
    """The function's address; npm packages come from node_modules. Nothing comes from a registry (`NO_LOCK`)."""
    folder, port = FUNCTIONS / name, free_port()
    process = await asyncio.create_subprocess_exec(
        str(DENO), "run", "--allow-net", "--allow-env", "--allow-read", "--node-modules-dir=manual", "--no-remote", NO_LOCK,
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
