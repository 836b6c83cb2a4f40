"""One tenant's files come from Storage as slowly as possible. The other tenants' images are tagged meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from autotag.db import Image
from autotag.errors import TaggingError
from autotag.images import files, storage
from autotag.images.files import Download, Space
from autotag.images.load import FETCHES, Images
from autotag.images.storage import Storage
from lab.image_files import photograph

PHOTO = photograph(2)
HEAD = b"HTTP/1.1 200 OK\r\nConnection: close\r\n"


@contextlib.asynccontextmanager
async def dripping(slow: bytes) -> AsyncIterator[str]:
    """Answers requests whose path contains "slow" with these bytes, and then a byte every tenth of a second, for
    ever."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        path = (await reader.readuntil(b"\r\n\r\n")).split()[1]
        with contextlib.suppress(ConnectionError):
            if b"/slow" in path:
                writer.write(slow)
                while True:
                    writer.write(b"x")
                    await writer.drain()
                    await asyncio.sleep(0.1)
            writer.write(HEAD + b"\r\n" + PHOTO)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


def of(workspace: str, path: str) -> Image:
    return Image(task=1, asset_id="", bucket="assets", path=path, url=None, workspace=workspace)


@pytest.mark.parametrize("length", [b"", b"Content-Length: 24000000\r\n"], ids=["no length", "24 MB"])
@pytest.mark.parametrize("begin", [1, 1_000_000])
async def test_other_tenants_pass_slow_downloads(begin: int, length: bytes) -> None:
    assert len(PHOTO) > 300_000, "more than every download gets"
    async with (
        dripping(HEAD + length + b"\r\n" + bytes(begin)) as url,
        Images(
            supabase_url=url, supabase_key="sb_secret_x", hosts=frozenset(), max_bytes=25_000_000, memory=512_000_000
        ) as images,
    ):
        slow = [asyncio.create_task(images.load(of("a", f"slow{n}"), 512)) for n in range(2 * FETCHES)]
        await asyncio.sleep(0.3)  # as many as can have begun
        async with asyncio.timeout(40):
            for _ in range(3):
                await images.load(of("b", "quick"), 512)
        assert not any(task.done() for task in slow)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)


@pytest.mark.parametrize(
    "answer",
    [HEAD + b"\r\n", b"HTTP/1.1 503 x\r\n\r\n", b"HTTP/1.1 404 x\r\nContent-Length: 9999999\r\n\r\n"],
    ids=["200", "503", "404"],
)
async def test_a_storage_that_drips_holds_no_place_for_ever(answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file, an error and the list of buckets, for which other images wait, all have a time limit."""
    monkeypatch.setattr(files, "MAX_SECONDS", 0.3)
    monkeypatch.setattr(storage, "MAX_SECONDS", 0.3)
    async with (
        dripping(answer) as url,
        Storage(url + "/slow", "sb_secret_x") as source,
        Download(Space(1000), 1000) as download,
        asyncio.timeout(30),
    ):
        for call in (source.read("assets", "a.jpg", download), source.buckets()):
            with pytest.raises(TaggingError) as caught:
                await call
            assert (caught.value.kind, caught.value.code) == ("transient", "storage_error")
