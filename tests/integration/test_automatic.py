"""Automatic mode with a real client: 300 rows inserted one by one are one upload, and nobody calls anything."""

from __future__ import annotations

import psycopg

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
