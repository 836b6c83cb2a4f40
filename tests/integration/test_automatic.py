"""Automatic mode with a real client: 300 rows that are inserted one by one become one upload without any call."""

from __future__ import annotations

import uuid

import psycopg
import pytest
from psycopg.rows import dict_row

from autotag.db import TooSlow, calls
from sealing import WORKER, due_now, jobs, seal, seal_one, stages, transaction
from support import Library, until, worker

NOBODY = str(uuid.UUID(int=0))


async def test_300_rows_inserted_one_by_one_are_one_batch_parallel_upload(library: Library) -> None:
    stack = library.stack
    stack.configure(upload_quiet="2 s", upload_longest="2 min")  # pauses of a busy machine
    library.sql("select autotag.set_automatic(true)")
    drawn = await library.upload_files(300)
    async with worker(stack):
        for path, drawing in drawn:
            [row] = library.sql(
                "insert into public.assets (workspace_id, storage_path) values (%s, %s) returning id::text",
                library.member.workspace, path,
            )  # fmt: skip
            library.drawings[row["id"]] = drawing
        await until(
            lambda: library.sql("select 1 from autotag.jobs where finished_at is not null") != [], "the job's end"
        )
    jobs = library.sql("select strategy, image_count, completed from autotag.jobs")
    assert jobs == [{"strategy": "batch-parallel", "image_count": 300, "completed": 300}]
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


# -- who waits for whom


def test_only_the_workers_own_login_seals(sealer: Library) -> None:
    sealer.insert(["a.jpg"])
    [row] = sealer.sql("select * from autotag.seal_uploads(%s)", str(uuid.uuid4()))
    assert (row["sealed"], row["more"]) == (0, False)
    assert jobs(sealer) == []


def test_an_upload_whose_quotas_are_locked_holds_up_no_other(sealer: Library) -> None:
    """The quotas are locked because a client has called enqueue_tagging in a transaction that is still open."""
    other = Library(sealer.stack, sealer.stack.add_member())
    early = sealer.insert(["a.jpg"])
    with transaction(sealer) as host:
        host.execute("select public.enqueue_tagging(%s::uuid[])", (early,))
        sealer.insert(["b.jpg"])
        other.insert(["c.jpg"])
        seal(sealer)
        assert (jobs(sealer), jobs(other)) == ([], [1])
        assert 0 < seal_one(sealer)["wait"] <= 0.25, "it is tried again soon"
    seal(sealer)
    assert jobs(sealer) == [1, 1]


def test_a_held_row_holds_up_no_other_image(sealer: Library) -> None:
    assets = sealer.insert([f"{n}.jpg" for n in range(40)])
    with transaction(sealer) as host:
        host.execute("select from public.assets where id = %s for update", (assets[7],))
        for _ in range(4):
            seal(sealer)
            due_now(sealer)
        assert sum(jobs(sealer)) >= 39
        assert sum(jobs(sealer)) < 40 or stages(sealer, [assets[7]]) == [None]
    seal(sealer)
    assert sum(jobs(sealer)) == 40
    assert sealer.sql("select 1 from autotag.arrivals union all select 1 from autotag.uploads") == []


def test_a_crowd_of_one_users_uploads_holds_up_no_other_user(sealer: Library) -> None:
    """60 earlier uploads of one user do not delay the upload of another user."""
    victim = Library(sealer.stack, sealer.stack.add_member())
    crowd(sealer, 60)
    as_member(victim, "insert into public.assets (workspace_id, storage_path) values (%s, %s)",
              victim.member.workspace, f"{victim.member.workspace}/a.jpg")  # fmt: skip
    for _ in range(3):  # one in 120 calls takes one of the crowd
        seal_one(sealer)
    assert jobs(victim) == [1]


def test_many_users_of_one_workspace_hold_up_no_other_workspace(sealer: Library) -> None:
    victim = Library(sealer.stack, sealer.stack.add_member())
    insert_as_many(sealer, 20)
    victim.insert(["a.jpg"])
    for _ in range(15):  # one in 30,000 runs takes the first workspace each time
        seal_one(sealer)
        if jobs(victim):
            break
    assert jobs(victim) == [1]


def test_a_workspace_in_which_an_upload_has_failed_comes_last(sealer: Library) -> None:
    """Its trigger may be slow, and each of its uploads would keep the others waiting for seconds."""
    victim = Library(sealer.stack, sealer.stack.add_member())
    sealer.sql("insert into autotag.uploads (workspace_id, uploader, seal_at, failures) values (%s, %s, now() + interval '1 h', 1)",
               sealer.member.workspace, str(uuid.uuid4()))  # fmt: skip
    insert_as_many(sealer, 20)
    victim.insert(["a.jpg"])
    seal_one(sealer)
    assert (jobs(sealer), jobs(victim)) == ([], [1])
    seal_one(sealer)
    assert jobs(sealer) == [1], "and then it goes on"


def insert_as_many(library: Library, users: int) -> None:
    """Each of many users inserts a row into the workspace."""
    for number in range(users):
        with psycopg.connect(library.stack.database_url()) as owner:
            claims = f'{{"role": "authenticated", "sub": "{uuid.uuid4()}"}}'
            owner.execute("select set_config('request.jwt.claims', %s, true)", (claims,))
            owner.execute("insert into public.assets (workspace_id, storage_path) values (%s, %s)",
                          (library.member.workspace, f"{library.member.workspace}/{number}.jpg"))  # fmt: skip


def test_many_uploads_hold_up_nobodys_single_calls(sealer: Library) -> None:
    """A claim reads no uploads, so many of them do not slow it down."""
    victim = Library(sealer.stack, sealer.stack.add_member())
    crowd(sealer, 40)
    victim.sql("select autotag.set_automatic(false)")
    [asset] = victim.insert(["a.jpg"])
    victim.enqueue_as_server([asset])
    sealer.stack.prove()
    assert [image["asset_id"] for image in sealer.claim(WORKER, 256)["images"]] == [asset]


def crowd(library: Library, workspaces: int) -> None:
    """Inserts a row as the member into each of many workspaces of theirs."""
    user = library.member.user
    library.sql("with made as (insert into public.workspaces (name) select 'one of many' from generate_series(1, %s) returning id)"
                " insert into public.workspace_members select id, %s from made", workspaces, user)  # fmt: skip
    insert_everywhere(library, "x.jpg")


def insert_everywhere(library: Library, name: str) -> None:
    as_member(library, "insert into public.assets (workspace_id, storage_path) select workspace_id, workspace_id || '/' || %s"
              " from public.workspace_members where user_id = %s and workspace_id <> %s",
              name, library.member.user, library.member.workspace)  # fmt: skip


def as_member(library: Library, statement: str, *arguments: object) -> None:
    with psycopg.connect(library.stack.database_url("authenticator"), autocommit=True) as login:
        login.execute("select set_config('request.jwt.claims', %s, false), set_config('role', 'authenticated', false)",
                      (f'{{"role": "authenticated", "sub": "{library.member.user}"}}',))  # fmt: skip
        login.execute(statement.encode(), arguments)


# -- no room


def test_uploads_without_quota_wait_until_it_renews(sealer: Library) -> None:
    """Once a user's quota is used up, it is looked up once for all workspaces of the user, and new rows do not cause
    another look-up before the quota renews."""
    sealer.sql("insert into autotag.quotas (scope, period, max_images, user_id) values ('user', 'day', 0, %s)",
               sealer.member.user)  # fmt: skip
    crowd(sealer, 40)
    seal(sealer, most=3)
    renewed = "select count(*) as n from autotag.uploads where seal_at = (select renews_at from autotag.quotas_left(null, %s))"
    assert sealer.sql(renewed, sealer.member.user) == [{"n": 40}]
    insert_everywhere(sealer, "y.jpg")
    seal(sealer)
    assert sealer.sql(renewed, sealer.member.user) == [{"n": 40}]
    assert sealer.sql("select count(*) as n from autotag.arrivals where upload_id is null") == [{"n": 0}]
    sealer.sql("update autotag.quotas set max_images = 100")
    seal(sealer)
    assert sealer.sql("select count(*) as n, sum(image_count) as images from autotag.jobs") == [{"n": 40, "images": 80}], (
        "a raised quota is noticed at once, and what was postponed together is one upload")  # fmt: skip


# -- what raises

REFUSE = """
    create function public.refuse() returns trigger language plpgsql as $$
    begin
      if new.storage_path ~ 'odd' and new.tagging_stage = 'queued' then
        raise exception 'no' using errcode = 'P0001';
      end if;
      return new;
    end $$;"""


@pytest.mark.parametrize("state", ["P0001", "PT429", "AT001", "AT002"])
def test_an_image_that_a_deferred_constraint_refuses_fails_by_itself(sealer: Library, state: str) -> None:
    """The constraint is checked at the commit, where an error would undo the whole upload. The error may have a
    SQLSTATE that autotag uses itself."""
    sealer.sql(f"""{REFUSE.replace("P0001", state)}
        create constraint trigger refuse after update on public.assets deferrable initially deferred
        for each row execute function public.refuse()""")
    other = Library(sealer.stack, sealer.stack.add_member())
    assets = sealer.insert([f"{'odd' if n in (3, 17) else n}{n}.jpg" for n in range(30)])
    other.insert(["a.jpg"])
    assert seal(sealer).count("image_not_enqueued") == 2
    assert (jobs(sealer), jobs(other)) == ([28], [1])
    rows = sealer.assets()
    assert {rows[asset]["tagging_stage"] for n, asset in enumerate(assets) if n not in (3, 17)} == {"queued"}
    for number in (3, 17):
        row = rows[assets[number]]
        assert (row["tagging_stage"], row["tagging_error"]) == ("failed", "The database refused to enqueue this image.")
    assert sealer.sql("select 1 from autotag.arrivals union all select 1 from autotag.uploads") == []


@pytest.mark.parametrize("state", ["P0001", "55P03", "40P01"])
def test_an_image_whose_stage_a_trigger_refuses_is_tagged_without_it(sealer: Library, state: str) -> None:
    """If a trigger refuses to show the stage of two rows, their images are tagged in any case, and the other rows show
    the stage. Calls of enqueue_tagging behave in the same way."""
    sealer.sql(
        f"{REFUSE.replace('P0001', state)}"
        "create trigger refuse before update on public.assets for each row execute function public.refuse()"
    )
    assets = sealer.insert([f"{'odd' if n in (3, 17) else n}{n}.jpg" for n in range(30)])
    seal(sealer)
    assert jobs(sealer) == [30]
    assert [n for n, stage in enumerate(stages(sealer, assets)) if stage is None] == [3, 17]


def change_paths(library: Library, expression: str) -> None:
    """Changes the project's adapter so that it computes the path with this expression."""
    [found] = library.sql("select pg_get_functiondef('autotag.describe_assets'::regproc) as code")
    assert "::text as path" in found["code"]
    library.sql(found["code"].replace("::text as path", f"::text || {expression} as path"))


def test_what_is_no_images_fault_waits_longer_each_time(sealer: Library) -> None:
    """A function that the project's adapter calls is missing. No image fails because of that, and no other workspace
    waits."""
    sealer.sql("""
        create function public.broken(path text) returns text language plpgsql stable as $$
        begin
          if path ~ 'broken' then
            return public.is_not_there();
          end if;
          return '';
        end $$""")
    change_paths(sealer, "public.broken(a.storage_path)")
    other = Library(sealer.stack, sealer.stack.add_member())
    assets = sealer.insert(["broken.jpg", "broken too.jpg"])
    tries = []
    for number in range(4):
        other.insert([f"{number}.jpg"])
        assert "upload_postponed" in seal(sealer)
        tries += sealer.sql("select failures, seal_at, seal_at > autotag.now() as waits from autotag.uploads")
        due_now(sealer)
    assert jobs(other) == [1] * 4
    assert stages(sealer, assets) == [None, None]
    assert [row["failures"] for row in tries] == [1, 2, 3, 4]
    assert tries[-1]["waits"], "8 s by now"
    sealer.sql("create function public.is_not_there() returns text language sql as $$ select '' $$")
    seal(sealer)
    assert sum(jobs(sealer)) == 2


def test_an_image_whose_location_cannot_be_read_fails_by_itself(sealer: Library) -> None:
    """An expression of the project's adapter raises an error for one row. The other images are enqueued."""
    odd = "case when a.storage_path ~ 'odd' then (1 / (length(a.storage_path) - length(a.storage_path)))::text else '' end"
    change_paths(sealer, odd)
    assets = sealer.insert([f"{'odd' if n == 5 else n}{n}.jpg" for n in range(20)])
    assert seal(sealer) == ["image_not_enqueued"]
    assert jobs(sealer) == [19]
    assert stages(sealer, assets[4:7]) == ["queued", "failed", "queued"]
    assert sealer.sql("select 1 from autotag.arrivals union all select 1 from autotag.uploads") == []


async def test_a_trigger_that_takes_too_long_costs_its_own_upload(
    sealer: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker cancels a call that takes too long. Each time a quarter of the images is tried, so the upload is done
    in parts."""
    monkeypatch.setattr(calls, "SEAL_TIMEOUT", 1.0)
    sealer.sql("""
        create function public.slow() returns trigger language plpgsql as $$
        begin
          perform pg_sleep(0.05) where new.storage_path ~ 'slow' and new.tagging_stage = 'queued';
          return new;
        end $$;
        create trigger slow before update on public.assets for each row execute function public.slow()""")
    other = Library(sealer.stack, sealer.stack.add_member())
    sealer.insert([f"slow{n}.jpg" for n in range(60)])
    other.insert(["a.jpg"])
    db = calls.Database(sealer.stack.database_url(), uuid.UUID(WORKER))
    await db.open()
    slow = 0
    for _ in range(200):
        try:
            await db.seal_uploads()
        except TooSlow:
            slow += 1
        due_now(sealer)
        if sum(jobs(sealer)) == 60 and jobs(other):
            break
    await db.close()
    assert (sum(jobs(sealer)), jobs(other)) == (60, [1])
    assert slow


def test_an_image_that_moved_is_tagged_where_it_is(sealer: Library) -> None:
    other = Library(sealer.stack, sealer.stack.add_member())
    [asset, *_] = sealer.insert(["a.jpg", "b.jpg"])
    sealer.sql("update public.assets set workspace_id = %s, storage_path = %s where id = %s",
               other.member.workspace, f"{other.member.workspace}/a.jpg", asset)  # fmt: skip
    seal(sealer)
    seal(sealer)
    assert (jobs(sealer), jobs(other)) == ([1], [1])


# -- how much is read


def test_what_waits_is_not_read(sealer: Library) -> None:
    """200,000 images wait for their quotas. A look for due uploads reads none of them, even with a plan that was made
    when the table was empty."""
    seal_one(sealer)
    with psycopg.connect(sealer.stack.database_url(), autocommit=True, row_factory=dict_row) as connection:
        connection.execute("select * from autotag.seal_uploads(%s)", (WORKER,))
        connection.execute("""
            insert into autotag.uploads (workspace_id, uploader, seal_at)
            select gen_random_uuid(), gen_random_uuid(), now() + interval '1 day' from generate_series(1, 2000);
            insert into autotag.arrivals (asset_id, workspace_id, uploader, arrived_at, upload_id)
            select gen_random_uuid(), u.workspace_id, u.uploader, now(), u.id from autotag.uploads u, generate_series(1, 100)""")
        read = "select coalesce(seq_scan, 0) as scans, coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) as rows from pg_stat_xact_user_tables where relname = 'arrivals'"
        with connection.transaction():
            row = connection.execute("select * from autotag.seal_uploads(%s)", (WORKER,)).fetchone()
            [used] = connection.execute(read).fetchall()
    assert row is not None
    assert (row["sealed"], row["more"]) == (0, False)
    assert used == {"scans": 0, "rows": 0}


def test_an_upload_of_very_many_images_is_found_by_its_first_and_last(sealer: Library) -> None:
    sealer.stack.configure(upload_quiet="1 h", upload_longest="1 h")
    with psycopg.connect(sealer.stack.database_url(), autocommit=True, row_factory=dict_row) as connection:
        connection.execute("""
            insert into autotag.arrivals (asset_id, workspace_id, uploader, arrived_at)
            select gen_random_uuid(), %s, %s, now() + i * interval '1 ms' from generate_series(1, 50000) i""",
            (sealer.member.workspace, NOBODY))  # fmt: skip
        connection.execute("vacuum autotag.arrivals")
        with connection.transaction():
            connection.execute("select * from autotag.seal_uploads(%s)", (WORKER,))
            row = connection.execute(
                "select coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) as rows from pg_stat_xact_user_tables where relname = 'arrivals'"
            ).fetchone()
    assert row is not None
    assert row["rows"] < 20
