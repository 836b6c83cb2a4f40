"""A TCP proxy in front of Postgres that breaks connections, at a chosen statement or at any time."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from lab.postgres import free_port

HOST = "127.0.0.1"
CHUNK = 65536  # bytes read at a time


@dataclass(eq=False)
class _Connection:
    """One forwarded connection and what is about to happen to it."""

    reply: asyncio.StreamWriter
    asked: float  # time of the last statement (time.monotonic())
    loses_next: bool = False  # the next statement runs, and its reply is lost
    drops_next: bool = False  # only half of the next reply arrives
    doomed: asyncio.Event = field(default_factory=asyncio.Event)  # a statement whose reply must be lost is running
    reset: asyncio.Event = field(default_factory=asyncio.Event)
    flowing: asyncio.Event = field(default_factory=asyncio.Event)  # cleared while the connection stalls


class Proxy:
    """Forwards connections to Postgres, and breaks some.

    `cut_reply` waits for a statement's text. A message contains the text unless the statement is prepared: psycopg
    prepares it the fifth time, so cut one of the first four. The other breaks affect any connection.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._server = (parts.hostname or HOST, parts.port or 5432)
        self._url = parts
        self.port = free_port()
        self.breaks: Counter[str] = Counter()  # connections broken so far, by how
        self._open: list[_Connection] = []
        self.held = 0  # statements that have been held back
        self._held: bytes | None = None
        self._forwarding = asyncio.Event()  # cleared while statements are held back
        self._pattern: bytes | None = None
        self._remaining = 0

    @property
    def cuts(self) -> int:
        """Replies lost so far."""
        return self.breaks["reply lost"]

    def url(self, url: str | None = None) -> str:
        """The database's URL (or another login's) through this proxy."""
        parts = urlsplit(url) if url else self._url
        login = parts.netloc.rpartition("@")[0]
        return parts._replace(netloc=f"{login}@{HOST}:{self.port}").geturl()

    def cut_reply(self, text: str, times: int = 1) -> None:
        """Lets the next `times` statements whose text contains `text` run, but drops their replies."""
        self._pattern, self._remaining = text.encode(), times

    def hold_back(self, text: str) -> None:
        """Holds back statements whose text contains `text` until `let_through`."""
        self._held = text.encode()
        self._forwarding.clear()

    def let_through(self) -> None:
        """Forwards the statements that were held back."""
        self._held = None
        self._forwarding.set()

    def lose_reply(self, rng: random.Random) -> bool:
        """Lets the next statement of one connection run, but drops its reply; False: no connection is open."""
        if connection := self._pick(rng):
            connection.loses_next = True
        return connection is not None

    def drop_bytes(self, rng: random.Random) -> bool:
        """Forwards half of the next reply of one connection, then nothing; False: no connection is open."""
        if connection := self._pick(rng):
            connection.drops_next = True
        return connection is not None

    def reset(self, rng: random.Random) -> bool:
        """Breaks one connection now; False: none is open."""
        if connection := self._pick(rng):
            self.breaks["reset"] += 1
            connection.reset.set()
        return connection is not None

    async def stall(self, rng: random.Random, seconds: float) -> bool:
        """Forwards nothing on one connection for a time, and then breaks it; False: none is open."""
        if connection := self._pick(rng):
            connection.flowing.clear()
            await asyncio.sleep(seconds)
            self.breaks["stall"] += 1
            connection.reset.set()
        return connection is not None

    def _pick(self, rng: random.Random) -> _Connection | None:
        """One of the two connections that were used last, because others may only wait for notifications."""
        sound = [c for c in self._open if c.flowing.is_set() and not (c.loses_next or c.drops_next or c.reset.is_set())]
        return rng.choice(sorted(sound, key=lambda c: c.asked)[-2:]) if sound else None

    async def _forward(self, client: asyncio.StreamReader, reply: asyncio.StreamWriter) -> None:
        try:
            server, request = await asyncio.open_connection(*self._server)
        except OSError:  # the server is restarting
            reply.transport.abort()
            return
        connection = _Connection(reply, time.monotonic())
        connection.flowing.set()
        self._open.append(connection)
        tasks = [
            asyncio.create_task(self._upstream(connection, client, request)),
            asyncio.create_task(self._downstream(connection, server)),
            asyncio.create_task(connection.reset.wait()),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._open.remove(connection)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for writer in (reply, request):
                writer.transport.abort()

    async def _upstream(
        self, connection: _Connection, client: asyncio.StreamReader, request: asyncio.StreamWriter
    ) -> None:
        while data := await client.read(CHUNK):
            connection.asked = time.monotonic()
            await connection.flowing.wait()
            if self._held and self._held in data:
                self.held += 1
                await self._forwarding.wait()
            if self._remaining and self._pattern and self._pattern in data:
                self._remaining -= 1
                connection.doomed.set()
            if connection.loses_next:
                connection.doomed.set()
            request.write(data)
            await request.drain()

    async def _downstream(self, connection: _Connection, server: asyncio.StreamReader) -> None:
        while data := await server.read(CHUNK):
            await connection.flowing.wait()
            if connection.doomed.is_set():
                self.breaks["reply lost"] += 1
                return  # the server has answered, so the statement has been committed
            if connection.drops_next:
                self.breaks["bytes dropped"] += 1
                connection.reply.write(data[: len(data) // 2])
                await connection.reply.drain()
                return
            connection.reply.write(data)
            await connection.reply.drain()

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[Proxy]:
        """Listens until the context ends."""
        async with await asyncio.start_server(self._forward, HOST, self.port):
            yield self
