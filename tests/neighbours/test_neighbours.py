"""One tenant's transactions, triggers, constraints and connections affect no other tenant.

Each test has two workspaces, a real worker process and one kind of trouble that comes from the first workspace. The second one's
images are tagged all the same, the first one's other images too, an image that cannot be stored fails alone, and the provider
is asked once about each picture.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
import pytest

from forked import worker_process
from lab.proxy import Proxy
from lab.stack import Stack
from support import Library, answered_pictures, asked, check_asked_once, check_money, until

#: A table and a trigger as most projects write them: the table's name has no schema, the function no search_path.
ACTIVITY = """
    create table public.activity (asset_id uuid not null, what text not null, at timestamptz not null default now());
    create function public.note_activity() returns trigger language plpgsql as $$
    begin
      insert into activity (asset_id, what) values (new.id, coalesce(new.tagging_stage, 'none'));
      return new;
    end $$;
    create trigger note_activity after update on public.assets for each row execute function public.note_activity()"""


@pytest.fixture
def neighbour(stack: Stack) -> Library:
    """Another workspace of the same project."""
    return Library(stack)


@contextlib.contextmanager
def holding(library: Library, statement: str, *arguments: object) -> Iterator[psycopg.Connection[Any]]:
    """Runs a statement as the project's owner in a transaction that stays open."""
    with psycopg.connect(library.stack.database_url()) as connection:
        connection.execute(statement, arguments)  # type: ignore[arg-type]
        yield connection
        connection.rollback()


@contextlib.asynccontextmanager
async def working(library: Library, **environment: str) -> AsyncIterator[None]:
    """Runs a worker process, which must still be alive at the end."""
    async with worker_process({**library.stack.worker_environment(), **environment}) as process:
        yield
        assert process.is_alive(), "the worker has died"


def stages(library: Library) -> dict[str, str]:
    return {asset: row["tagging_stage"] for asset, row in library.assets().items()}


def all_but(library: Library, *left: str) -> bool:
    """Whether every image of a workspace except these is tagged."""
    return all(stage == "completed" for asset, stage in stages(library).items() if asset not in left)


def named(library: Library) -> set[str]:
    """The images that messages on the workspace's topic have named."""
    rows = library.sql("select payload -> 'asset_ids' as assets from realtime.messages where event like 'job-%%'")
    return {asset for row in rows for asset in row["assets"] or ()}


@pytest.mark.parametrize("images", [8, 60], ids=["single calls", "batch"])
async def test_an_open_transaction_on_one_image_holds_up_that_image_alone(
    library: Library, neighbour: Library, images: int
) -> None:
    assets = await library.upload(images)
    others = await neighbour.upload(images, seed=2)
    jobs = library.enqueue(assets), neighbour.enqueue(others)
    with holding(library, "select from public.assets where id = %s for update", assets[3]) as owner:
        async with working(library):
            await neighbour.finished(jobs[1])
            await until(lambda: all_but(library, assets[3]), "the other images of the same upload")
            owner.commit()
            await library.finished(jobs[0])
    library.check_tags()
    neighbour.check_tags()
    check_asked_once(library.stack)
    check_money(library.stack)


async def test_an_open_enqueue_holds_up_nothing_that_was_there_before(library: Library, neighbour: Library) -> None:
    assets, later = await library.upload(20), await library.upload(4, seed=3)  # fewer than the 30 calls of a minute
    others = await neighbour.upload(8, seed=2)
    jobs = library.enqueue(assets), neighbour.enqueue(others)
    claims = json.dumps({"role": "authenticated", "sub": library.member.user})
    with psycopg.connect(library.stack.database_url("authenticator")) as member:
        member.execute(
            "select set_config('request.jwt.claims', %s, true), set_config('role', 'authenticated', true)", (claims,)
        )
        member.execute("select public.enqueue_tagging(%s::uuid[])", (later,))
        async with working(library):
            await library.finished(jobs[0])
            await neighbour.finished(jobs[1])
            member.commit()
            await until(lambda: all_but(library), "the upload that was committed late")
    library.check_tags()
    check_asked_once(library.stack)


async def test_a_submitted_batch_is_shown_once_nobody_holds_its_upload(library: Library) -> None:
    """A page learns of a changed row only by the message that names it, and the next message may be hours away."""
    stack = library.stack
    stack.simulator.plan.batch_latency = (3600.0, 3600.0)
    job = library.enqueue(await library.upload(60))
    proxy = Proxy(stack.database_url())
    proxy.hold_back("autotag.show_batch(")
    async with proxy.serve(), working(library, DATABASE_URL=proxy.url(stack.worker_environment()["DATABASE_URL"])):
        await until(lambda: proxy.held > 0, "the batch's stage on its way")
        with holding(library, "select from autotag.jobs where id = %s for update", job["job_id"]) as owner:
            proxy.let_through()
            proxy.hold_back("autotag.show_batch(")
            await until(lambda: proxy.held > 1, "a second call, so the first one has ended")
            assert "submitted" not in stages(library).values()
            owner.commit()
        proxy.let_through()
        await until(lambda: "queued" not in stages(library).values(), "the stage of each image")
        await until(lambda: set(stages(library)) <= named(library), "messages that name each image")


async def test_a_trigger_that_names_a_table_without_its_schema_works(library: Library) -> None:
    library.sql(ACTIVITY)
    assets = await library.upload(4)
    job = library.enqueue(assets)
    async with working(library):
        await library.finished(job)
    library.check_tags()
    assert (
        library.sql("select count(distinct asset_id) as n from public.activity where what = 'completed'")[0]["n"] == 4
    )


#: A project's rule that one image breaks: SQL with the image's id.
REFUSALS = {
    "a trigger": """
        create function public.refuse() returns trigger language plpgsql as $$
        begin
          raise exception 'not this one' using errcode = 'P0001';
        end $$;
        create trigger refuse before update of tags on public.assets for each row
          when (new.tags is distinct from old.tags and new.id = '{asset}') execute function public.refuse()""",
    "a check": "alter table public.assets add check (id <> '{asset}' or tags is null)",
    "a trigger after the statement": """
        create function public.refuse() returns trigger language plpgsql as $$
        begin
          if exists (select from changed c where c.id = '{asset}' and c.tags is not null) then
            raise exception 'not this one';
          end if;
          return null;
        end $$;
        create trigger refuse after update on public.assets referencing new table as changed
          for each statement execute function public.refuse()""",
    "a constraint checked at commit": """
        create function public.refuse() returns trigger language plpgsql as $$
        begin
          raise exception 'not this one';
        end $$;
        create constraint trigger refuse after update on public.assets deferrable initially deferred for each row
          when (new.tags is distinct from old.tags and new.id = '{asset}') execute function public.refuse()""",
}


@pytest.mark.parametrize("images", [8, 60], ids=["single calls", "batch"])
@pytest.mark.parametrize("refusal", REFUSALS)
async def test_an_image_whose_tags_are_refused_fails_alone(
    library: Library, neighbour: Library, refusal: str, images: int
) -> None:
    assets = await library.upload(images)
    others = await neighbour.upload(images, seed=2)
    refused = assets[2]
    library.sql(REFUSALS[refusal].replace("{asset}", refused))
    jobs = library.enqueue(assets), neighbour.enqueue(others)
    async with working(library):
        [done] = await library.finished(jobs[0])
        await neighbour.finished(jobs[1])
    assert (done["completed"], done["failed"]) == (images - 1, 1)
    library.check_tags([asset for asset in assets if asset != refused])
    neighbour.check_tags()
    row = library.assets()[refused]
    assert (row["tagging_stage"], row["tags"]) == ("failed", None)
    assert "not this one" not in row["tagging_error"], "what the database says is for the log"
    [task] = library.sql("select error_code from autotag.tasks where asset_id = %s", refused)
    assert task["error_code"] == "not_stored"
    check_asked_once(library.stack)
    check_money(library.stack)


def described(library: Library) -> str:
    """The columns that describe_assets() returns."""
    [row] = library.sql("select pg_get_function_result('autotag.describe_assets'::regproc) as type")
    return str(row["type"])


@pytest.mark.parametrize("images", [8, 60], ids=["single calls", "batch"])
async def test_an_image_whose_row_cannot_be_read_ends_alone(library: Library, neighbour: Library, images: int) -> None:
    """The cause may be a damaged page of the table, a view with an error, or an adapter that is being changed. It may
    pass or stay."""
    library.stack.configure(max_failures="3")
    assets, others = await library.upload(images), await neighbour.upload(8, seed=2)
    jobs = library.enqueue(assets), neighbour.enqueue(others)
    library.sql(f"""
        alter function autotag.describe_assets(autotag.asset_id[], boolean) rename to describe_assets_before;
        create function autotag.describe_assets(p_asset_ids autotag.asset_id[], p_marks boolean default true)
        returns {described(library)}
        language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
        begin
          if '{assets[2]}' = any (p_asset_ids) then
            raise exception 'invalid page in block 7' using errcode = 'XX001';
          end if;
          return query select * from autotag.describe_assets_before(p_asset_ids, p_marks);
        end $$""")
    async with working(library):
        [done] = await library.finished(jobs[0])
        await neighbour.finished(jobs[1])
    assert (done["completed"], done["failed"]) == (images - 1, 1)
    library.check_tags([asset for asset in assets if asset != assets[2]])
    neighbour.check_tags()
    row = library.assets()[assets[2]]
    assert (row["tagging_stage"], row["tagging_error"]) == (
        "failed", "The image's row in the database cannot be read.",
    )  # fmt: skip
    [task] = library.sql("select error_code from autotag.tasks where asset_id = %s", assets[2])
    assert task["error_code"] == "unreadable_row"
    check_asked_once(library.stack)


def end_sessions(library: Library) -> None:
    """Creates a function that ends the calling session, like a damaged row that crashes the server process."""
    with psycopg.connect(library.stack.database_url("supabase_admin"), autocommit=True) as admin:
        admin.execute("""
            create sequence public.ended;
            grant all on public.ended to public;
            create function public.end_session() returns boolean language plpgsql volatile security definer as $$
            begin
              perform nextval('public.ended'), pg_terminate_backend(pg_backend_pid());
              perform pg_sleep(60);
              return true;
            end $$""")


def end_sessions_of_updates(library: Library, when: str) -> None:
    """Ends the session of every update of a row for which this condition on ``new`` is true."""
    end_sessions(library)
    library.sql(f"""
        create function public.be_deadly() returns trigger language plpgsql as $$
        begin
          perform public.end_session();
          return new;
        end $$;
        create trigger be_deadly before update on public.assets for each row
          when ({when}) execute function public.be_deadly()""")


def ended_sessions(library: Library) -> int:
    [row] = library.sql("select case when is_called then last_value else 0 end as n from public.ended")
    return int(row["n"])


async def test_a_row_whose_stage_ends_the_session_ends_few(library: Library) -> None:
    """After a few lost sessions, the stage of the batch is left out. The batch lasts long enough for many more
    tries."""
    library.stack.simulator.plan.batch_latency = (8.0, 8.0)
    assets = await library.upload(60)
    end_sessions_of_updates(library, f"new.id = '{assets[30]}' and new.tagging_stage in ('submitted', 'processing')")
    job = library.enqueue(assets)
    async with working(library):
        await library.finished(job)
    library.check_tags()
    assert 0 < ended_sessions(library) <= 2 * 5, "for each of the two stages, one loss, and three that prove the cause"


@pytest.mark.parametrize("images", [8, 60], ids=["single calls", "batch"])
async def test_an_image_whose_row_ends_the_session_fails_alone(
    library: Library, neighbour: Library, images: int
) -> None:
    """The connection is lost each time the image's outcome is written. The worker notices that the network is not the
    cause."""
    assets, others = await library.upload(images), await neighbour.upload(images, seed=2)
    end_sessions_of_updates(library, f"new.id = '{assets[2]}' and new.tagging_stage in ('completed', 'failed')")
    jobs = library.enqueue(assets), neighbour.enqueue(others)
    async with working(library):
        await neighbour.finished(jobs[1])
        [done] = await library.finished(jobs[0])
    assert (done["completed"], done["failed"]) == (images - 1, 1)
    library.check_tags([asset for asset in assets if asset != assets[2]])
    neighbour.check_tags()
    [task] = library.sql("select error_code from autotag.tasks where asset_id = %s", assets[2])
    assert task["error_code"] == "not_stored"
    assert ended_sessions(library) < 40
    check_asked_once(library.stack)
    check_money(library.stack)


@pytest.mark.parametrize("images", [5, 16], ids=["single calls", "batch"])
async def test_an_image_whose_row_ends_the_session_that_reads_it_fails_alone(
    library: Library, neighbour: Library, images: int
) -> None:
    library.stack.configure(max_failures="2", chunk_max_images="10")
    assets, others = await library.upload(images), await neighbour.upload(8, seed=2)
    end_sessions(library)
    jobs = library.enqueue(assets), neighbour.enqueue(others)
    library.sql(f"""
        alter function autotag.describe_assets(autotag.asset_id[], boolean) rename to describe_assets_before;
        create function autotag.describe_assets(p_asset_ids autotag.asset_id[], p_marks boolean default true)
        returns {described(library)}
        language plpgsql stable security definer set search_path = pg_catalog, pg_temp as $$
        begin
          if '{assets[-1]}' = any (p_asset_ids) then
            perform public.end_session();
          end if;
          return query select * from autotag.describe_assets_before(p_asset_ids, p_marks);
        end $$""")
    async with working(library):
        await neighbour.finished(jobs[1])
        [done] = await library.finished(jobs[0])
    assert (done["completed"], done["failed"]) == (images - 1, 1)
    library.check_tags(assets[:-1])
    neighbour.check_tags()
    [task] = library.sql("select error_code from autotag.tasks where asset_id = %s", assets[-1])
    assert task["error_code"] == "unreadable_row"
    check_asked_once(library.stack)


async def test_a_slow_trigger_of_one_workspace_does_not_hold_up_another(library: Library, neighbour: Library) -> None:
    assets, others = await library.upload(8), await neighbour.upload(8, seed=2)
    library.sql(f"""
        create function public.be_slow() returns trigger language plpgsql as $$
        begin
          perform pg_sleep(30);
          return new;
        end $$;
        create trigger be_slow before update of tags on public.assets for each row
          when (new.tags is distinct from old.tags and new.workspace_id = '{library.member.workspace}')
          execute function public.be_slow()""")
    library.enqueue(assets)
    job = neighbour.enqueue(others)
    async with worker_process(library.stack.worker_environment()) as process:
        await neighbour.finished(job)
        neighbour.check_tags()
        assert process.is_alive(), "the worker has died"
        process.kill()  # it would wait for the slow trigger


async def test_a_parameter_that_a_trigger_sets_changes_no_other_workspace(library: Library, neighbour: Library) -> None:
    """The worker's session keeps the plans of functions that it has called while the parameter was set."""
    library.sql(f"""
        create function public.be_old() returns trigger language plpgsql as $$
        begin
          set local standard_conforming_strings = off;
          return null;
        end $$;
        create trigger be_old after update on public.assets for each row
          when (new.workspace_id = '{library.member.workspace}') execute function public.be_old()""")
    async with working(library):
        await library.finished(library.enqueue(await library.upload(60)))
        await neighbour.finished(neighbour.enqueue(await neighbour.upload(60, seed=2)))
    library.check_tags()
    neighbour.check_tags()
    check_money(library.stack)


async def test_a_slow_policy_does_not_hold_up_another_workspace(library: Library, neighbour: Library) -> None:
    """It is asked about files that replaced others, and images of all workspaces are in the same claim."""
    assets, replacements = await library.upload(20), await library.upload_files(20, seed=7)
    others = await neighbour.upload(8, seed=2)
    library.enqueue(assets)
    for asset, (path, _) in zip(assets, replacements, strict=True):
        library.sql("update public.assets set storage_path = %s where id = %s", path, asset)
    with psycopg.connect(library.stack.database_url("supabase_admin"), autocommit=True) as admin:
        admin.execute(
            f"""
            create function public.slowly(name text) returns boolean language plpgsql as $$
            begin
              if starts_with(name, '{library.member.workspace}') then perform pg_sleep(5); end if;
              return true;
            end $$""".encode()
        )
        admin.execute(
            "create policy slow on storage.objects as restrictive for select to authenticated using (public.slowly(name))"
        )
    job = neighbour.enqueue(others)
    async with worker_process(library.stack.worker_environment()) as process:
        await until(lambda: neighbour.job(job["job_id"])["finished_at"] is not None, "the other workspace", 60)
        neighbour.check_tags()
        assert process.is_alive(), "the worker has died"
        process.kill()  # it would wait for the slow policy


async def test_a_lock_that_a_failing_trigger_leaves_behind_is_released(library: Library, neighbour: Library) -> None:
    """An advisory lock of the session outlives the error and the transaction, and the worker's session goes on."""
    assets, others = await library.upload(5), await neighbour.upload(20, seed=2)
    library.sql(f"""
        create function public.lock_first() returns trigger language plpgsql as $$
        begin
          perform pg_advisory_lock(42);
          if new.id = '{assets[2]}' then raise exception 'not this one'; end if;
          perform pg_advisory_unlock(42);
          return new;
        end $$;
        create trigger lock_first before update of tags on public.assets for each row
          when (new.tags is distinct from old.tags) execute function public.lock_first()""")
    job = library.enqueue(assets)
    async with working(library):
        await library.finished(job)
        await neighbour.finished(neighbour.enqueue(others))
    neighbour.check_tags()
    assert all_but(library, assets[2])
    assert stages(library)[assets[2]] == "failed"


SHOWN = {"processing", "completed"}  # an upload's first images are single calls, and are tagged at once


@pytest.mark.parametrize("code", ["P0001", "55000", "54000", "40001"])
async def test_a_deferred_trigger_that_refuses_a_stage_keeps_that_row_alone(
    library: Library, neighbour: Library, code: str
) -> None:
    """It raises at the commit, in the transaction that shows the stage of the whole batch."""
    library.stack.simulator.plan.batch_latency = (3600.0, 3600.0)
    library.stack.simulator.plan.batch_validation = 0.5
    assets = await library.upload(60)
    await neighbour.upload(60, seed=2)
    library.sql(f"""
        create function public.refuse_late() returns trigger language plpgsql as $$
        begin
          raise exception 'not this one' using errcode = '{code}';
        end $$;
        create constraint trigger refuse_late after update on public.assets deferrable initially deferred for each row
          when (new.tagging_stage = 'processing' and new.id = '{assets[30]}') execute function public.refuse_late()""")
    library.enqueue(assets)
    async with working(library):
        await until(
            lambda: {stage for asset, stage in stages(library).items() if asset != assets[30]} <= SHOWN,
            "the stage of the batch's other images",
        )
        neighbour.enqueue(list(neighbour.assets()))
        await until(lambda: set(stages(neighbour).values()) <= SHOWN, "the stage of the other workspace's batch")


async def test_a_deferred_trigger_that_refuses_the_stage_of_a_single_call_keeps_that_row_alone(
    library: Library,
) -> None:
    library.stack.simulator.plan.latency = (20.0, 20.0)
    assets = await library.upload(8)
    library.sql(f"""
        create function public.refuse_late() returns trigger language plpgsql as $$
        begin
          raise exception 'not this one';
        end $$;
        create constraint trigger refuse_late after update on public.assets deferrable initially deferred for each row
          when (new.tagging_stage = 'processing' and new.id = '{assets[3]}') execute function public.refuse_late()""")
    job = library.enqueue(assets)
    async with working(library):
        await until(
            lambda: {stage for asset, stage in stages(library).items() if asset != assets[3]} == {"processing"},
            "the stage of the other images",
        )
        await library.finished(job)
    library.check_tags()


async def test_a_clock_that_is_set_back_stops_nobody(library: Library, neighbour: Library) -> None:
    """Until the clock has reached the time again, everything that was due at a time of the old clock would wait. The worker's own
    heartbeat notices it, and no lease ends."""
    stack = library.stack
    stack.configure(lease="15 s")

    def set_clock(ahead: str) -> None:
        library.sql(f"""
            create or replace function autotag.now() returns timestamptz
            language sql stable set search_path = pg_catalog, pg_temp
            as $$ select clock_timestamp() + interval '{ahead}' $$""")

    jobs = [library.enqueue(await library.upload(5)), library.enqueue(await library.upload(60, seed=2))]
    set_clock("3 days")
    async with working(library), working(library):
        await library.finished(*jobs)
        workers = library.sql("select id from autotag.workers order by id")
        set_clock("0")
        late = [neighbour.enqueue(await neighbour.upload(n, seed=n)) for n in (40, 60)]
        again = library.enqueue(await library.upload(30, seed=3))
        await neighbour.finished(*late)
        await library.finished(again)
        assert library.sql("select id from autotag.workers order by id") == workers
    neighbour.check_tags()
    library.check_tags()
    assert len(answered_pictures(stack)) == 5 + 60 + 40 + 60 + 30, "each image was asked once"


async def test_an_old_snapshot_does_not_ask_again(library: Library) -> None:
    """A transaction that began before the images were tagged does not see that they are."""
    async with working(library):
        for level in (psycopg.IsolationLevel.REPEATABLE_READ, psycopg.IsolationLevel.SERIALIZABLE):
            assets = await library.upload(4, seed=level.value)
            with psycopg.connect(library.stack.database_url()) as old:
                old.isolation_level = level
                old.execute("select count(*) from public.workspaces")
                await library.finished(library.enqueue(assets))
                before = len(asked(library.stack))
                with pytest.raises(psycopg.errors.SerializationFailure):
                    old.execute("select public.enqueue_tagging(%s::uuid[])", (assets,))
                old.rollback()
            assert len(asked(library.stack)) == before
            assert library.sql("select 1 from autotag.jobs where finished_at is null") == []


async def test_automatic_mode_takes_no_harm_from_a_row_that_refuses(library: Library, neighbour: Library) -> None:
    """A row that cannot become `queued` fails neither the claims of others nor the host's own INSERT."""
    library.stack.configure(upload_quiet="0.1 s")
    library.sql("select autotag.set_automatic(true)")
    library.sql(f"""
        create function public.refuse() returns trigger language plpgsql as $$
        begin
          raise exception 'not this one';
        end $$;
        create trigger refuse before update on public.assets for each row
          when (new.workspace_id = '{library.member.workspace}') execute function public.refuse()""")
    async with working(library):
        await library.upload(3)
        await neighbour.upload(8, seed=2)
        await until(lambda: all_but(neighbour), "the other workspace's images")
        await until(
            lambda: not library.sql("select from autotag.jobs where finished_at is null"), "the refused images to fail"
        )
    neighbour.check_tags()


async def test_automatic_mode_goes_on_where_a_row_ends_the_session(library: Library, neighbour: Library) -> None:
    """A row ends every session that writes `queued` to it. Its upload is tagged without that stage."""
    library.stack.configure(upload_quiet="0.1 s")
    library.sql("select autotag.set_automatic(true)")
    end_sessions_of_updates(
        library, f"new.workspace_id = '{library.member.workspace}' and new.tagging_stage = 'queued'"
    )
    async with working(library):
        await library.upload(3)
        await neighbour.upload(8, seed=2)
        await until(lambda: all_but(neighbour), "the other workspace's images")
        await until(lambda: all_but(library), "the upload with the deadly rows")
    library.check_tags()
    neighbour.check_tags()
    check_asked_once(library.stack)


@pytest.mark.parametrize("statement", ["autotag.claim(", "autotag.settle(", "autotag.report_stages("])
async def test_a_reply_that_is_lost_loses_no_image(library: Library, neighbour: Library, statement: str) -> None:
    """A statement is committed, but the connection breaks before the worker gets the reply."""
    assets, others = await library.upload(8), await neighbour.upload(8, seed=2)
    jobs = library.enqueue(assets), neighbour.enqueue(others)
    stack = library.stack
    stack.simulator.plan.latency = (0.5, 1.0)  # longer than a stage must last to be reported
    proxy = Proxy(stack.database_url())
    proxy.cut_reply(statement, times=2)
    async with proxy.serve(), working(library, DATABASE_URL=proxy.url(stack.worker_environment()["DATABASE_URL"])):
        await library.finished(jobs[0])
        await neighbour.finished(jobs[1])
        assert proxy.cuts == 2
    library.check_tags()
    neighbour.check_tags()
    check_asked_once(stack)
    check_money(stack)


async def test_an_answer_that_waits_to_be_stored_is_not_asked_again(library: Library) -> None:
    """A claim's reply is lost while answers wait. The worker then releases the images of that claim, but not those with
    an answer."""
    first, second = await library.upload(4), await library.upload(4, seed=2)
    stack = library.stack
    proxy = Proxy(stack.database_url())
    proxy.hold_back("autotag.settle(")
    async with proxy.serve(), working(library, DATABASE_URL=proxy.url(stack.worker_environment()["DATABASE_URL"])):
        jobs = [library.enqueue(first)]
        await until(lambda: proxy.held > 0, "a settle on its way")
        proxy.cut_reply("autotag.claim(")
        jobs.append(library.enqueue(second))
        await until(lambda: proxy.cuts == 1, "a claim's reply to be lost")
        await until(lambda: len(asked(stack)) >= 8, "the lost claim's images to be asked")
        proxy.let_through()
        await library.finished(*jobs)
    library.check_tags()
    check_asked_once(stack)


async def test_realtime_that_raises_takes_no_tags_with_it(library: Library) -> None:
    """`realtime.send` raises an error, for example because today's partition is missing. The tags are stored in any
    case."""
    with psycopg.connect(library.stack.database_url("supabase_admin"), autocommit=True) as admin:
        admin.execute("""
            create or replace function realtime.send(payload jsonb, event text, topic text, private boolean default true)
            returns void language plpgsql as $$
            begin
              raise exception 'no partition of relation "messages" found for row';
            end $$""")
    assets = await library.upload(60)
    job = library.enqueue(assets)
    async with working(library):
        await library.finished(job)
    library.check_tags()
    check_asked_once(library.stack)


@pytest.mark.parametrize("images", [4, 60], ids=["single calls", "batch"])
async def test_a_picture_that_was_replaced_meanwhile_is_tagged_again(library: Library, images: int) -> None:
    """The row names another file while the provider has the old one. The old picture's tags are not stored, and the new
    picture is tagged."""
    assets = await library.upload(images)
    [(path, drawing)] = await library.upload_files(1, seed=9)
    library.stack.simulator.plan.latency = (1.0, 1.5)
    library.stack.simulator.plan.batch_latency = (2.0, 2.5)
    job = library.enqueue(assets)
    async with working(library):
        await until(
            lambda: stages(library)[assets[-1]] in ("submitted", "processing"), "the picture to be with the provider"
        )
        library.sql("update public.assets set storage_path = %s where id = %s", path, assets[-1])
        library.drawings[assets[-1]] = drawing
        await library.finished(job)
    library.check_tags()


async def test_a_row_that_is_deleted_or_moves_meanwhile_ends_alone(library: Library, neighbour: Library) -> None:
    assets, others = await library.upload(8), await neighbour.upload(8, seed=2)
    library.stack.simulator.plan.latency = (1.5, 2.0)
    jobs = library.enqueue(assets), neighbour.enqueue(others)
    async with working(library):
        await until(lambda: stages(library)[assets[0]] == "processing", "a call on its way")
        library.sql("delete from public.assets where id = %s", assets[0])
        library.sql("update public.assets set workspace_id = %s where id = %s", neighbour.member.workspace, assets[1])
        await library.finished(jobs[0])
        await neighbour.finished(jobs[1])
    library.check_tags(assets[2:])
    neighbour.check_tags(others)
    assert library.sql("select tags from public.assets where id = %s", assets[1])[0]["tags"] is None
    # Its row still shows `processing`, but `autotag enqueue` finds it.
    left = "select autotag.list_assets(%s, true, null, 100)::text[] as assets"
    assert neighbour.sql(left, neighbour.member.workspace) == [{"assets": [assets[1]]}]
