"""Errors of reading a file: Storage's answer, or that of a proxy in front of it, shows whose fault it is."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from autotag.errors import TaggingError
from autotag.http.serve import serve
from autotag.images import storage
from autotag.images.files import Download, Space
from autotag.images.render import Renderer
from autotag.images.storage import Storage, key_role
from lab.edge import tokens
from lab.postgres import free_port

SECRET = "sb_secret_abc"
HOST = "127.0.0.1"


def told(status: str, code: str, message: str = "Storage's words") -> Response:
    return JSONResponse({"statusCode": status, "error": code, "message": message, "code": code}, 400)


NO_FILE = told("404", "NoSuchKey", "Object not found")
NO_BUCKET = told("404", "NoSuchBucket", "Bucket not found")
BUCKETS = JSONResponse([{"id": "assets", "name": "assets"}])
NONE = JSONResponse([])
DOWN = HTMLResponse("<html>down</html>", 503, {"retry-after": "7"})


class Server:
    """Answers requests for files and the list of buckets with the planned answers, otherwise with 200."""

    def __init__(self) -> None:
        self.file: Response | None = None
        self.files: dict[str, Response] = {}
        self.buckets: Response = BUCKETS
        self.asked: list[str] = []

    async def answer(self, request: Request) -> Response:
        path = request.scope["raw_path"].decode()
        self.asked.append(path)
        if path == "/storage/v1/bucket":
            await asyncio.sleep(0.05)
            return self.buckets
        if path.startswith("/storage/v1/render/") and self.file:
            return self.file
        assert path.startswith("/storage/v1/object/authenticated/")
        return self.files.get(path.rpartition("/")[2]) or self.file or Response(request.path_params["path"].encode())


@contextlib.asynccontextmanager
async def serving(key: str = SECRET) -> AsyncIterator[tuple[Server, Storage]]:
    server, port = Server(), free_port()
    app = Starlette(routes=[Route("/{path:path}", server.answer)])
    async with serve(app, HOST, port), Storage(f"http://{HOST}:{port}", key) as source:
        yield server, source


async def read(source: Storage, bucket: str, path: str, max_bytes: int = 1000) -> bytes:
    async with Download(Space(max_bytes), max_bytes) as download:
        file = await source.read(bucket, path, download)
        return os.pread(file.descriptor, file.size, 0)


async def trouble(source: Storage, bucket: str = "assets", path: str = "a.jpg") -> TaggingError:
    with pytest.raises(TaggingError) as caught:
        await read(source, bucket, path)
    assert "<" not in caught.value.message
    return caught.value


CUSTOM = tokens.sign("s" * 32, "reader")  # the role of somebody's own


@pytest.mark.parametrize(
    ("key", "file", "buckets", "kind", "code"),
    [
        (SECRET, NO_FILE, BUCKETS, "image", "file_missing"),
        (SECRET, NO_BUCKET, JSONResponse([{"id": "other"}]), "image", "file_missing"),
        (SECRET, NO_BUCKET, BUCKETS, "transient", "storage_error"),  # they contradict each other
        (SECRET, told("403", "AccessDenied"), BUCKETS, "account", "storage_refused"),
        (SECRET, JSONResponse({"message": "Invalid API key"}, 401), BUCKETS, "account", "storage_refused"),
        (SECRET, NO_FILE, JSONResponse({"message": "Invalid API key"}, 401), "account", "storage_refused"),
        (SECRET, NO_FILE, told("403", "AccessDenied"), "account", "storage_refused"),
        (SECRET, NO_FILE, DOWN, "transient", "storage_error"),
        (SECRET, NO_FILE, HTMLResponse("<html>", 404), "account", "no_storage"),
        (SECRET, NO_FILE, HTMLResponse("<html>"), "account", "no_storage"),
        (SECRET, NO_FILE, NONE, "account", "storage_no_bucket"),
        (SECRET, HTMLResponse("<html>", 404), BUCKETS, "transient", "storage_error"),
        (SECRET, HTMLResponse("<html>", 403), BUCKETS, "transient", "storage_error"),  # a firewall, of this path alone
        (SECRET, DOWN, BUCKETS, "transient", "storage_error"),
        (SECRET, told("429", "SlowDown"), BUCKETS, "transient", "storage_error"),
        (SECRET, told("544", "DatabaseTimeout"), BUCKETS, "transient", "storage_error"),
        ("sb_publishable_abc", NO_FILE, BUCKETS, "account", "storage_refused"),
        (tokens.sign("s" * 32, "anon"), NO_FILE, BUCKETS, "account", "storage_refused"),
        (tokens.sign("s" * 32, "service_role"), NO_FILE, BUCKETS, "image", "file_missing"),
        (CUSTOM, NO_FILE, BUCKETS, "image", "file_missing"),
        (CUSTOM, NO_FILE, NONE, "account", "storage_refused"),
        ("garbage", NO_FILE, NONE, "account", "storage_refused"),
    ],
)
async def test_whose_fault_it_is(key: str, file: Response, buckets: Response, kind: str, code: str) -> None:
    async with serving(key) as (server, source):
        server.file, server.buckets = file, buckets
        error = await trouble(source)
    assert (error.kind, error.code) == (kind, code), error.message
    if code == "storage_refused":
        assert "SUPABASE_SECRET_KEY" in error.message
    assert key not in error.message


DEEP = b"[" * 100_000 + b"]" * 100_000


def unreadable(status: int, how: str) -> Response:
    """An answer whose body cannot be read: in an encoding that was not requested, or nested too deep."""
    headers = {"content-encoding": how, "retry-after": "7"} if how != "deep" else {"retry-after": "7"}
    return Response(DEEP if how == "deep" else b"<html>bad gateway</html>", status, headers)


@pytest.mark.parametrize("how", ["br", "zstd", "gzip", "deflate", "gzip, br", "nonsense", "deep"])
@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (401, "account", "storage_refused"), (403, "transient", "storage_error"), (404, "transient", "storage_error"),
        (429, "transient", "storage_error"), (500, "transient", "storage_error"), (503, "transient", "storage_error"),
    ],
)  # fmt: skip
async def test_an_error_that_cannot_be_read_counts_by_its_status(status: int, kind: str, code: str, how: str) -> None:
    async with serving() as (server, source):
        server.file = unreadable(status, how)
        error = await trouble(source)
        assert (error.kind, error.code) == (kind, code)
        assert error.retry_after == (7 if kind == "transient" else None)
        server.file, server.buckets = NO_FILE, server.file
        source._buckets_valid_until = 0
        error = await trouble(source)
        assert error.kind in ("account", "transient"), "it says nothing about the file"
        server.buckets = unreadable(200, how)
        source._buckets_valid_until = 0
        assert (await trouble(source)).code == "no_storage"


@pytest.mark.parametrize("how", ["br", "gzip", "deep"])
async def test_a_transformation_that_fails_unreadably_fails_no_image_and_is_not_asked_for_again(how: str) -> None:
    async with serving() as (server, source), Download(Space(1000), 1000) as download:
        server.file, renderer = unreadable(500, how), Renderer(source)
        for name in "abc":
            assert await renderer.read("assets", name, 512, download) is None
        assert len(server.asked) == 1


async def test_a_key_of_an_unknown_kind_works_while_it_reads_what_it_read() -> None:
    async with serving(CUSTOM) as (server, source):
        server.files["missing.jpg"] = NO_FILE
        server.buckets = NONE
        await read(source, "assets", "there.jpg")
        assert (await trouble(source, path="missing.jpg")).kind == "image"
        server.file, source._buckets_valid_until = NO_FILE, 0
        assert (await trouble(source, path="missing.jpg")).kind == "account"


async def test_a_thousand_missing_files_share_one_look_at_the_key() -> None:
    async with serving() as (server, source):
        server.file = NO_FILE
        errors = await asyncio.gather(*(trouble(source, path=f"{number}.jpg") for number in range(1000)))
        assert {error.code for error in errors} == {"file_missing"}
        assert server.asked.count("/storage/v1/bucket") == 1


async def test_a_look_is_repeated_after_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "KEY_CHECK_VALID", 0.0)
    async with serving() as (server, source):
        server.file = NO_FILE
        assert (await trouble(source)).kind == "image"
        server.buckets = told("403", "AccessDenied")
        assert (await trouble(source)).kind == "account"
        assert server.asked.count("/storage/v1/bucket") == 2


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("0.5", 0.5), ("86400", 120.0), ("0", None), ("-1", None), ("nan", None), ("soon", None),
     ("Wed, 21 Oct 2026 07:28:00 GMT", None), ("", None)],
)  # fmt: skip
async def test_storage_says_when_to_come_back(header: str, seconds: float | None) -> None:
    async with serving() as (server, source):
        server.file = JSONResponse({}, 503, {"retry-after": header} if header else {})
        assert (await trouble(source)).retry_after == seconds
        server.file, server.buckets = NO_FILE, server.file
        assert (await trouble(source)).retry_after == seconds


async def test_a_storage_that_is_not_there_is_of_the_moment() -> None:
    async with Storage(f"http://{HOST}:{free_port()}", SECRET) as source:
        error = await trouble(source)
    assert (error.kind, error.message) == ("transient", "Storage cannot be reached.")


@pytest.mark.parametrize("path", ["a b.jpg", "a+b.jpg", "a?b#c.jpg", "100%.jpg", "%2e%2e/x", "ü/é.jpg", "a&b=c;d,e:f@g",
                                  "(1)!*'.jpg"])  # fmt: skip
async def test_any_name_arrives_as_it_is(path: str) -> None:
    async with serving() as (_, source):
        assert (await read(source, "b ü", path)).decode() == f"storage/v1/object/authenticated/b ü/{path}"


@pytest.mark.parametrize(("bucket", "path"), [("..", "bucket/a"), (".", "a"), ("", "a"), ("a/../..", "b"), ("b", "a/../c"),
                                              ("b", "/a"), ("b", "a//b"), ("b", "a/")])  # fmt: skip
async def test_no_name_leads_out_of_its_bucket(bucket: str, path: str) -> None:
    async with serving() as (server, source):
        assert (await trouble(source, bucket, path)).code == "file_missing"
        assert server.asked == []


async def test_a_url_that_is_too_long_or_none_fails_no_image() -> None:
    async with serving() as (_, source):
        assert (await trouble(source, path="x" * 70_000)).kind == "transient"
    async with Storage("http://[", SECRET) as source:
        assert (await trouble(source)).kind == "transient"


async def test_a_file_is_read_up_to_the_most_that_is_accepted() -> None:
    async with serving() as (server, source):
        server.files = {"fits": Response(b"x" * 1000), "large": Response(b"x" * 1001)}
        assert len(await read(source, "assets", "fits")) == 1000
        assert (await trouble(source, path="large")).code == "file_too_large"


@pytest.mark.parametrize(
    ("key", "role"),
    [
        (f"a.{base64.urlsafe_b64encode(DEEP).decode()}.c", None),
        ("sb_secret_x", "service_role"), ("sb_publishable_x", "anon"), (tokens.sign("s" * 32, "anon"), "anon"),
        (tokens.sign("s" * 32, "service_role"), "service_role"), ("", None), ("garbage", None), ("a.b.c", None),
        ("a.W10.c", None), ("a.bnVsbA.c", None), ("a.e30.c", None), ("a.eyJyb2xlIjoxfQ.c", None), ("ü.ü.ü", None),
    ],
)  # fmt: skip
def test_what_a_key_says_of_itself(key: str, role: Any) -> None:
    assert key_role(key) == role
