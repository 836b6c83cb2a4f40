"""Resumable uploads: the edge answers as Storage does (`@tus/server`), and the real tus-js-client understands it."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from support import PATIENCE, Library

ENDPOINT = "/storage/v1/upload/resumable"


class Client:
    """Sends what a TUS client sends, as the library's member."""

    def __init__(self, library: Library, http: httpx.AsyncClient) -> None:
        self.http = http
        self.library = library

    async def create(self, size: int, name: str, bucket: str = "assets", **headers: str) -> httpx.Response:
        fields = {"bucketName": bucket, "objectName": name, "contentType": "image/png", "cacheControl": "60"}
        pairs = ",".join(f"{key} {base64.b64encode(value.encode()).decode()}" for key, value in fields.items())
        return await self.send("POST", ENDPOINT, **{"upload-length": str(size), "upload-metadata": pairs, **headers})

    async def patch(self, url: str, offset: int, body: Any, **headers: str) -> httpx.Response:
        kind = {"content-type": "application/offset+octet-stream"}
        return await self.send("PATCH", url, body, **{"upload-offset": str(offset), **kind, **headers})

    async def offset(self, url: str) -> int:
        return int((await self.send("HEAD", url)).headers["upload-offset"])

    async def send(self, method: str, url: str, body: Any = None, **headers: str) -> httpx.Response:
        token = f"Bearer {self.library.member.token}"
        sent = {
            "tus-resumable": "1.0.0",
            "authorization": token,
            **{k.replace("_", "-"): v for k, v in headers.items()},
        }
        return await self.http.request(method, url, headers={k: v for k, v in sent.items() if v}, content=body)

    def book(self) -> tuple[int, int]:
        """The number of objects in Storage, and of rows in the table."""
        [found] = self.library.sql(
            "select (select count(*) from storage.objects) as o, (select count(*) from assets) as a"
        )
        return found["o"], found["a"]


@pytest.fixture
async def client(library: Library) -> AsyncIterator[Client]:
    async with httpx.AsyncClient(base_url=library.stack.supabase_url, timeout=PATIENCE) as http:
        yield Client(library, http)


async def test_the_real_client_uploads_resumes_and_gives_up(library: Library) -> None:
    given = {"endpoint": library.stack.supabase_url + ENDPOINT, "token": library.member.token, "bucket": "assets",
             "folder": library.member.workspace}  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        "node", str(Path(__file__).with_name("resumable.mjs")), json.dumps(given),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, error = await process.communicate()
    assert process.returncode == 0, error.decode()[-2000:]
    told = json.loads(out)
    assert told["seen"] == {
        "plain": [["POST", 201, None], ["PATCH", 204, "4000"], ["PATCH", 204, "8000"], ["PATCH", 204, "10000"]],
        "at-once": [["POST", 201, "3000"]],
        "resumed": [
            ["POST", 201, None], ["PATCH", 204, "4000"],
            ["HEAD", 200, "4000"], ["PATCH", 204, "8000"], ["PATCH", 204, "10000"], ["POST", 409, None],
        ],
        "dropped": [["POST", 201, None], ["PATCH", 204, "4000"], ["DELETE", 204, None], ["HEAD", 404, None]],
    }  # fmt: skip
    assert (told["again"], told["gone"]) == ("The resource already exists", True)
    rows = library.sql("select o.name, o.metadata, o.owner_id, o.version from storage.objects o order by o.name")
    assert [row["name"].rpartition("/")[2] for row in rows] == ["at-once", "plain", "resumed"]
    for row in rows:
        name, size = row["name"].rpartition("/")[2], row["metadata"]["size"]
        assert library.stack.files
        assert (library.stack.files / row["version"]).read_bytes() == (name.encode() * size)[:size]
        assert row["metadata"]["cacheControl"] == "max-age=60"
        assert row["owner_id"] == library.member.user
    assert [row["storage_path"] for row in library.sql("select storage_path from assets order by 1")] == [
        row["name"] for row in rows
    ], "a file that a member uploads has its row"


async def test_what_it_refuses(library: Library, client: Client) -> None:
    """Refusals have the status and the words of the real server."""
    library.sql("insert into storage.buckets (id, name, file_size_limit) values ('small', 'small', 10)")
    library.sql("update storage.buckets set allowed_mime_types = '{image/jpeg}' where id = 'assets'")
    mine, bare = f"{library.member.workspace}/a.png", {"upload_metadata": ""}
    for answer, status, said in [
        (await client.create(5, mine, tus_resumable=""), 412, "Tus-Resumable Required\n"),
        (await client.create(5, mine, tus_resumable="0.2"), 400, "Invalid tus-resumable\n"),
        (await client.create(5, mine, **bare), 400, "Metadata header is required"),
        (await client.create(5, mine, "nowhere"), 404, "Bucket not found"),
        (await client.create(11, mine, "small"), 413, "Maximum size exceeded\n"),
        (await client.create(5, "../a.png"), 400, "Invalid key: ../a.png"),
        (await client.create(5, "elsewhere/a.png"), 403, "new row violates row-level security policy"),
        (await client.create(5, mine), 415, "mime type image/png is not supported"),
        (await client.create(5, mine, upload_length="x"), 400, "Invalid upload-length\n"),
        (await client.send("HEAD", f"{ENDPOINT}/bm90aGluZw"), 400, ""),
    ]:
        assert (answer.status_code, answer.text) == (status, said)
    asked = await client.http.options(ENDPOINT)
    assert (asked.status_code, asked.headers["tus-version"]) == (204, "1.0.0")
    assert client.book() == (0, 0)


async def test_offsets_ends_and_expiry(library: Library, client: Client) -> None:
    name = f"{library.member.workspace}/a.png"
    created = await client.create(8, name)
    url, until = created.headers["location"], parsedate_to_datetime(created.headers["upload-expires"])
    assert abs(until.timestamp() - time.time() - 24 * 3600) < PATIENCE
    rival = (await client.create(8, name)).headers["location"]
    for answer, status, said in [
        (await client.patch(url, 4, b"efgh"), 409, "Upload-Offset conflict\n"),
        (await client.patch(url, 0, b"123456789"), 413, "upload's size exceeded\n"),
        (await client.patch(url, 0, b"x", content_type="text/plain"), 400, "Invalid content-type\n"),
        (await client.send("PATCH", url, b"x", upload_offset="0"), 403, "Content-Type header required\n"),
        (await client.patch(url, 0, b"x", authorization=f"Bearer {library.stack.anon_key}"), 403,
         "new row violates row-level security policy"),
        (await client.patch(url, 0, b"abcd"), 204, ""),
    ]:  # fmt: skip
        assert (answer.status_code, answer.text) == (status, said)
    assert (await client.offset(url), client.book()) == (4, (0, 0)), "what has not arrived completely is no object"
    done = await client.patch(url, 4, b"efgh")
    assert (done.status_code, done.headers["upload-offset"], done.headers["tus-complete"]) == (204, "8", "1")
    assert (await client.offset(url), client.book()) == (8, (1, 1))
    assert (await client.patch(rival, 0, b"12345678")).text == "The resource already exists"
    assert (await client.patch(rival, 0, b"12345678", x_upsert="true")).status_code == 403, "members may not replace"

    other = (await client.create(8, f"{library.member.workspace}/b.png")).headers["location"]
    assert library.stack.files
    for info in library.stack.files.glob("*.info"):
        info.write_text(json.dumps(json.loads(info.read_text()) | {"created": time.time() - 24 * 3600 - 1}))
    assert (await client.send("HEAD", other)).status_code == 410
    assert (await client.patch(other, 0, b"12345678")).text == "The file for this url no longer exists\n"


async def test_a_dead_connection_does_not_keep_an_upload(library: Library, client: Client) -> None:
    """A phone changes networks: the client continues on a new connection while the server still waits for bytes on the
    old one."""
    url = (await client.create(8, f"{library.member.workspace}/a.png")).headers["location"]
    silent = asyncio.Event()

    async def half() -> AsyncIterator[bytes]:
        yield b"abcd"
        await silent.wait()

    sending = asyncio.create_task(client.patch(url, 0, half()))
    assert library.stack.files
    [info] = library.stack.files.glob("*.info")
    async with asyncio.timeout(PATIENCE):
        while info.with_suffix("").stat().st_size < 4:  # noqa: ASYNC110 (the edge writes it)
            await asyncio.sleep(0.01)
        assert await client.offset(url) == 4
        assert (await client.patch(url, 4, b"efgh")).status_code == 204
    silent.set()
    await asyncio.gather(sending, return_exceptions=True)
    assert client.book() == (1, 1)


def test_rows_belong_to_uploads_of_users(library: Library) -> None:
    """A server's upload has no owner and no row, because servers insert their own rows. A file that is replaced keeps
    its row."""
    path = f"{library.member.workspace}/a.png"
    add = "insert into storage.objects (bucket_id, name, owner_id) values (%s, %s, %s)"
    library.sql(add, "assets", f"{library.member.workspace}/server.png", None)
    library.sql("insert into storage.buckets (id, name) values ('other', 'other')")
    library.sql(add, "other", path, library.member.user)
    assert library.sql("select 1 from assets") == []
    for _ in range(2):  # removed and uploaded again
        library.sql(add, "assets", path, library.member.user)
        library.sql("delete from storage.objects where bucket_id = 'assets' and name = %s", path)
    [row] = library.sql("select workspace_id::text, storage_bucket, storage_path, tagging_stage from assets")
    assert row == {"workspace_id": library.member.workspace, "storage_bucket": "assets", "storage_path": path,
                   "tagging_stage": None}  # fmt: skip
