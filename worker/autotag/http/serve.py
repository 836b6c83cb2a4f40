"""Serves a web application inside a process that has signals and logs of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from starlette.applications import Starlette

from autotag.http.guard import KEEP_ALIVE_SECONDS, MAX_HEADER_BYTES, GuardedApp, GuardedProtocol

QUEUE = 1024  # connections that may wait to be accepted
ACCEPT_AT_ONCE = 16  # of them; so many are accepted before any is read, and far fewer than may make each other go


class _Server(uvicorn.Server):
    """A server that leaves signals to the program it runs in."""

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
        guarded: whether the limits and deadlines of `autotag.guard` hold, as they have to where strangers call.

    Raises:
        OSError: the address cannot be had.
        RuntimeError: the application did not start.
    """
    listening = _listen(host, port)
    # asyncio does this only for sockets made with an explicit protocol; accepted ones inherit it. Without it one
    # answer in ten waits 40 ms for the peer's delayed acknowledgement.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = _Server(_configure(app, guarded))
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        while not server.started:
            if task.done():
                task.result()
                raise RuntimeError(f"The application for port {port} ended before it started.")
            await asyncio.sleep(0.01)
        listening.listen(QUEUE)  # the server has set it to ACCEPT_AT_ONCE
        yield
    finally:
        server.should_exit = True
        await asyncio.gather(task, return_exceptions=True)
        listening.close()


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=QUEUE)
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
