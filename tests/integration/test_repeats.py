"""Repeated calls: each image is requested once, however often a client calls, unless the client asks for new tags."""

from __future__ import annotations

import asyncio
from typing import Any

import psycopg
import pytest

from sealing import jobs, seal, stages, transaction
from support import Library, asked, check_asked_once, until, worker


def shift(library: Library, by: str) -> None:
    """Makes all uploads older, as if time had passed."""
    library.sql(
        "update autotag.jobs set created_at = created_at - %s::interval, finished_at = finished_at - %s::interval",
        by,
        by,
    )


async def tagged(library: Library, assets: list[str]) -> None:
    await until(lambda: set(stages(library, assets)) == {"completed"}, "the tags")
    await until(lambda: library.sql("select 1 from autotag.jobs where finished_at is null") == [], "the job's end")


# -- automatic mode beside enqueue_tagging


@pytest.mark.parametrize(
    "order", ["call, seal", "call, tags, seal", "seal, call", "seal, tags, call", "seal, tags, wait, call"]
)
async def test_automatic_mode_beside_a_call_asks_each_image_once(sealer: Library, order: str) -> None:
    sealer.stack.configure(upload_quiet="1 h", upload_longest="1 h")
    assets = await sealer.upload(4)
    for step in order.split(", "):
        match step:
            case "call":
                reply = sealer.enqueue(assets)
                first = order.startswith("call")
                assert (reply["image_count"], reply["skipped"]) == ((4, 0) if first else (0, 4))
                assert reply["job_id"], "the reply names the job"
            case "seal":
                sealer.stack.configure(upload_quiet="1 ms", upload_longest="1 ms")
                seal(sealer)
            case "tags":
                async with worker(sealer.stack):
                    await tagged(sealer, assets)
            case "wait":
                shift(sealer, "25 s")
    async with worker(sealer.stack):
        await tagged(sealer, assets)
    assert jobs(sealer) == [4]
    assert sealer.sql("select 1 from autotag.arrivals") == []
    check_asked_once(sealer.stack)
    sealer.check_tags()


async def test_a_call_for_a_part_leaves_the_rest_to_automatic_mode(sealer: Library) -> None:
    assets = await sealer.upload(6)
    sealer.enqueue(assets[:2])
    seal(sealer)
    assert jobs(sealer) == [2, 4]


# -- enqueue_tagging again


async def test_a_second_upload_of_images_that_were_tagged_a_moment_ago(library: Library) -> None:
    assets = await library.upload(4)
    async with worker(library.stack):
        first = library.enqueue(assets)
        await library.finished(first)
        again = library.enqueue(assets)
        assert (again["job_id"], again["image_count"], again["skipped"]) == (first["job_id"], 0, 4)
        assert library.enqueue([*assets[:2], assets[0]])["skipped"] == 2, "a part of them, and one twice"
        more = await library.upload(2, seed=2)
        mixed = library.enqueue([*assets, *more])
        assert (mixed["image_count"], mixed["skipped"]) == (2, 4)
        await library.finished(mixed)
    check_asked_once(library.stack)
    # Those that the second upload skipped belong to the first, whose end is longer ago.
    library.sql("update autotag.jobs set finished_at = finished_at - interval '1 min' where id = %s", first["job_id"])
    assert library.enqueue(assets)["image_count"] == 4


async def test_images_of_an_upload_that_still_runs(library: Library) -> None:
    """An upload still runs, but these images have their tags. The client, whose reply was lost, calls again."""
    assets = await library.upload(2)
    job = library.enqueue(assets)
    async with worker(library.stack):
        await library.finished(job)
    library.sql("update autotag.jobs set finished_at = null, completed = 1, created_at = created_at - interval '1 h'")
    assert library.enqueue(assets)["skipped"] == 2


def change(library: Library, asset: str, how: str) -> None:
    match how:
        case "the window has passed":
            shift(library, "31 s")
        case "another file":
            library.sql("update public.assets set storage_path = storage_path || '.other' where id = %s", asset)
        case "another bucket":
            library.allow_bucket("other")
            library.sql("update public.assets set storage_bucket = 'other' where id = %s", asset)
        case "a URL":
            library.sql(
                "update public.assets set storage_path = null, image_url = 'https://example.com/1.jpg' where id = %s",
                asset,
            )
        case "no window":
            library.stack.configure(repeat_window="0")
        case "it failed":
            library.sql("update public.assets set tagging_stage = 'failed' where id = %s", asset)


@pytest.mark.parametrize(
    "how", ["the window has passed", "another file", "another bucket", "a URL", "no window", "it failed"]
)
async def test_who_wants_new_tags_gets_them(library: Library, how: str) -> None:
    [asset] = await library.upload(1)
    async with worker(library.stack):
        await library.finished(library.enqueue([asset]))
    change(library, asset, how)
    assert library.enqueue([asset])["image_count"] == 1


async def test_a_backfill_tags_again_at_once(library: Library) -> None:
    assets = await library.upload(2)
    async with worker(library.stack):
        await library.finished(library.enqueue(assets))
    [row] = library.sql("select autotag.backfill(%s, false, null, 10) as job", library.member.workspace)
    assert row["job"]["images"] == 2


async def test_another_workspaces_window_is_its_own(library: Library) -> None:
    """An image is tagged and moves to another workspace. An upload there tags it again at once."""
    other = Library(library.stack, library.stack.add_member())
    [asset] = await library.upload(1)
    async with worker(library.stack):
        await library.finished(library.enqueue([asset]))
    library.sql("update public.assets set workspace_id = %s, storage_path = %s where id = %s",
                other.member.workspace, f"{other.member.workspace}/a.jpg", asset)  # fmt: skip
    assert other.enqueue([asset])["image_count"] == 1


async def test_an_image_that_got_its_tags_while_the_call_read_its_row(library: Library) -> None:
    """The call reads the row before the tags are stored."""
    [asset] = await library.upload(1)
    async with worker(library.stack):
        await library.finished(library.enqueue([asset]))
    library.sql("update public.assets set tagging_stage = 'processing' where id = %s", asset)
    assert library.enqueue([asset])["skipped"] == 1


async def test_an_image_that_got_its_tags_while_the_call_waited(library: Library) -> None:
    """The call reads the row before another call enqueues the image."""
    [asset] = await library.upload(1)
    async with worker(library.stack):
        await library.finished(library.enqueue([asset]))
    library.sql("update public.assets set tagging_stage = null where id = %s", asset)
    with transaction(library) as upload:
        upload.execute("select autotag.lock_quotas(%s, null)", (library.member.workspace,))
        call = asyncio.create_task(asyncio.to_thread(library.enqueue, [asset]))
        await until(lambda: library.sql("select 1 from pg_locks where not granted and locktype = 'advisory'") != [],
                    "the call to wait")  # fmt: skip
    assert (await call)["skipped"] == 1


async def test_an_image_that_failed_is_no_repeat_whatever_its_row_shows(library: Library) -> None:
    """An image failed, but its row could not be written. A new call tags it again."""
    failed_job(library)
    library.sql("update public.assets set tagging_stage = 'queued' where true")
    assert library.enqueue(list(library.assets()))["image_count"] == 3


# -- retry_tagging again


def failed_job(library: Library, images: int = 3) -> dict[str, Any]:
    """Makes an upload whose images have all failed."""
    job = library.enqueue(library.insert([f"{n}.jpg" for n in range(images)]))
    library.rpc("public.cancel_tagging", job["job_id"])
    return job


async def test_retry_tagging_called_again_makes_one_job(library: Library) -> None:
    job = failed_job(library)
    first = library.rpc("public.retry_tagging", job["job_id"])
    assert first["image_count"] == 3
    for _ in range(2):
        again = library.rpc("public.retry_tagging", job["job_id"])
        assert (again["job_id"], again["image_count"], again["skipped"]) == (first["job_id"], 0, 3)
    async with worker(library.stack):  # there are no files: all fail again
        await library.finished(first)
    assert library.rpc("public.retry_tagging", job["job_id"])["job_id"] == first["job_id"], "its reply was lost"
    assert jobs(library) == [3, 3]
    shift(library, "31 s")
    later = library.rpc("public.retry_tagging", job["job_id"])
    assert (later["image_count"], jobs(library)) == (3, [3, 3, 3]), "later it is another wish"


async def test_two_calls_of_retry_tagging_at_the_same_time_make_one_job(library: Library) -> None:
    job = failed_job(library)
    with transaction(library) as open_call:
        row = open_call.execute("select to_jsonb(public.retry_tagging(%s)) as job", (job["job_id"],)).fetchone()
        assert row is not None
        calls = [
            asyncio.create_task(asyncio.to_thread(library.rpc, "public.retry_tagging", job["job_id"])) for _ in range(3)
        ]
        await until(lambda: len(library.sql("select 1 from pg_locks where not granted and locktype = 'advisory'")) == 3,
                    "the others to wait")  # fmt: skip
        open_call.commit()
    assert {reply["job_id"] for reply in await asyncio.gather(*calls)} == {row["job"]["job_id"]}
    assert jobs(library) == [3, 3]


async def test_a_retry_that_was_cancelled_can_be_made_again(library: Library) -> None:
    job = failed_job(library)
    library.rpc("public.cancel_tagging", library.rpc("public.retry_tagging", job["job_id"])["job_id"])
    assert library.rpc("public.retry_tagging", job["job_id"])["image_count"] == 3


async def test_a_retry_leaves_out_what_a_later_upload_has_tagged(library: Library) -> None:
    assets = await library.upload(3)
    job = library.enqueue(assets)
    library.rpc("public.cancel_tagging", job["job_id"])
    async with worker(library.stack):
        await library.finished(library.enqueue(assets[:1]))
        shift(library, "1 h")
        await library.finished(library.rpc("public.retry_tagging", job["job_id"]))
        shift(library, "1 h")
        with pytest.raises(psycopg.DatabaseError, match="no failed image"):
            library.rpc("public.retry_tagging", job["job_id"])
    assert len(asked(library.stack)) == 3
    check_asked_once(library.stack)


async def test_a_file_that_was_not_checked_is_not_retried(library: Library) -> None:
    """If an image fails after the check of files and before the retry, the next call retries it."""
    job = failed_job(library)
    [first, *_] = library.sql("select asset_id::text as id from autotag.tasks order by id")
    [row] = library.sql(
        "select autotag.retry(%s, %s::uuid[], %s::uuid[]) as reply", job["job_id"], [first["id"]], [None]
    )
    assert row["reply"]["image_count"] == 1


async def test_what_a_person_typed_survives_every_run_and_what_they_removed_stays_away(library: Library) -> None:
    [asset] = await library.upload(1)
    library.sql("update public.assets set tags = '{aunt mary,wedding 2019}'")
    drawn = library.drawings[asset].tags
    gone = min(drawn)
    async with worker(library.stack):
        for expected in (drawn, drawn - {gone}, drawn - {gone}):
            await library.finished(library.enqueue([asset]))
            row = library.assets()[asset]
            assert row["tags"][:2] == row["tagging_result"]["added"] == ["aunt mary", "wedding 2019"]
            assert set(row["tags"][2:]) == set(row["tagging_result"]["given"]) == expected
            library.sql("update public.assets set tags = array_remove(tags, %s)", gone)
            shift(library, "1 h")
    assert row["tagging_result"]["removed"] == [gone]
