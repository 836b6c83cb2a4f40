"""A TCP proxy in front of Postgres that breaks connections at a chosen statement, as a bad network does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from lab.postgres import free_port

HOST = "127.0.0.1"
CHUNK = 65536  # bytes read at a time


class Proxy:
    """Forwards connections to Postgres; `cut_reply` loses the reply to a statement that has run.

    A message carries the statement's text unless the statement was prepared before: psycopg prepares it the fifth
    time, so cut one of the first four.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._server = (parts.hostname or HOST, parts.port or 5432)
        self._url = parts
        self.port = free_port()
        self.cuts = 0  # replies lost so far
        self._pattern: bytes | None = None
        self._remaining = 0

    def url(self, url: str | None = None) -> str:
        """The database's URL (or another login's) by way of this proxy."""
        parts = urlsplit(url) if url else self._url
        login = parts.netloc.rpartition("@")[0]
        return parts._replace(netloc=f"{login}@{HOST}:{self.port}").geturl()

    def cut_reply(self, text: str, times: int = 1) -> None:
        """The next `times` statements whose text contains `text` run, and their reply never arrives."""
        self._pattern, self._remaining = text.encode(), times

    async def _forward(self, client: asyncio.StreamReader, reply: asyncio.StreamWriter) -> None:
        server, request = await asyncio.open_connection(*self._server)
        doomed = asyncio.Event()

        async def upstream() -> None:
            while data := await client.read(CHUNK):
                if self._remaining and self._pattern and self._pattern in data:
                    self._remaining -= 1
                    doomed.set()
                request.write(data)
                await request.drain()

        async def downstream() -> None:
            while data := await server.read(CHUNK):
                if doomed.is_set():
                    self.cuts += 1
                    return  # the server has answered, so the statement has been committed
                reply.write(data)
                await reply.drain()

        tasks = [asyncio.create_task(upstream()), asyncio.create_task(downstream())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for writer in (reply, request):
                writer.transport.abort()

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[Proxy]:
        """Listens until the context ends."""
        async with await asyncio.start_server(self._forward, HOST, self.port):
            yield self
