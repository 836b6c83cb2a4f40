"""Photos over a slow connection that breaks: each arrives once, and Storage and the table always agree."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from chromium import need_chromium, play

from autotag.http.serve import serve
from lab.edge.app import make_edge
from lab.edge.manners import Manners
from lab.page import address, make_page
from lab.pictures import draw
from lab.postgres import free_port
from lab.proxy import Proxy
from lab.stack import HOST, Stack
from support import Library

SHOTS = os.environ.get("AUTOTAG_SCREENSHOTS")
PHOTOS, TWICE = 40, 3  # chosen, and chosen again while they are uploaded
LARGE_SIZE = 300_000  # bytes: 2.4 s at 1 Mbit/s


class Line:
    """The connection from the browser to an edge of its own, which can break and start again."""

    def __init__(self, stack: Stack) -> None:
        self._stack = stack
        self._port = free_port()
        self._manners = Manners()
        self.proxy = Proxy(f"http://{HOST}:{self._port}")
        self.url = f"http://{HOST}:{self.proxy.port}"
        self._edge = contextlib.AsyncExitStack()

    async def start(self) -> None:
        stack = self._stack
        assert stack.files
        edge = make_edge(
            stack.database_url("authenticator"), stack.owner_url, stack.jwt_secret, stack.files, self._manners
        )
        await self._edge.enter_async_context(serve(edge, HOST, self._port))

    async def stop(self) -> None:
        await self._edge.aclose()

    def cut(self) -> int:
        """Breaks every connection, and returns their number."""
        return sum(1 for _ in iter(lambda: self.proxy.reset(random.Random(1)), False))


@pytest.fixture
async def line(library: Library) -> AsyncIterator[Line]:
    need_chromium()
    made = Line(library.stack)
    await made.start()
    async with made.proxy.serve():
        yield made
        await made.stop()


def photos(folder: Path) -> list[Path]:
    """Small photos, and a few that take seconds, because they have more bytes after the end of the JPEG."""
    paths = []
    large = {5, 18, 19}
    for number, drawing in enumerate(draw(PHOTOS, shrink=4)):
        path = folder / f"{'large' if number in large else 'photo'} {number:02}{Path(drawing.name).suffix}"
        path.write_bytes(drawing.data + random.Random(number).randbytes(LARGE_SIZE) * (number in large))
        paths.append(path)
    return paths


def lose_object(stack: Stack, photo: Path) -> None:
    """Storage gets all bytes of an upload, but does not make them an object."""
    assert stack.files
    name = hashlib.sha256(photo.read_bytes()).hexdigest()[:32]
    begun = [info for info in stack.files.glob("*.info") if name in info.read_text()]
    assert begun
    for info in begun:
        whole = info.with_suffix(".whole")
        whole.write_bytes(photo.read_bytes())
        whole.replace(info.with_suffix(""))  # the edge may still append to the old one what the closed window has sent


def book(library: Library) -> dict[str, int]:
    """The numbers of objects in Storage, of rows in the table, and of those that only one of them has."""
    [counts] = library.sql("""
        select count(o.id) as objects, count(a.id) as rows, count(*) filter (where o.id is null or a.id is null) as orphans,
          count(distinct o.metadata ->> 'eTag') as photos, count(a.tagging_stage) as enqueued
        from storage.objects o full join public.assets a on a.storage_bucket = o.bucket_id and a.storage_path = o.name""")
    return counts


@dataclass
class Breaking:
    """Handles the requests of the scenario."""

    library: Library
    line: Line
    photo: Path  # whose upload Storage fails to end

    async def answer(self, asked: dict[str, Any]) -> Any:
        match asked:
            case {"do": "cut"}:
                assert self.line.cut()
            case {"do": "restart"}:
                await self.line.stop()
                await self.line.start()
            case {"do": "lose_object"}:
                lose_object(self.library.stack, self.photo)
            case {"do": "lose", "reply": reply}:
                self.line.proxy.cut_reply(reply)
            case {"do": "book"}:
                return book(self.library)
        return None


@pytest.mark.long
async def test_forty_photos_over_a_bad_connection(library: Library, line: Line, tmp_path: Path) -> None:
    library.sql("update storage.buckets set file_size_limit = 400000 where id = 'assets'")
    files, refused = photos(tmp_path), tmp_path / "too large.jpg"
    refused.write_bytes(b"\xff\xd8" + bytes(400_000))
    port = free_port()
    async with serve(make_page(replace(library.stack, supabase_url=line.url)), HOST, port):
        given = {
            "mine": address(f"http://{HOST}:{port}", library.member), "files": [str(path) for path in files],
            "large": [number for number, path in enumerate(files) if path.name.startswith("large")], "refused": str(refused),
            "twice": TWICE, "shots": SHOTS,
        }  # fmt: skip
        seen = await play(
            "uploads.mjs", "photos", given, answer=Breaking(library, line, files[max(given["large"])]).answer
        )
    assert seen["looks"] == []
    assert line.proxy.breaks["reset"] > 0
    assert line.proxy.cuts == 3, "two replies to the end of an upload, and one to enqueue_tagging, were lost"
    closed = seen["closed"]
    assert 12 <= closed["objects"] < PHOTOS, "the window was closed in the middle"
    assert closed["orphans"] == 0
    assert closed["enqueued"] in (0, TWICE), "only the second selection of the double click can have been complete"
    assert seen["untagged"] == f"{closed['objects'] - closed['enqueued']} images are not tagged.", closed
    assert any(seen["resumed"]), "it goes on where it stopped"
    assert any(seen["resumedAfterReload"]), "also after a reload"
    assert seen["left"] == ["too large.jpg The file is larger than this project allows."]
    assert book(library) == {"objects": PHOTOS, "rows": PHOTOS, "orphans": 0, "photos": PHOTOS, "enqueued": PHOTOS}
    assert library.sql("select count(*)::int as n from autotag.tasks") == [{"n": PHOTOS}]
