"""Serves a web application inside a process that handles signals and logs itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.applications import Starlette

from autotag.http.guard import KEEP_ALIVE_SECONDS, MAX_HEADER_BYTES, GuardedApp, GuardedProtocol

BACKLOG = 1024  # max connections that wait to be accepted
# connections that are accepted before any is read; far below MAX_CONNECTIONS, so that they do not close each other
ACCEPT_AT_ONCE = 16


class _Server(uvicorn.Server):
    """A server that leaves signals to its process, and stops at once (uvicorn looks ten times a second whether to)."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.stopping = asyncio.Event()

    async def main_loop(self) -> None:
        while not await self.on_tick(0):  # the date for the responses' headers, which changes every second
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await self.stopping.wait()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.asynccontextmanager
async def serve(app: Starlette, host: str, port: int, *, guarded: bool = False) -> AsyncIterator[None]:
    """Serves an application for as long as the context is open.

    Args:
        app: the application.
        host: name or address; without brackets.
        port: its number.
        guarded: apply the limits and deadlines of `autotag.http.guard`; required where untrusted clients connect.

    Raises:
        OSError: the port cannot be opened.
        RuntimeError: the application did not start.
    """
    listening = _listen(host, port)
    # asyncio sets TCP_NODELAY only for sockets made with an explicit protocol; accepted sockets inherit it. Without it,
    # one response in ten waits 40 ms for the peer's delayed acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = _Server(_configure(app, guarded))
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        while not server.started:
            if task.done():
                task.result()
                raise RuntimeError(f"The application for port {port} ended before it started.")
            await asyncio.sleep(0.01)
        listening.listen(BACKLOG)  # uvicorn sets it to ACCEPT_AT_ONCE
        yield
    finally:
        server.should_exit = True
        server.stopping.set()
        await asyncio.gather(task, return_exceptions=True)
        listening.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise OSError(error.errno, f"cannot serve on {host}:{port}: {reason}") from None


def _configure(app: Starlette, guarded: bool) -> uvicorn.Config:
    if not guarded:
        return uvicorn.Config(app, log_config=None, lifespan="on", timeout_graceful_shutdown=1)
    return uvicorn.Config(
        GuardedApp(app), http=GuardedProtocol, ws="none", log_config=None, access_log=False, lifespan="on",
        backlog=ACCEPT_AT_ONCE, h11_max_incomplete_event_size=MAX_HEADER_BYTES, timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=1,
    )  # fmt: skip
