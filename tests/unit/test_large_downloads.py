"""A download stops at the limit: its connection is closed, and the bytes that were read are not in the worker's
heap."""

from __future__ import annotations

import asyncio
import contextlib
import tracemalloc
from collections.abc import AsyncIterator

import pytest

from autotag.errors import TaggingError
from autotag.images.files import Download, Space
from autotag.images.storage import Storage

SIZE = 300_000_000
LIMIT = 8_000_000


class Sender:
    """A server that sends 300 MB to every client."""

    def __init__(self, *, says_length: bool) -> None:
        self.sent = 0
        self.closed = asyncio.Event()
        self._head = f"Content-Length: {SIZE}" if says_length else "Transfer-Encoding: chunked"
        self._piece = b"x" * 100_000 if says_length else b"186a0\r\n" + b"x" * 100_000 + b"\r\n"

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(f"HTTP/1.1 200 OK\r\n{self._head}\r\n\r\n".encode())
        with contextlib.suppress(ConnectionError):
            while self.sent < SIZE:
                writer.write(self._piece)
                self.sent += 100_000
                await writer.drain()
        self.closed.set()
        writer.close()


@contextlib.asynccontextmanager
async def sending(*, says_length: bool) -> AsyncIterator[tuple[Sender, Storage]]:
    sender = Sender(says_length=says_length)
    async with await asyncio.start_server(sender.answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        async with Storage(f"http://127.0.0.1:{port}", "sb_secret_x") as storage:
            yield sender, storage


@pytest.mark.parametrize("says_length", [True, False])
async def test_a_video_of_300_mb_costs_no_more_than_the_limit(says_length: bool) -> None:
    async with sending(says_length=says_length) as (sender, storage), Download(Space(LIMIT), LIMIT) as download:
        tracemalloc.start()
        with pytest.raises(TaggingError) as caught:
            await storage.read("assets", "a.mp4", download)
        heap = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert caught.value.code == "file_too_large"
        async with asyncio.timeout(20):
            await sender.closed.wait()  # closed, not drained
        # what the kernel's buffers took is on its way already
        assert sender.sent < (0 if says_length else LIMIT) + 10_000_000
        assert heap < 3_000_000


async def test_three_videos_at_once_share_the_space() -> None:
    space = Space(LIMIT)
    async with sending(says_length=False) as (_, storage):

        async def read() -> None:
            async with Download(space, LIMIT) as download:
                with pytest.raises(TaggingError, match="8 MB"):
                    await storage.read("assets", "a.mp4", download)

        async with asyncio.timeout(60):
            await asyncio.gather(*(read() for _ in range(3)))
