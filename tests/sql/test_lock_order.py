"""Functions that write take row locks in one order (supabase/schemas/schema.sql), so that no two of them can wait for each other.

Each function runs again and again while somebody else holds one row. When it waits for that row, every row that it has
locked by then is one that it holds while it waits: an edge from one table to another. Two functions can deadlock only
where the edges of all of them make a circle.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import psycopg
import pytest

from lab.postgres import LocalPostgres
from support import PATIENCE

#: Tables whose rows are locked, in the documented order, each with what its rows are locked in the order of.
DOCUMENTED = {
    "autotag.provider_limits": "id",
    "autotag.workers": "id",
    "autotag.workspaces": "workspace_id",
    "public.workspace_rate_limits": "(workspace_id, request_type)",
    "autotag.jobs": "id",
    "autotag.batches": "id",
    "autotag.tasks": "id",
    "public.assets": "id",
}
TABLES = DOCUMENTED | {"autotag.queues": "job_id", "autotag.uploads": "id"}
#: What a row is held with: what deletes it, and what changes it (a share of the key then goes on).
MODES = ("for update", "for no key update")
ROWS = 6  # of each table that are held, one after the other: all workspaces and jobs of the scene, and some images
WORKER, DEAD = "00000000-0000-4000-8000-00000000000a", "00000000-0000-4000-8000-00000000000d"
RESULT = """'{"result": {"tags": ["a"], "confidence": {"a": 1}, "caption": "c", "model": "m"},
  "usage": {"input": 700, "cached": 0, "cache_write": 0, "output": 100, "reasoning": 0, "model": "m", "tier": "default"}}'::jsonb"""
ERROR = """'{"error": {"kind": "transient", "code": "x", "message": "m", "origin": "provider"}}'::jsonb"""
STAGE = """'{"stage": "processing"}'::jsonb"""
SENT = """'{"sent": 1, "sent_age": 0}'"""


def reports(what: str) -> str:
    """SQL for the same report of every single call that the worker holds; the last comes first."""
    return (
        f"(select jsonb_agg(jsonb_build_object('task', t.id, 'attempt', t.attempt) || {what} order by t.id desc)"
        f" from autotag.tasks t where t.worker_id = '{WORKER}')"
    )


BATCH = f"(select id from autotag.batches where worker_id = '{WORKER}')"
LINES = f"(select jsonb_agg(jsonb_build_object('task', t.id) || {RESULT} order by t.id desc) from autotag.tasks t where t.batch_id = {BATCH})"
#: The last workspace, in which nothing was ever tagged, its images, and the first one that has work.
LAST = "(select id from public.workspaces order by id desc limit 1)"
FIRST = "(select workspace_id from autotag.workspaces order by workspace_id limit 1)"
ASSETS = f"(select array_agg(id order by id desc) from public.assets where workspace_id = {LAST})"
SEEN = '[{"id": "batch_1", "status": "completed", "total": 11, "done": 11}]'
#: What each of them does, in a state in which it has something to do.
SCENARIOS = {
    "enqueue": f"select public.enqueue_tagging({ASSETS})",
    "cancel a realtime job": "select public.cancel_tagging(j.id) from autotag.jobs j where j.strategy like 'realtime%' order by j.id desc limit 1",
    "cancel a batch job": "select public.cancel_tagging(b.job_id) from autotag.batches b where b.state = 'planned'",
    "retry": "select public.retry_tagging(job_id) from autotag.tasks where stage = 'failed' limit 1",
    "claim": f"select autotag.claim('{WORKER}', 20)",
    "claim_batches": f"select autotag.claim_batches('{WORKER}', 5)",
    "report_stages": f"select autotag.report_stages('{WORKER}', {reports(STAGE)}, {SENT})",
    "settle": f"select autotag.settle('{WORKER}', {reports(RESULT)}, {SENT})",
    "settle errors": f"select autotag.settle('{WORKER}', {reports(ERROR)})",
    "batch_step": f"select autotag.batch_step('{WORKER}', {BATCH}, 1, 'uploading')",
    "report_batch_failure": f"select autotag.report_batch_failure('{WORKER}', {BATCH}, 1, {ERROR} -> 'error')",
    "record_poll": f"select autotag.record_poll('{WORKER}', '{SEEN}')",
    "batch_answers": f"select autotag.batch_answers('{WORKER}', {BATCH}, 1, {LINES})",
    "batch_finish": f"select autotag.batch_finish('{WORKER}', {BATCH}, 1)",
    "register_worker": f"select autotag.register_worker('{WORKER}', 'h', autotag.schema_version(), true, 'http://p', 'k')",
    "heartbeat": f"select autotag.heartbeat('{WORKER}')",
    "release_worker": f"select autotag.release_worker('{WORKER}')",
    "release_unacknowledged": f"select autotag.release_unacknowledged('{WORKER}', '{{}}', '{{}}')",
    "seal_uploads": f"select autotag.seal_uploads('{WORKER}')",
    "tick": "select autotag.tick()",
    "housekeeping": "select autotag.housekeeping()",
    "backfill": f"select autotag.backfill({LAST}, true, null, 3)",
    "check_rate_limit": f"select public.check_rate_limit({FIRST}, 'realtime', 1)",
}


@dataclass(frozen=True, order=True)
class Edge:
    """A function held a row of one table while it waited for a row of another, or for an earlier one of the same."""

    held: str
    wanted: str
    function: str

    def __str__(self) -> str:
        return f"{self.function} holds {self.held} and waits for {self.wanted}"


@dataclass
class Server:
    """Three sessions in one database: one holds a row, one runs a function, and one looks."""

    holder: psycopg.Connection[tuple[object, ...]]
    runner: psycopg.Connection[tuple[object, ...]]
    looker: psycopg.Connection[tuple[object, ...]]

    def edges(self, functions: Iterable[str] = SCENARIOS, tables: Iterable[str] = TABLES) -> set[Edge]:
        """What functions hold while they wait, for each row of these tables that they wait for."""
        found = set()
        for function, wanted, mode in itertools.product(functions, tables, MODES):
            for place, rank in self.rows(wanted):
                with self.holder.transaction(force_rollback=True):
                    self.holder.execute(f"select from {wanted} where ctid = %s::tid {mode}".encode(), (place,))
                    held = self.held_by_runner(SCENARIOS[function])
                for table, ranks in held.items():
                    if (table != wanted and ranks) or (table == wanted and any(other > rank for other in ranks)):
                        found.add(Edge(table, wanted, function))
        return found

    def rows(self, table: str) -> list[tuple[str, int]]:
        """Some rows of a table: where they are, and the how many-th each of them is."""
        found = self.looker.execute(
            f"select ctid::text, row_number() over (order by {TABLES[table]}) from {table} order by 2".encode()
        ).fetchall()
        chosen = sorted({round(i * (len(found) - 1) / (ROWS - 1)) for i in range(ROWS)}) if found else []
        return [(str(found[i][0]), int(str(found[i][1]))) for i in chosen]

    def held_by_runner(self, statement: str) -> dict[str, list[int]]:
        """Runs a statement until it waits or has ended; if it waits, the rows that it has locked: table -> which."""
        failed: list[psycopg.Error] = []

        def run() -> None:
            try:
                with self.runner.transaction(force_rollback=True):
                    self.runner.execute(statement.encode())
            except psycopg.errors.QueryCanceled:
                pass
            except psycopg.Error as error:
                failed.append(error)

        running = threading.Thread(target=run)
        running.start()
        held: dict[str, list[int]] = {}
        deadline = time.monotonic() + PATIENCE
        while running.is_alive():
            assert time.monotonic() < deadline, f"{statement} neither ends nor waits"
            if self.waits():
                held = {table: self.locked(table) for table in TABLES}
                self.runner.cancel_safe()
                running.join()
            running.join(0.002)
        assert failed == [], f"{statement}: {failed}"
        return held

    def waits(self) -> bool:
        """Whether the runner waits for a row that somebody holds."""
        return self.looker.execute(
            "select %s = any (pg_blocking_pids(%s))", (self.holder.info.backend_pid, self.runner.info.backend_pid)
        ).fetchone() == (True,)

    def locked(self, table: str) -> list[int]:
        """The rows of a table that are locked: the how many-th each of them is."""
        found = self.looker.execute(
            f"with free as materialized (select ctid from {table} for update skip locked),"
            f" ranked as (select ctid, row_number() over (order by {TABLES[table]}) as rank from {table})"
            f" select rank from ranked where ctid not in (select ctid from free)".encode()
        ).fetchall()
        return [int(str(rank)) for (rank,) in found]


#: Against the order, and no danger among autotag's own functions:
COVERED = {
    # From one workspace to the next. The tasks that it has released by then were queued, and nobody locks those without
    # their workspace's lock, which claim holds.
    Edge("autotag.tasks", "public.workspace_rate_limits", "claim"),
    # One answer after another, in the order of the plan: the jobs of these tasks are locked, so nobody else locks the tasks.
    *(Edge("autotag.tasks", "autotag.tasks", function) for function in ("settle", "settle errors")),
    # Images in any order. Only one live task names an image, and a workspace's uploads begin one by one.
    *(Edge("public.assets", "public.assets", function) for function in SCENARIOS),
}


@pytest.fixture
def server(postgres: LocalPostgres, database: str) -> Iterator[Server]:
    url = postgres.url("supabase_admin", database)
    with contextlib.ExitStack() as stack:
        sessions = [stack.enter_context(psycopg.connect(url, autocommit=True)) for _ in range(3)]
        set_the_scene(sessions[0])
        yield Server(*sessions)


def set_the_scene(connection: psycopg.Connection[tuple[object, ...]]) -> None:
    """Something to do for each of the functions: work of every kind in every state."""
    connection.execute(
        f"""
      update autotag.settings set realtime_max_images = 10, chunk_max_images = 10, express_images = 0;
      insert into public.workspaces (name) select 'w' || n from generate_series(1, 8) n;
      insert into public.assets (workspace_id, storage_path)
      select w.id, w.id || '/' || n from public.workspaces w, generate_series(1, 11) n;
      do $$
      declare
        v_workspaces uuid[] := array(select id from public.workspaces order by id);
      begin
        perform autotag.register_worker(w::uuid, 'h', autotag.schema_version(), true, 'http://p', 'k')
        from unnest(array['{DEAD}', '{WORKER}']) w;
        update autotag.provider_limits set proven_at = now(), next_poll_at = '-infinity';
        for i in 1 .. 6 loop
          perform autotag.lock_workspace(v_workspaces[i]);
          perform autotag.start_job(v_workspaces[i], null, array(
            select a.id from public.assets a where a.workspace_id = v_workspaces[i] order by a.id limit case when i < 4 then 8 else 11 end));
          if i = 4 or i = 5 then
            perform autotag.claim_batches('{WORKER}', 1);
            update autotag.batches set state = 'submitted', worker_id = null, openai_batch_id = 'batch_1', openai_status = 'in_progress',
              submitted_at = now(), running_at = now(), request_total = 11, predicted_seconds = 60 where i = 4 and state = 'preparing';
          end if;
        end loop;
        perform autotag.claim('{DEAD}', 6);
        perform autotag.claim('{WORKER}', 9);
        update autotag.workers set lease_until = now() - interval '1 s' where id = '{DEAD}';
        update autotag.tasks set stage = 'failed', finished_at = now(), worker_id = null
        where id = (select min(id) from autotag.tasks where worker_id = '{WORKER}');
        update autotag.clock set ticked_at = '-infinity';
        insert into autotag.arrivals (asset_id, workspace_id, uploader, arrived_at)
        select id, workspace_id, '00000000-0000-0000-0000-000000000000', now() - interval '1 h' from public.assets
        where workspace_id = v_workspaces[8];
      end $$""".encode()
    )


def test_every_scenario_has_something_to_do(server: Server) -> None:
    """What does nothing locks nothing, and would pass."""
    idle = []
    for name, statement in SCENARIOS.items():
        with server.runner.transaction(force_rollback=True):
            server.runner.execute(statement.encode())
            if not any(server.locked(table) for table in TABLES):
                idle.append(name)
    assert idle == []


def against_the_order(edges: set[Edge]) -> list[str]:
    order = list(DOCUMENTED)
    return [
        str(edge) for edge in sorted(edges)
        if order.index(edge.held) >= order.index(edge.wanted) and edge not in COVERED
    ]  # fmt: skip


def test_functions_lock_in_the_documented_order(server: Server) -> None:
    edges = {edge for edge in server.edges(tables=DOCUMENTED) if edge.held in DOCUMENTED}
    assert len(edges) > 50, "functions wait at all"
    assert against_the_order(edges) == []


def test_locks_in_another_order_are_noticed(server: Server) -> None:
    """Cancelling with its first two locks swapped."""
    row = server.looker.execute("select pg_get_functiondef('autotag.cancel'::regproc)").fetchone()
    assert row is not None
    source = str(row[0])
    workspace = "perform from autotag.workspaces w where w.workspace_id = v_job.workspace_id for update;"
    job = "select * into v_job from autotag.jobs j where j.id = p_job_id for update;"
    assert workspace in source
    assert job in source
    swapped = source.replace(job, "").replace(workspace, f"{job} {workspace}")
    server.looker.execute(swapped.encode())
    name = "cancel a realtime job"
    found = server.edges([name], ["autotag.workspaces"])
    assert against_the_order(found) == [f"{name} holds autotag.jobs and waits for autotag.workspaces"]
