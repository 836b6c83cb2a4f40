"""Automatic mode with a real client: 300 rows inserted one by one are one upload, and nobody calls anything."""

from __future__ import annotations

import psycopg
import pytest

from support import Library, until, worker


async def test_300_rows_inserted_one_by_one_are_one_batch_parallel_upload(library: Library) -> None:
    stack = library.stack
    stack.configure(upload_quiet="0.7 s", upload_longest="30 s")
    library.sql("select autotag.set_automatic(true)")
    drawn = await library.upload_files(300)
    async with worker(stack):
        with psycopg.connect(stack.database_url(), autocommit=True) as listener:
            listener.execute("listen autotag")
            for path, drawing in drawn:
                [row] = library.sql(
                    "insert into public.assets (workspace_id, storage_path) values (%s, %s) returning id::text",
                    library.member.workspace, path,
                )  # fmt: skip
                library.drawings[row["id"]] = drawing
            notified = [note.payload for note in listener.notifies(timeout=0.1)]
        await until(
            lambda: library.sql("select 1 from autotag.jobs where finished_at is not null") != [], "the job's end"
        )
    jobs = library.sql("select strategy, image_count, completed from autotag.jobs")
    assert jobs == [{"strategy": "batch-parallel", "image_count": 300, "completed": 300}]
    assert notified.count("realtime") <= 3, "one notification begins an upload, not one a row"
    library.check_tags()


async def test_a_signed_in_users_rows_become_their_own_job(library: Library) -> None:
    stack = library.stack
    stack.configure(upload_quiet="0.2 s", upload_longest="5 s")
    library.sql("select autotag.set_automatic(true)")
    drawn = await library.upload_files(3)
    async with worker(stack):
        for path, drawing in drawn:
            with psycopg.connect(stack.database_url("authenticator"), autocommit=True) as connection:
                connection.execute(
                    "select set_config('request.jwt.claims', %s, false), set_config('role', 'authenticated', false)",
                    (f'{{"role": "authenticated", "sub": "{library.member.user}"}}',),
                )
                row = connection.execute(
                    "insert into public.assets (workspace_id, storage_path) values (%s, %s) returning id::text",
                    (library.member.workspace, path),
                ).fetchone()
            assert row is not None
            library.drawings[row[0]] = drawing
        await until(lambda: library.sql("select sum(completed) as n from autotag.jobs")[0]["n"] == 3, "the tags")
    library.check_tags()
    users = {str(row["user_id"]) for row in library.sql("select distinct user_id from autotag.jobs")}
    assert users == {library.member.user}


WORKER = "00000000-0000-4000-8000-000000000001"


def crowd(library: Library, workspaces: int) -> None:
    """The member inserts a row into each of many workspaces of theirs, whose uploads are complete."""
    library.stack.configure(upload_quiet="1 ms", upload_longest="1 ms")
    library.sql("select autotag.set_automatic(true)")
    user = library.member.user
    library.sql("with made as (insert into public.workspaces (name) select 'one of many' from generate_series(1, %s) returning id)"
                " insert into public.workspace_members select id, %s from made", workspaces, user)  # fmt: skip
    with psycopg.connect(library.stack.database_url("authenticator"), autocommit=True) as login:
        login.execute("select set_config('request.jwt.claims', %s, false), set_config('role', 'authenticated', false)",
                      (f'{{"role": "authenticated", "sub": "{user}"}}',))  # fmt: skip
        login.execute("insert into public.assets (workspace_id, storage_path)"
                      " select workspace_id, workspace_id || '/x.jpg' from public.workspace_members where user_id = %s"
                      " and workspace_id <> %s", (user, library.member.workspace))  # fmt: skip


def claims(library: Library, until_asset: str, most: int) -> int:
    """How many claims it takes until an image is released."""
    library.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", WORKER)
    library.stack.prove()
    for number in range(1, most + 1):
        row = library.claim(WORKER, 256)
        if any(image["asset_id"] == until_asset for image in row["images"]):
            return number
        assert row["wait"] == 0, "a claim that releases nothing because of an upload is called again at once"
    raise AssertionError(f"{most} claims did not release the image")


@pytest.mark.parametrize("quota", [0, None], ids=["no quota left", "no quota"])
def test_many_uploads_hold_up_nobodys_single_calls(library: Library, quota: int | None) -> None:
    """A claim that begins an upload releases nothing, but the next one does."""
    victim = Library(library.stack, library.stack.add_member())
    if quota is not None:
        library.sql("insert into autotag.quotas (scope, period, max_images, user_id) values ('user', 'day', %s, %s)",
                    quota, library.member.user)  # fmt: skip
    crowd(library, 40)
    victim.sql("select autotag.set_automatic(false)")
    [asset] = victim.insert(["a.jpg"])
    victim.enqueue_as_server([asset])
    assert claims(library, asset, 40) <= 2


def test_uploads_without_quota_wait_until_it_renews(library: Library) -> None:
    """One look is enough for all workspaces of a user, and new rows do not bring the next look forward."""
    library.sql("insert into autotag.quotas (scope, period, max_images, user_id) values ('user', 'day', 0, %s)",
                library.member.user)  # fmt: skip
    crowd(library, 40)
    library.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", WORKER)
    waits = [library.claim(WORKER, 256)["wait"] for _ in range(3)]
    assert waits[:2] == [0, 0]
    assert waits[2] > 0
    renewed = "select count(*) as n from autotag.uploads where seal_at = (select renews_at from autotag.quotas_left(null, %s))"
    assert library.sql(renewed, library.member.user) == [{"n": 40}]
    library.sql("insert into public.assets (workspace_id, storage_path) select workspace_id, workspace_id || '/y.jpg'"
                " from autotag.uploads")  # fmt: skip
    assert library.sql(renewed, library.member.user) == [{"n": 40}]
    library.sql("update autotag.quotas set max_images = 100")
    assert library.sql(
        "select count(*) as n from autotag.uploads where seal_at <= autotag.now() and user_id is not null"
    ) == [{"n": 40}], "a raised quota is noticed at once"
