"""The real pg_cron: the jobs exist once and run, and housekeeping keeps every table bounded."""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import psycopg
from psycopg.rows import dict_row

from conftest import skip
from lab.postgres import LocalPostgres
from support import PATIENCE, Library, until, worker

MINUTE = 75.0  # seconds within which a job of every minute has run


def rows(postgres: LocalPostgres, statement: str) -> list[dict[str, Any]]:
    """Executes a statement in the server's own database, where pg_cron is."""
    with psycopg.connect(postgres.url(), autocommit=True, row_factory=dict_row) as connection:
        cursor = connection.execute(statement)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []


def test_the_jobs_are_scheduled_once(postgres: LocalPostgres, machine_postgres: bool) -> None:
    if not machine_postgres:
        skip("pg_cron needs Debian's Postgres")
    assert rows(postgres, "select autotag.schedule_cron() as done") == [{"done": True}]
    jobs = rows(postgres, "select jobname, schedule, active, username from cron.job order by jobname")
    assert [(job["jobname"], job["schedule"]) for job in jobs] == [
        ("autotag-housekeeping", "17 3 * * *"), ("autotag-tick", "* * * * *"),
    ]  # fmt: skip
    assert {(job["active"], job["username"]) for job in jobs} == {(True, "postgres")}


async def test_pg_cron_runs_the_tick(postgres: LocalPostgres, machine_postgres: bool) -> None:
    """pg_cron runs the tick without a call of ours: it releases what a dead worker held (`leave_a_dead_worker`). The
    command of its daily job works, too."""
    if not machine_postgres:
        skip("pg_cron needs Debian's Postgres")

    def taken_back() -> bool:
        return rows(postgres, "select 1 from autotag.workers where host = 'gone'") == []

    await until(taken_back, "pg_cron to tick", patience=MINUTE)
    await until(
        lambda: rows(postgres, "select 1 from cron.job_run_details where status = 'succeeded'") != [],
        "the run to be recorded", patience=MINUTE,
    )  # fmt: skip
    assert rows(postgres, "select distinct return_message from cron.job_run_details where status = 'failed'") == []
    [finding] = rows(postgres, "select autotag.diagnose_cron() as f")
    assert finding["f"]["level"] == "ok", finding
    [job] = rows(postgres, "select command from cron.job where jobname = 'autotag-housekeeping'")
    rows(postgres, "insert into cron.job_run_details (jobid, runid, end_time, status)"
         " select jobid, 1000000 + jobid, now() - interval '8 days', 'succeeded' from cron.job union all"
         " values (777, 1000777, now() - interval '8 days', 'succeeded')")  # fmt: skip
    rows(postgres, job["command"])
    assert rows(postgres, "select jobid from cron.job_run_details where runid > 1000000") == [{"jobid": 777}], (
        "old runs of autotag's own jobs are deleted, and those of the project's are not autotag's to delete"
    )


def test_housekeeping_keeps_every_table_bounded(library: Library) -> None:
    """After a year of work, one night of housekeeping leaves only rows that are kept on purpose."""
    library.sql("""
        insert into autotag.jobs (workspace_id, strategy, image_count, completed, created_at, finished_at)
        select gen_random_uuid(), 'realtime', 1, 1, now() - i * interval '1 day', now() - i * interval '1 day'
        from generate_series(1, 365) i;
        insert into autotag.workspaces (workspace_id) select workspace_id from autotag.jobs;
        insert into autotag.queues (job_id, workspace_id) select id, workspace_id from autotag.jobs;
        insert into autotag.tasks (job_id, workspace_id, asset_id, lane, stage, finished_at)
        select id, workspace_id, gen_random_uuid(), 'realtime', 'failed', finished_at from autotag.jobs;
        insert into autotag.unstored (task_id, workspace_id, result, next_at, kept_at)
        select id, workspace_id, '{}', finished_at, finished_at from autotag.tasks;
        insert into autotag.provider_reports (at) select created_at from autotag.jobs;
        insert into autotag.batches (job_id, workspace_id, ordinal, image_count, state, created_at)
        select id, workspace_id, 1, 1, 'done', created_at from autotag.jobs;
        insert into public.workspace_rate_limits (workspace_id, request_type, admitted_at, requests, units)
        select workspace_id, 'realtime', array[created_at], '{1}', '{1}' from autotag.jobs;
        insert into autotag.workers select gen_random_uuid(), 'h', '0', true, created_at, created_at, created_at from autotag.jobs;
        insert into autotag.webhooks select 'wh_' || id, 'batch_1', created_at from autotag.jobs;
        insert into autotag.outbox (topic, event, payload, private, created_at)
        select 't', 'e', '{}', true, created_at from autotag.jobs;
        insert into autotag.pictures select id, workspace_id, '{1}' from autotag.jobs;
        insert into autotag.uploads (workspace_id, uploader, seal_at) select workspace_id, workspace_id, created_at from autotag.jobs;
        insert into autotag.durations (images, started_at, seconds) select 100, created_at, 60 from autotag.jobs;
        insert into autotag.profiles (workspace_id, version, created_at) select workspace_id, 1, created_at from autotag.jobs;
        insert into autotag.briefs (profile_id, vocabulary, extra_prompt, extra_output, tokens_per_image, output_tokens, prompt_mean,
          output_mean, created_at)
        select id, '[]', 0, 0, 1, 1, 1, 1, created_at from autotag.profiles;
        insert into autotag.learned (model, image_detail, image_side, reasoning_effort, max_tags, tag_language, learned_at)
        select 'm' || id, 'low', 0, '', 10, 'English', created_at from autotag.jobs;
        insert into autotag.usage (workspace_id, day, model, service_tier)
        select workspace_id, created_at::date - 600, 'm', 'batch' from autotag.jobs""")
    grown = sizes(library)
    library.sql("select autotag.tick()")
    library.sql("select autotag.housekeeping()")
    left = sizes(library)
    kept = {
        "autotag.jobs": 29, "autotag.queues": 29, "autotag.tasks": 29, "autotag.batches": 29,  # keep_finished: 30 days
        "autotag.webhooks": 3, "autotag.usage": 200,  # keep_usage: 800 days
        "autotag.durations": 89, "autotag.quotas": 0,
        "autotag.workspaces": 0, "autotag.workers": 1, "autotag.outbox": 0, "autotag.windows": 0,
        "autotag.unstored": 29, "autotag.provider_reports": 0,
        "autotag.uploads": 0, "autotag.arrivals": 0, "autotag.pictures": 0,
        "autotag.vocabulary": 0, "autotag.vocabulary_names": 0,
        "autotag.settings": 1, "autotag.provider_limits": 1, "autotag.clock": 1,
        "autotag.error_kinds": 4, "autotag.models": 15, "autotag.learned": 89,  # one a day
        "autotag.profiles": 365,  # people wrote them
        "autotag.briefs": 89,  # 90 days
        "autotag.shapes": 0,  # columns for views of types, never a row
    }  # fmt: skip
    assert set(left) == set(kept), "a new table needs a rule for what is kept of it"
    for table, most in kept.items():
        assert left[table] <= most, f"{table} had {grown[table]} rows and keeps {left[table]}"


def test_housekeeping_repairs_an_image_that_waits_in_no_upload(library: Library) -> None:
    library.sql("insert into autotag.arrivals (asset_id, workspace_id, uploader, arrived_at, upload_id)"
                " values (gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), now(), 7)")  # fmt: skip
    library.sql("select autotag.housekeeping()")
    assert library.sql("select upload_id from autotag.arrivals") == [{"upload_id": None}]


def sizes(library: Library) -> dict[str, int]:
    names = library.sql("""select case when relnamespace = 'public'::regnamespace then 'public.' else '' end
        || oid::regclass::text as name from pg_class where relkind = 'r' and relnamespace = 'autotag'::regnamespace""")
    return {row["name"]: library.sql(f"select count(*) as n from {row['name']}")[0]["n"] for row in names}


async def test_without_pg_cron_the_workers_own_tick_does_the_same(library: Library) -> None:
    """Without pg_cron, a worker releases what a dead worker held, and does the daily housekeeping."""
    stack = library.stack
    stack.configure(lease="1 s")
    library.sql("insert into autotag.workers values"
                " (gen_random_uuid(), 'gone', '0', true, now(), now(), now() - interval '1 min')")  # fmt: skip
    library.sql("insert into autotag.webhooks values ('wh_old', 'batch_1', now() - interval '5 days')")
    async with worker(stack), asyncio.timeout(PATIENCE):
        await until(lambda: library.sql("select 1 from autotag.workers where host = 'gone'") == [], "the tick")
        await until(lambda: library.sql("select 1 from autotag.webhooks") == [], "housekeeping")
    clock = library.sql("select ticked_at > now() - interval '1 min' as ticked from autotag.clock")
    assert clock == [{"ticked": True}]


def test_housekeeping_and_an_upload_do_not_wait_for_each_other(library: Library) -> None:
    """Housekeeping deletes a workspace without work while an upload to it begins. The next claim gets the upload's
    images."""
    worker = "00000000-0000-4000-8000-00000000000a"
    library.sql("select autotag.register_worker(%s, 'h', autotag.schema_version(), true)", worker)
    library.sql("insert into autotag.workspaces (workspace_id) values (%s)", library.member.workspace)
    with psycopg.connect(library.stack.database_url()) as housekeeping:
        housekeeping.execute("select autotag.housekeeping()")
        library.enqueue(library.insert(["a.jpg"]))
    assert library.sql("select from autotag.workspaces") == []
    assert library.sql("select cardinality(tasks) as n from autotag.claim(%s, 5, 1)", worker) == [{"n": 1}]
    with psycopg.connect(library.stack.database_url()) as upload:
        upload.execute("select public.enqueue_tagging(%s::uuid[])", (library.insert(["b.jpg"]),))
        library.sql("select autotag.housekeeping()")
    assert library.sql("select cardinality(tasks) as n from autotag.claim(%s, 5, 2)", worker) == [{"n": 1}]


#: Times that may stay in the future after the clock was set back, and why.
STAY = {
    "clock.ticked_at": "tick() sets it",
    "jobs.eta": "predicted again", "jobs.eta_p90": "predicted again",
    "jobs.cancelled_at": "shown only", "jobs.finished_at": "of what is over", "tasks.finished_at": "of what is over",
    "workers.started_at": "shown only",
}  # fmt: skip
WAITING = (
    "batches",
    "clock",
    "jobs",
    "provider_limits",
    "queues",
    "tasks",
    "unstored",
    "uploads",
    "windows",
    "workers",
    "workspaces",
)


def test_after_the_clock_was_set_back_nothing_waits_for_the_old_time(library: Library) -> None:
    """Every time of every table that decides when something happens, two hours ahead."""
    for images in (8, 60):
        library.enqueue_as_server(library.insert([f"{images}-{n}.jpg" for n in range(images)]))
    library.sql("select autotag.register_worker(%s, 'h', autotag.schema_version(), true)", uuid.UUID(int=1))
    library.claim(str(uuid.UUID(int=1)), 1)  # makes the row of the workspace
    library.sql("insert into autotag.windows (workspace_id, request_type, requests, units) values (%s, 'realtime', '{1}', '{1}')"
                " on conflict (workspace_id, request_type) do update set requests = '{1}', units = '{1}'",
                library.member.workspace)  # fmt: skip
    library.sql("insert into autotag.unstored (task_id, workspace_id, result, next_at, kept_at)"
                " select id, workspace_id, '{}', now(), now() from autotag.tasks order by id limit 1")  # fmt: skip
    library.sql("insert into autotag.uploads (workspace_id, uploader, seal_at) values (%s, %s, now())",
                library.member.workspace, library.member.user)  # fmt: skip
    columns = library.sql(
        "select c.relname as table, a.attname as name, a.atttypid = 'timestamptz[]'::regtype as many from pg_attribute a"
        " join pg_class c on c.oid = a.attrelid where c.relnamespace = 'autotag'::regnamespace and c.relname = any (%s)"
        " and a.atttypid in ('timestamptz'::regtype, 'timestamptz[]'::regtype) order by 1, 2", list(WAITING))  # fmt: skip
    moved = [c for c in columns if f"{c['table']}.{c['name']}" not in {*STAY} - {"clock.ticked_at"}]
    assert {c["table"] for c in moved} == {*WAITING}
    for c in moved:
        value = "array[now() + interval '2 h']" if c["many"] else "now() + interval '2 h'"
        changed = library.sql(f"update autotag.{c['table']} set {c['name']} = {value} returning 1")
        assert changed, f"no row of {c['table']}"
    assert library.sql("select autotag.is_tick_due(autotag.now()) as due") == [{"due": True}]
    library.sql("select autotag.follow_clock()")
    left = [f"{c['table']}.{c['name']}" for c in moved if library.sql(
        f"select 1 from autotag.{c['table']} where {c['name'] + '[1]' if c['many'] else c['name']} > now() + interval '61 s'")]  # fmt: skip
    assert left == ["clock.ticked_at"]
    library.sql("select autotag.tick()")
    assert library.sql("select autotag.clock_setback(autotag.now()) as back") == [{"back": None}]
