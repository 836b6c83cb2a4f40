"""Claims while others commit, and what workers have not sent yet: what pgTAP cannot do, because it needs a trigger that commits in
between, or several logins."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.types.json import Jsonb

from lab.postgres import LocalPostgres

WORKER = "00000000-0000-4000-8000-00000000000a"
WORKSPACE = "00000000-0000-4000-8000-000000000001"
RESULT = {"tags": ["a"], "confidence": {"a": 1}, "caption": "c", "model": "m"}


@pytest.fixture
def session(postgres: LocalPostgres, database: str) -> Iterator[psycopg.Connection[Any]]:
    """A session in a database with twelve images, of which five are queued, and a worker."""
    with psycopg.connect(postgres.url("supabase_admin", database), autocommit=True) as connection:
        connection.execute(
            f"""
            update autotag.settings set test_clock = true, realtime_max_images = 20, realtime_requests_per_minute = 1000, realtime_tokens_per_minute = 10000000;
            insert into public.workspaces (id, name) values ('{WORKSPACE}', 'w');
            insert into public.assets (workspace_id, storage_path) select '{WORKSPACE}', '{WORKSPACE}/p' || i from generate_series(1, 12) i;
            select autotag.register_worker('{WORKER}', 'h', autotag.schema_version(), true);
            update autotag.provider_limits set proven_at = now(), has_rate_headers = true, tokens_per_minute = 10000000, tokens_left = 10000000;
            select public.enqueue_tagging(array(select id from public.assets order by storage_path limit 5))""".encode()
        )
        yield connection


def claim(session: psycopg.Connection[Any], number: int, slots: int = 100) -> list[int]:
    row = session.execute("select (autotag.claim(%s, %s, %s)).tasks", (WORKER, slots, number)).fetchone()
    assert row is not None
    tasks: list[int] = row[0]
    return tasks


def unsent(session: psycopg.Connection[Any]) -> int:
    row = session.execute("select unsent from autotag.workers where id = %s", (WORKER,)).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.parametrize("slots", [2, 5, 6, 100])
def test_an_upload_that_commits_while_a_claim_runs_is_left_to_the_next_claim(
    session: psycopg.Connection[Any], slots: int
) -> None:
    """A trigger stands for another session, which commits an upload after the claim has counted the new queues and
    before it releases images. (Each statement of a claim sees what was committed before it.)"""
    session.execute("""
        create table public.moments (n integer);
        create function public.upload() returns trigger language plpgsql security definer as $$
        begin
          if old.claim = 1 and new.claim = 2 and not exists (select from public.moments) then
            insert into public.moments values (1);
            perform public.enqueue_tagging(array(select id from public.assets where tagging_stage is null));
          end if;
          return null;
        end $$;
        create trigger upload after update on autotag.workers for each row execute function public.upload()""")
    assert len(claim(session, 1, 1)) == 1
    first = claim(session, 2, slots)
    assert session.execute("select count(*) from public.moments").fetchone() == (1,), "the upload came in between"
    assert len(first) == min(slots, 4), "only images of uploads that are counted"
    rest = claim(session, 3)
    assert len(first) + len(rest) == 11, "and nothing is forgotten"
    assert session.execute("select queued from autotag.workspaces").fetchone() == (0,)


def test_calls_of_a_lost_claim_are_not_waited_for(session: psycopg.Connection[Any]) -> None:
    """Calls of a lost claim will never be sent. If they still counted as unsent, the mirror of the provider's bucket
    would be too low for all."""
    claim(session, 1, 2)
    claim(session, 2, 2)
    assert unsent(session) == 4
    session.execute("select autotag.release_lost(%s, '{1,3}', '{}')", (WORKER,))
    assert unsent(session) == 2


@pytest.mark.parametrize("who", ["tick", "another login"])
def test_a_report_that_waited_counts_whoever_applies_it(session: psycopg.Connection[Any], who: str) -> None:
    """Sessions of pg_cron, PostgREST or a worker with another login also take the provider row, and then apply waiting
    reports."""
    tasks = claim(session, 1, 2)
    session.execute("update autotag.provider_limits set waiting_images = 3, waiting_at = autotag.now()")
    reports = [{"task": task, "attempt": 1, "result": RESULT} for task in tasks]
    session.execute(
        "select autotag.settle(%s, %s, %s, %s)",
        (WORKER, WORKSPACE, Jsonb(reports), Jsonb({"sent": 2, "sent_age": 0.1})),
    )
    assert session.execute("select sent from autotag.provider_reports").fetchone() == (2,), "it waits"
    assert unsent(session) == 2
    session.execute("create role other login superuser")
    try:
        session.execute("set session authorization other")
        session.execute("select autotag.lock_provider()" if who == "another login" else "select autotag.tick()")
    finally:
        session.execute("reset session authorization")
        session.execute("drop role other")
    assert unsent(session) == 0


def test_what_the_host_hangs_on_the_limits_of_workspaces_does_not_run_in_claims(
    session: psycopg.Connection[Any],
) -> None:
    """Claims write windows while they hold the provider row, which every workspace needs. So triggers and foreign keys
    of the host, which may raise errors, must not run then."""
    session.execute(
        """create function public.refuse() returns trigger language plpgsql as $$ begin raise 'no'; end $$"""
    )
    view = "public.workspace_rate_limits"
    allowed = []
    for statement in (
        *(
            f"create trigger t_{time}_{event}_{each} {time.replace('_', ' ')} {event} on {view}"
            f" for each {each} execute function public.refuse()"
            for time in ("before", "after", "instead_of")
            for event in ("insert", "update", "delete")
            for each in ("row", "statement")
        ),
        f"alter table {view} add foreign key (workspace_id) references public.workspaces on delete restrict",
        f"alter table {view} add check (cardinality(requests) < 1)",
        f"create unique index on {view} ((true))",
    ):
        with contextlib.suppress(psycopg.errors.WrongObjectType, psycopg.errors.FeatureNotSupported):
            session.execute(statement.encode())
            allowed.append(statement)
    assert len(allowed) == 9, "statement triggers, and instead of"
    assert len(claim(session, 1)) == 5
    assert session.execute("select requests from public.workspace_rate_limits").fetchone() == ([5],)
