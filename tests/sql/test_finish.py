"""Outcomes while the host or Realtime causes errors or waits. pgTAP cannot test this, because it needs a second session
or a superuser."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from lab.postgres import LocalPostgres
from support import PATIENCE

WORKER = "00000000-0000-4000-8000-00000000000a"
WORKSPACE = "00000000-0000-4000-8000-000000000001"
RESULT = {"tags": ["a"], "confidence": {"a": 1}, "caption": "c", "model": "m"}
IMAGES = 8
STORE = "select autotag.store_waiting(%(worker)s, %(workspace)s, autotag.pick_unstored(%(worker)s, %(workspace)s, 100))"


@pytest.fixture
def session(postgres: LocalPostgres, database: str) -> Iterator[psycopg.Connection[Any]]:
    """A session in a database where a worker holds all images of an upload."""
    with psycopg.connect(postgres.url("supabase_admin", database), autocommit=True) as connection:
        connection.execute(
            f"""
            update autotag.settings set realtime_max_images = 10, test_clock = true;
            insert into public.workspaces (id, name) values ('{WORKSPACE}', 'w');
            insert into public.assets (workspace_id, storage_path) select '{WORKSPACE}', '{WORKSPACE}/p' || i from generate_series(1, {IMAGES}) i;
            select autotag.register_worker('{WORKER}', 'h', autotag.schema_version(), true);
            update autotag.provider_limits set proven_at = now();
            select public.enqueue_tagging(array(select id from public.assets));
            select autotag.claim('{WORKER}', 100, 1)""".encode()
        )
        yield connection


def settle(session: psycopg.Connection[Any]) -> dict[str, Any]:
    reports = [
        {"task": task, "attempt": attempt, "result": RESULT}
        for task, attempt in session.execute("select id, attempt from autotag.tasks order by id").fetchall()
    ]
    row = session.execute("select autotag.settle(%s, %s, %s)", (WORKER, WORKSPACE, Jsonb(reports))).fetchone()
    assert row is not None
    reply: dict[str, Any] = row[0]
    return reply


def store(session: psycopg.Connection[Any]) -> int:
    session.execute("select set_config('autotag.now', (now() + interval '1 h')::text, false)")
    row = session.execute(STORE, {"worker": WORKER, "workspace": WORKSPACE}).fetchone()
    assert row is not None
    return int(row[0]["stored"])


def tagged(session: psycopg.Connection[Any]) -> int:
    row = session.execute("select count(*) from public.assets where tags = '{a}'").fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize(
    ("held", "stored"),
    [
        ("select from public.assets where storage_path like '%/p3' for update", IMAGES - 1),
        ("select from public.assets where storage_path like any ('{%/p1,%/p4,%/p8}') for share", IMAGES - 3),
        ("lock table public.assets in share mode", 0),
        ("select from autotag.jobs for no key update", 0),
    ],
    ids=["a row", "three rows", "the table", "the upload"],
)
def test_what_is_held_is_stored_later(
    postgres: LocalPostgres, database: str, session: psycopg.Connection[Any], held: str, stored: int
) -> None:
    """Every report is accepted. Free rows get their tags at once, locked rows once they are free."""
    with psycopg.connect(postgres.url("supabase_admin", database)) as tenant:
        tenant.execute(held.encode())
        assert settle(session) | {"held": None} == {"accepted": IMAGES, "busy": False, "notices": [], "held": None}
        assert tagged(session) == stored
        assert session.execute("select count(*), sum(tries) from autotag.unstored").fetchone() == (IMAGES - stored,) * 2
        assert store(session) == 0, "it is still held"
        tenant.rollback()
    session.execute("update autotag.unstored set next_at = '-infinity'")
    assert store(session) == IMAGES - stored
    assert tagged(session) == IMAGES
    assert session.execute("select completed, failed from autotag.jobs").fetchone() == (IMAGES, 0)
    assert session.execute("select sum(images) from autotag.usage").fetchone() == (IMAGES,), "each is paid once"


def test_an_outcome_is_not_lost_while_the_stage_of_its_image_is_reported(
    postgres: LocalPostgres, database: str, session: psycopg.Connection[Any]
) -> None:
    """A report of stages locks the tasks until it commits. The worker's settle() fails meanwhile, and works when it is
    repeated."""
    with psycopg.connect(postgres.url("supabase_admin", database)) as reporting:
        stages = [
            {"task": task, "attempt": attempt, "stage": "processing"}
            for task, attempt in session.execute("select id, attempt from autotag.tasks order by id limit 3").fetchall()
        ]
        reporting.execute("select autotag.report_stages(%s, %s, %s)", (WORKER, WORKSPACE, Jsonb(stages)))
        with pytest.raises(psycopg.errors.LockNotAvailable):
            settle(session)
        reporting.commit()
    assert settle(session)["accepted"] == IMAGES
    assert tagged(session) == IMAGES
    assert session.execute("select completed, failed from autotag.jobs").fetchone() == (IMAGES, 0)
    assert session.execute("select sum(images) from autotag.usage").fetchone() == (IMAGES,), "each is paid once"


def test_a_row_that_is_held_while_it_is_refused_is_tried_again(
    postgres: LocalPostgres, database: str, session: psycopg.Connection[Any]
) -> None:
    """A constraint refuses the tags of one row. When the row is to show that, the host's trigger waits for another
    transaction."""
    session.execute("""
        alter table public.assets add constraint no_tags check (tags is null or storage_path not like '%/p3');
        create table public.audit (n integer);
        insert into public.audit values (0);
        create function public.audit() returns trigger language plpgsql security definer as $$
        begin
          if new.tagging_stage = 'failed' then update public.audit set n = n + 1; end if;
          return new;
        end $$;
        create trigger audit before update on public.assets for each row execute function public.audit()""")
    with psycopg.connect(postgres.url("supabase_admin", database)) as tenant:
        tenant.execute("select from public.audit for update")
        assert settle(session)["accepted"] == IMAGES
        assert tagged(session) == IMAGES - 1
        tenant.rollback()
    assert store(session) == 1
    assert session.execute("select error_code from autotag.tasks").fetchall() == [("not_stored",)]
    assert session.execute("select n from public.audit").fetchone() == (1,), "the row says that it failed"


def raise_on(session: psycopg.Connection[Any], stage: str, state: str, path: str = "%/p3") -> None:
    """Creates a trigger of the host that raises this state when rows with such a path get this stage."""
    session.execute(
        f"""
        create or replace function public.raise_{stage}() returns trigger language plpgsql as $$
        begin
          raise exception 'the host says no' using errcode = '{state}';
        end $$;
        drop trigger if exists raise_{stage} on public.assets;
        create trigger raise_{stage} before update on public.assets for each row
          when (new.tagging_stage = '{stage}' and new.storage_path like '{path}') execute function public.raise_{stage}()""".encode()
    )


def tries_until_all_ended(session: psycopg.Connection[Any], most: int) -> tuple[int, list[str]]:
    """Tries the waiting outcomes until none waits. Returns the number of tries, and the log events of the last one."""
    for tries in range(1, most + 1):
        session.execute("update autotag.unstored set next_at = '-infinity'")
        row = session.execute(STORE, {"worker": WORKER, "workspace": WORKSPACE}).fetchone()
        assert row is not None
        if session.execute("select from autotag.unstored").fetchone() is None:
            return tries, [notice["event"] for notice in row[0]["notices"]]
    raise AssertionError(f"an outcome still waits after {most} tries")


@pytest.mark.parametrize(("state", "tries"), [
    ("42703", 8), ("0A000", 8), ("53100", 20), ("58030", 20), ("XX001", 20), ("55P03", 64), ("40001", 64), ("40P01", 64),
])  # fmt: skip
def test_an_error_that_may_pass_is_waited_for_but_not_for_ever(
    session: psycopg.Connection[Any], state: str, tries: int
) -> None:
    """The other images get their tags at once, and every job ends."""
    raise_on(session, "completed", state)
    reply = settle(session)
    assert tagged(session) == IMAGES - 1
    assert [notice["event"] for notice in reply["notices"]] == ["store_failed"]
    assert "the host says no" in reply["notices"][0]["notice"]
    assert tries_until_all_ended(session, 70) == (tries, ["not_stored"])
    assert session.execute("select error_code from autotag.tasks").fetchall() == [("not_stored",)]
    assert session.execute("select finished_at is not null from autotag.jobs").fetchone() == (True,)


@pytest.mark.parametrize("state", ["AT001", "AT002", "PT409", "PT429", "0L000"])
def test_an_error_of_autotags_own_is_the_rows_refusal_if_the_host_raises_it(
    session: psycopg.Connection[Any], state: str
) -> None:
    """AT001 means that a picture was replaced. If that was believed of the host, it would be requested and paid for
    again."""
    raise_on(session, "completed", state)
    assert [notice["event"] for notice in settle(session)["notices"]] == ["not_stored"]
    assert tagged(session) == IMAGES - 1
    assert session.execute("select error_code from autotag.tasks").fetchall() == [("not_stored",)]


@pytest.mark.parametrize("state", ["40001", "55P03"])
def test_images_that_all_raise_a_locks_error_end_too(session: psycopg.Connection[Any], state: str) -> None:
    """Although a try gives up after a few waits for locks, every image is tried and ends."""
    raise_on(session, "completed", state, "%")
    settle(session)
    tries_until_all_ended(session, 70)
    assert session.execute("select completed, failed from autotag.jobs").fetchone() == (0, IMAGES)


@pytest.mark.parametrize("state", ["42703", "53100", "40001"])
def test_a_row_that_was_held_for_long_has_all_its_patience_left(
    postgres: LocalPostgres, database: str, session: psycopg.Connection[Any], state: str
) -> None:
    with psycopg.connect(postgres.url("supabase_admin", database)) as tenant:
        tenant.execute("select from public.assets where storage_path like '%/p3' for update")
        settle(session)
        for _ in range(70):
            session.execute("update autotag.unstored set next_at = '-infinity'")
            assert store(session) == 0
        tenant.rollback()
    raise_on(session, "completed", state)
    for _ in range(8):
        session.execute("update autotag.unstored set next_at = '-infinity'")
        assert store(session) == 0, "it was held, and raises for the first times now"
    session.execute("drop trigger raise_completed on public.assets")
    session.execute("update autotag.unstored set next_at = '-infinity'")
    assert store(session) == 1
    assert tagged(session) == IMAGES


@pytest.mark.parametrize("state", ["55P03", "40001", "40P01"])
def test_a_row_that_cannot_even_say_that_it_failed_ends(session: psycopg.Connection[Any], state: str) -> None:
    raise_on(session, "completed", "P0001")
    raise_on(session, "failed", state)
    assert [notice["event"] for notice in settle(session)["notices"]] == ["store_failed"], "that may pass"
    assert tries_until_all_ended(session, 70) == (64, ["not_stored"])
    assert session.execute("select completed, failed from autotag.jobs").fetchone() == (IMAGES - 1, 1)


def test_a_broadcast_that_raises_undoes_nothing(session: psycopg.Connection[Any]) -> None:
    session.execute("""
        create or replace function realtime.send(payload jsonb, event text, topic text, private boolean default true) returns void
        language plpgsql as $$ begin raise exception 'no partition of relation "messages" found for row'; end $$""")
    assert settle(session) | {"held": None} == {"accepted": IMAGES, "busy": False, "notices": [], "held": None}
    assert tagged(session) == IMAGES
    assert session.execute("select finished_at is not null from autotag.jobs").fetchone() == (True,)


def test_reports_of_the_provider_that_raise_stop_no_claim(session: psycopg.Connection[Any]) -> None:
    """Such a report is deleted. Otherwise it would raise an error in every claim."""
    session.execute(
        "insert into autotag.provider_reports (worker_id, at, tokens) values (%s, now(), 9000000000000000000), (%s, now(), 5)",
        (WORKER, WORKER),
    )
    session.execute("alter table autotag.provider_limits add constraint few check (tokens_left < 1e12)")
    assert session.execute("select (autotag.claim(%s, 1, 2)).tasks", (WORKER,)).fetchone() == ([],)
    assert session.execute("select count(*) from autotag.provider_reports").fetchone() == (0,)


@pytest.mark.parametrize(("asked", "failures"), [("before", 0), ("after", 1)])
def test_a_second_account_error_counts_if_others_succeeded_before_it_was_asked(
    session: psycopg.Connection[Any], asked: str, failures: int
) -> None:
    """If the image was asked before the others succeeded, its late error does not count, although tagging works again
    meanwhile."""
    sign = {"before": "+", "after": "-"}[asked]
    session.execute(
        "update autotag.tasks set error_code = 'insufficient_quota' where id = (select min(id) from autotag.tasks)"
    )
    session.execute(
        f"update autotag.provider_limits set proven_at = (select min(reserved_at) from autotag.tasks) {sign} interval '1 s'".encode()
    )
    error = {"kind": "account", "code": "insufficient_quota", "message": "m", "origin": "provider"}
    row = session.execute("select id, attempt from autotag.tasks order by id limit 1").fetchone()
    assert row is not None
    report = [{"task": row[0], "attempt": row[1], "error": error}]
    session.execute("select autotag.settle(%s, %s, %s)", (WORKER, WORKSPACE, Jsonb(report)))
    assert session.execute("select failures from autotag.tasks where id = %s", (row[0],)).fetchone() == (failures,)


def test_the_list_of_what_waits_does_not_read_all_of_it(session: psycopg.Connection[Any]) -> None:
    """All workers read this list whenever an outcome is kept, and a workspace with slow rows may have many outcomes. So
    it reads few of their rows."""
    session.execute("""
        insert into autotag.unstored (task_id, workspace_id, result, next_at, kept_at)
        select i, md5((i % 3)::text)::uuid, '{}', autotag.now() + case i % 3 when 0 then -i when 1 then -1 else i end * interval '1 s',
          now() from generate_series(1, 6000) i""")
    session.execute("analyze autotag.unstored")
    read = "select coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) from pg_stat_xact_user_tables where relid = 'autotag.unstored'::regclass"
    with session.transaction():
        row = session.execute("select workspaces::text[], wait from autotag.list_unstored(%s)", (WORKER,)).fetchone()
        rows = session.execute(read).fetchone()
    due = session.execute("select md5('0')::uuid::text, md5('1')::uuid::text").fetchone()
    assert row is not None
    assert rows is not None
    assert due is not None
    assert row[0] == list(due), "the one that waits longest comes first"
    assert 0 < row[1] <= 2
    assert rows[0] < 20


@pytest.mark.parametrize(("learns", "news"), [
    ("has_rate_headers = null", True),
    ("requests_per_minute = 400", True),
    ("requests_per_day = null", True),
    ("requests_per_day = 10000", False),
])  # fmt: skip
def test_a_report_that_shows_something_new_does_not_wait_for_a_claim(
    session: psycopg.Connection[Any], learns: str, news: bool
) -> None:
    """While images are queued, only routine reports wait for the next claim."""
    session.execute(
        "update autotag.provider_limits set waiting_images = 1, waiting_at = autotag.now(), has_rate_headers = true"
    )
    session.execute(f"update autotag.provider_limits set {learns}".encode())
    rows = session.execute("select id, attempt from autotag.tasks order by id limit 1").fetchall()
    reports = [{"task": task, "attempt": attempt, "result": RESULT} for task, attempt in rows]
    seen = {"requests_limit": 500, "tokens_limit": 200_000, "day_limit": 10_000, "tokens_left": 9}
    row = session.execute(
        "select autotag.settle(%s, %s, %s, %s)", (WORKER, WORKSPACE, Jsonb(reports), Jsonb(seen))
    ).fetchone()
    assert row is not None
    left = session.execute("select count(*) from autotag.provider_reports").fetchone()
    assert left == (0 if news else 1,)
    told = [notice["event"] for notice in row[0]["notices"]]
    assert told == (["provider_limits_changed"] if news and "has_rate" not in learns else [])


SECOND = "00000000-0000-4000-8000-00000000000b"
#: The host's rows are slow while somebody holds this lock, as with a trigger that waits for another server.
GATE = 42
SLOW_TRIGGER = f"""
    create function public.wait() returns trigger language plpgsql as $$
    begin
      while exists (select from pg_locks where locktype = 'advisory' and objid = {GATE}) loop
        perform pg_sleep(0.01);
      end loop;
      return new;
    end $$;
    create trigger wait before update on public.assets for each row
      when (new.tagging_stage in ('completed', 'failed')) execute function public.wait()"""
OUTCOMES = {
    "tags": {"result": RESULT},
    "errors that a quota judges": {"error": {"kind": "image", "code": "bad_answer", "message": "m", "retry": True}},
}


@pytest.mark.parametrize("outcome", OUTCOMES)
@pytest.mark.parametrize("keep", [False, True], ids=["store", "keep"])
def test_answers_are_durable_while_another_worker_waits_for_the_same_tenants_rows(
    postgres: LocalPostgres, database: str, session: psycopg.Connection[Any], outcome: str, keep: bool
) -> None:
    """A workspace's usage is one row a day. A transaction that has written it must not go on to write the host's
    rows."""
    session.execute(SLOW_TRIGGER)
    session.execute("insert into autotag.quotas (scope, period, max_images) values ('workspace', 'day', 0)")
    session.execute("select autotag.register_worker(%s, 'h', autotag.schema_version(), true)", (SECOND,))
    session.execute("update autotag.tasks set worker_id = %s where id %% 2 = 1", (SECOND,))
    usage = {"input": 700, "output": 100, "model": "m", "tier": "default"}
    reports = {
        worker: Jsonb([
            {"task": task, "attempt": attempt, "called": True, "usage": usage, **(OUTCOMES[outcome] if worker == WORKER else {"result": RESULT})}
            for task, attempt in session.execute("select id, attempt from autotag.tasks where worker_id = %s", (worker,)).fetchall()
        ])
        for worker in (WORKER, SECOND)
    }  # fmt: skip
    with psycopg.connect(postgres.url("supabase_admin", database), autocommit=True) as other:
        other.execute("select pg_advisory_lock(%s)", (GATE,))
        slow = threading.Thread(
            target=session.execute, args=("select autotag.settle(%s, %s, %s)", (WORKER, WORKSPACE, reports[WORKER]))
        )
        slow.start()
        sleeps = "select wait_event = 'PgSleep' from pg_stat_activity where pid = %s"
        try:
            deadline = time.monotonic() + PATIENCE
            while other.execute(sleeps, (session.info.backend_pid,)).fetchone() != (True,):
                assert time.monotonic() < deadline, "the first settle does not write the host's rows"
            other.execute("select set_config('statement_timeout', '5s', false)")
            row = other.execute(
                "select autotag.settle(%s, %s, %s, null, %s)", (SECOND, WORKSPACE, reports[SECOND], keep)
            ).fetchone()
            assert row is not None
            assert row[0]["accepted"] == IMAGES // 2
            assert slow.is_alive(), "this shows nothing"
        finally:
            other.execute("select pg_advisory_unlock(%s)", (GATE,))
            slow.join(PATIENCE)
    assert session.execute("select sum(requests) from autotag.usage").fetchone() == (IMAGES,), "each is paid once"


def test_the_usage_of_a_batch_is_added_after_the_hosts_rows_are_written(session: psycopg.Connection[Any]) -> None:
    """The host's trigger does not see the usage yet. So while it runs, the transaction holds no row of usage for which
    another session would wait."""
    session.execute("""
        create table public.seen (requests bigint);
        create function public.look() returns trigger language plpgsql security definer as $$
        begin
          insert into public.seen select coalesce(sum(u.requests), 0) from autotag.usage u;
          return new;
        end $$;
        create trigger look before update on public.assets for each row
          when (new.tagging_stage in ('completed', 'failed')) execute function public.look()""")
    session.execute("insert into autotag.quotas (scope, period, max_images) values ('workspace', 'day', 0)")
    row = session.execute(
        """
        with made as (
          insert into autotag.batches (job_id, workspace_id, ordinal, image_count, created_at, state, worker_id, attempt, asked_at)
          select j.id, j.workspace_id, 1, %s, now(), 'preparing', %s, 1, now() from autotag.jobs j returning id)
        select id from made""",
        (IMAGES, WORKER),
    ).fetchone()
    assert row is not None
    session.execute("update autotag.tasks set batch_id = %s, worker_id = null, claim = null, lane = 'batch'", row)
    usage = {"input": 700, "output": 100, "model": "m", "tier": "default"}
    bad = {"error": {"kind": "image", "code": "bad_answer", "message": "m", "retry": True}}
    answers = [
        {"task": task, "usage": usage, **(bad if task % 2 else {"result": RESULT})}
        for (task,) in session.execute("select id from autotag.tasks").fetchall()
    ]
    session.execute("select autotag.batch_answers(%s, %s, 1, %s)", (WORKER, row[0], Jsonb(answers)))
    assert session.execute("select distinct requests from public.seen").fetchall() == [(0,)]
    assert session.execute("select sum(requests), sum(images) from autotag.usage").fetchone() == (IMAGES, IMAGES // 2)
    assert session.execute("select distinct error_code from autotag.tasks").fetchall() == [("quota_exceeded",)]
