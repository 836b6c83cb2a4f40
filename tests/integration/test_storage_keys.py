"""A wrong key of Storage stops the lanes and fails no image. Only a file that is really missing fails its image."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from structlog.testing import capture_logs

from autotag.errors import TaggingError
from autotag.http.serve import serve
from autotag.images.files import Download, Space
from autotag.images.storage import Storage
from lab.edge import tokens
from lab.pictures import draw
from lab.postgres import free_port
from lab.stack import HOST, Stack
from support import Library, answered_pictures, audit, until, worker

IMAGES = 12
PROBES = 3  # after the lane has stopped

WRONG_KEYS: dict[str, Callable[[Stack], str]] = {
    "wrong signature": lambda stack: tokens.sign("the secret that was rotated away", "service_role"),
    "expired": lambda stack: tokens.sign(stack.jwt_secret, "service_role", lifetime=-60),
    "garbage": lambda stack: "garbage",
    "unknown secret key": lambda stack: "sb_secret_of_another_project",
    "anon": lambda stack: stack.anon_key,
    "publishable": lambda stack: "sb_publishable_of_this_project",
    "a user's": lambda stack: stack.token("00000000-0000-4000-8000-000000000001"),
}


def account_error(library: Library) -> str | None:
    error: str | None = library.sql("select account_error from autotag.provider_limits")[0]["account_error"]
    return error


def error_codes(library: Library) -> set[str]:
    return {row["code"] for row in library.sql("select error_code as code from autotag.tasks where error is not null")}


@pytest.fixture
def probing(library: Library) -> Library:
    """A library whose stopped lanes try again five times a second."""
    library.stack.configure(account_probe_interval="0.2 s")
    return library


@pytest.mark.parametrize("kind", WRONG_KEYS)
async def test_a_wrong_key_fails_no_image(probing: Library, kind: str) -> None:
    stack, library = probing.stack, probing
    library.watch_failures()
    told = library.enqueue(await library.upload(IMAGES))

    with capture_logs() as logs:
        async with worker(stack, supabase_secret_key=WRONG_KEYS[kind](stack)):
            await until(lambda: account_error(library) is not None, "the lane to stop")
            refused = sum(entry["event"] == "image_not_tagged" for entry in logs)
            await until(
                lambda: sum(entry["event"] == "image_not_tagged" for entry in logs) >= refused + PROBES, "some probes"
            )
            error = account_error(library) or ""
            [limits] = library.sql("select account_error_from as origin from autotag.provider_limits")
    assert error.startswith("Storage refused the key: ")
    assert limits["origin"] == "storage", "nobody is told that the AI provider refuses the account"
    assert "SUPABASE_SECRET_KEY" in error
    assert {entry["code"] for entry in logs if entry["event"] == "image_not_tagged"} == {"storage_refused"}
    assert library.sql("select count(*) as n from autotag.tasks where finished_at is null")[0]["n"] == IMAGES
    assert library.job(told["job_id"])["failed"] == 0
    assert library.failures() == 0
    assert answered_pictures(stack) == []

    async with worker(stack):
        [job] = await library.finished(told)
    assert (job["completed"], job["failed"]) == (IMAGES, 0)
    assert account_error(library) is None
    library.check_tags()
    audit(stack)


@pytest.mark.parametrize("kind", ["wrong signature", "anon"])
async def test_a_wrong_key_fails_no_image_of_a_batch(probing: Library, kind: str) -> None:
    stack, library = probing.stack, probing
    stack.configure(realtime_max_images=0, chunk_max_images=4, express_images=0)
    told = library.enqueue(await library.upload(IMAGES))
    with capture_logs() as logs:
        async with worker(stack, supabase_secret_key=WRONG_KEYS[kind](stack)):
            await until(lambda: sum(entry["event"] == "batch_step_failed" for entry in logs) >= 2, "two tries")
    assert "SUPABASE_SECRET_KEY" in (account_error(library) or "")
    assert library.job(told["job_id"])["failed"] == 0
    async with worker(stack):
        [job] = await library.finished(told)
    assert (job["completed"], job["failed"]) == (IMAGES, 0)
    library.check_tags()


async def test_a_key_that_expires_in_use_is_told_apart_at_once(library: Library) -> None:
    """The key was valid a moment ago. Still, a file must not count as missing because the key has expired."""
    stack = library.stack
    workspace = library.member.workspace
    [(path, drawing)] = await library.upload_files(1)
    expires = time.time() + 3
    key = tokens.sign(stack.jwt_secret, "service_role", exp=int(expires))
    async with Storage(stack.supabase_url, key) as storage, Download(Space(10**6), 10**6) as download:
        assert os.pread((await storage.read("assets", path, download)).descriptor, 10**6, 0) == drawing.data
        with pytest.raises(TaggingError) as caught:
            await storage.read("assets", f"{workspace}/never-uploaded.jpg", download)
        assert caught.value.code == "file_missing"
        await until(lambda: time.time() > expires, "the key to expire")
        with pytest.raises(TaggingError) as caught:
            await storage.read("assets", path, download)
    assert (caught.value.kind, caught.value.code) == ("account", "storage_refused")
    assert '"exp" claim timestamp check failed' in caught.value.message


async def test_what_is_missing_fails_alone_and_the_operator_is_told_of_buckets_once(library: Library) -> None:
    workspace = library.member.workspace
    tagged = await library.upload(3)
    missing = library.insert([f"{workspace}/never-uploaded.jpg"])
    elsewhere = library.insert([f"{workspace}/{number}.jpg" for number in range(3)])
    library.allow_bucket("nonsense")
    library.sql("update public.assets set storage_bucket = 'nonsense' where id = any (%s::uuid[])", elsewhere)
    with capture_logs() as logs:
        async with worker(library.stack):
            [job] = await library.finished(library.enqueue_as_server(tagged + missing + elsewhere))
    assert (job["completed"], job["failed"]) == (3, 4)
    assert account_error(library) is None
    assert error_codes(library) == {"file_missing"}
    rows = library.assets()
    assert rows[missing[0]]["tagging_error"] == "The image's file is not in storage."
    assert {rows[asset]["tagging_error"] for asset in elsewhere} == {
        "The image's bucket “nonsense” does not exist in storage."
    }
    assert [entry["bucket"] for entry in logs if entry["event"] == "bucket_not_found"] == ["nonsense"]
    library.check_tags(tagged)


async def test_a_storage_that_is_busy_is_asked_again(library: Library) -> None:
    [drawing] = draw(1)
    busy = 2

    async def answer(request: Request) -> Response:
        nonlocal busy
        if busy:
            busy -= 1
            return JSONResponse({"message": "<html>"}, 503, {"retry-after": "1"})
        return Response(drawing.data, media_type=drawing.content_type)

    [asset] = library.insert([f"{library.member.workspace}/a.jpg"])
    library.drawings[asset] = drawing
    port = free_port()
    with capture_logs() as logs:
        async with (
            serve(Starlette(routes=[Route("/{path:path}", answer)]), HOST, port),
            worker(library.stack, supabase_url=f"http://{HOST}:{port}"),
        ):
            [job] = await library.finished(library.enqueue_as_server([asset]))
    assert (job["completed"], job["failed"]) == (1, 0)
    told = [(e["kind"], e["code"], e["message"]) for e in logs if e["event"] == "image_not_tagged"]
    assert told == [("transient", "storage_error", "Storage answered with an error (503).")] * 2
    library.check_tags()
