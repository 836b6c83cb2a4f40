"""The rules of schema.sql's "Locks".

A transaction that holds the provider row waits for no lock that a tenant's transaction can hold, and nobody who works for all
tenants waits long for one. Functions that write end without a deadlock, whichever two of them meet.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest

from conftest import TEMPLATE, copied_database
from lab.postgres import LocalPostgres
from support import PATIENCE

WORKER, DEAD = "00000000-0000-4000-8000-00000000000a", "00000000-0000-4000-8000-00000000000d"
RESULT = """'{"result": {"tags": ["a"], "confidence": {"a": 1}, "caption": "c", "model": "m"},
  "usage": {"input": 700, "cached": 0, "cache_write": 0, "output": 100, "reasoning": 0, "model": "m", "tier": "default"}}'::jsonb"""
ERROR = """'{"error": {"kind": "transient", "code": "x", "message": "m", "origin": "provider"}}'::jsonb"""
STAGE = """'{"stage": "processing"}'::jsonb"""
SENT = """'{"sent": 1, "sent_age": 0, "requests_limit": 400}'"""
QUESTION = "(select question from autotag.provider_limits)"


def workspace(n: int) -> str:
    """SQL for the n-th workspace of the scene (set_the_scene says what each has)."""
    return f"(select id from public.workspaces where name = 'w{n}')"


def reports(n: int, what: str) -> str:
    """SQL for the same report of every single call of a workspace that the worker holds; the last comes first."""
    return (
        f"(select jsonb_agg(jsonb_build_object('task', t.id, 'attempt', t.attempt) || {what} order by t.id desc)"
        f" from autotag.tasks t where t.worker_id = '{WORKER}' and t.workspace_id = {workspace(n)})"
    )


BATCH = f"(select id from autotag.batches where worker_id = '{WORKER}' and state = 'preparing')"
LINES = f"(select jsonb_agg(jsonb_build_object('task', t.id) || {RESULT} order by t.id desc) from autotag.tasks t where t.batch_id = {BATCH})"
ASSETS = f"(select array_agg(id order by id desc) from public.assets where workspace_id = {workspace(8)})"
UNSTORED = f"array(select task_id from autotag.unstored where workspace_id = {workspace(3)} order by task_id desc)"
SEEN = '[{"id": "batch_1", "status": "failed", "total": 11, "done": 11, "error_kind": "account", "error": "e"}]'
REPORT = f"""
  (select jsonb_build_object('reserved', 1000, 'reserved_at', w.admitted_at[1], 'cap', 100, 'called', true) || {ERROR}
   from public.workspace_rate_limits w where w.workspace_id = {workspace(2)} and w.request_type = 'realtime')"""
#: What tenants call: it may wait for other calls of the same tenant.
TENANTS = {
    "enqueue": f"select public.enqueue_tagging({ASSETS})",
    "enqueue where images are tagged": f"select public.enqueue_tagging(array(select id from public.assets where workspace_id = {workspace(1)} order by id desc))",
    "cancel single calls": f"select public.cancel_tagging(id) from autotag.jobs where workspace_id = {workspace(1)}",
    "cancel a planned batch": f"select public.cancel_tagging(id) from autotag.jobs where workspace_id = {workspace(6)}",
    "cancel a submitted batch": f"select public.cancel_tagging(id) from autotag.jobs where workspace_id = {workspace(4)}",
    "cancel a batch that is prepared": f"select public.cancel_tagging(id) from autotag.jobs where workspace_id = {workspace(5)}",
    "retry": "select public.retry_tagging(job_id) from autotag.tasks where stage = 'failed' limit 1",
    "check_rate_limit": f"select public.check_rate_limit({workspace(2)}, 'realtime', 1)",
    "check_rate_limit of batches": f"select public.check_rate_limit({workspace(6)}, 'batch', 1)",
}  # fmt: skip
#: What works for all of them, in a state in which it has something to do.
SERVANTS = {
    "claim": f"select autotag.claim('{WORKER}', 20, 9)",
    "claim_batches": f"select autotag.claim_batches('{WORKER}', 5, 9)",
    "report_stages": f"select autotag.report_stages('{WORKER}', {workspace(1)}, {reports(1, STAGE)}, {SENT})",
    "settle": f"select autotag.settle('{WORKER}', {workspace(1)}, {reports(1, RESULT)}, {SENT})",
    "settle another workspace": f"select autotag.settle('{WORKER}', {workspace(2)}, {reports(2, RESULT)}, {SENT})",
    "settle errors": f"select autotag.settle('{WORKER}', {workspace(1)}, {reports(1, ERROR)})",
    "settle and keep": f"select autotag.settle('{WORKER}', {workspace(1)}, {reports(1, RESULT)}, null, true)",
    "store_waiting": f"select autotag.store_waiting('{WORKER}', {workspace(3)}, {UNSTORED})",
    "postpone_stores": f"select autotag.postpone_stores('{WORKER}', {workspace(3)}, ({UNSTORED})[:1])",
    "batch_step": f"select autotag.batch_step('{WORKER}', {BATCH}, 1, 'uploading')",
    "batch_split": f"select autotag.batch_split('{WORKER}', {BATCH}, 1, (select min(id) from autotag.tasks where batch_id = {BATCH}))",
    "batch_submitted": f"select autotag.batch_submitted('{WORKER}', id, 1, 'batch_2', 'validating', 'f') from autotag.batches where state = 'creating'",
    "show_batch": f"select autotag.show_batch('{WORKER}', id, 0, 100) from autotag.batches where state = 'submitted'",
    "report_batch_failure": f"select autotag.report_batch_failure('{WORKER}', {BATCH}, 1, {ERROR} -> 'error')",
    "report an account error of a batch":
        f"""select autotag.report_batch_failure('{WORKER}', {BATCH}, 1, '{{"kind": "account", "code": "x", "message": "m"}}')""",
    "report a refused batch":
        f"""select autotag.report_batch_failure('{WORKER}', {BATCH}, 1, '{{"kind": "image", "code": "x", "message": "m"}}')""",
    "batch_answers": f"select autotag.batch_answers('{WORKER}', {BATCH}, 1, {LINES})",
    "batch_finish": f"select autotag.batch_finish('{WORKER}', {BATCH}, 1)",
    "record_poll": f"select autotag.record_poll('{WORKER}', '{SEEN}')",
    "report_poll_failure": f"""select autotag.report_poll_failure('{WORKER}', '{{"kind": "account", "code": "x", "message": "m"}}')""",
    "provider_checked": f"""select autotag.provider_checked('{WORKER}', '{{"batches": true}}')""",
    "files_deleted": f"select autotag.files_deleted('{WORKER}', array['file_1'])",
    "receive_webhook": "select autotag.receive_webhook('wh_1', 'batch.completed', 'batch_1')",
    "register_worker": f"select autotag.register_worker('{WORKER}', 'h', autotag.schema_version(), true, 'http://p', 'other key')",
    "register a dead worker": f"select autotag.register_worker('{DEAD}', 'h', autotag.schema_version(), true, 'http://p', 'other key')",
    "heartbeat": f"select autotag.heartbeat('{WORKER}', '{{1}}', '{{1}}')",
    "heartbeat of a dead worker": f"select autotag.heartbeat('{DEAD}', '{{1}}', '{{1}}')",
    "settle a dead worker's": f"select autotag.settle('{DEAD}', {workspace(1)}, '[]', {SENT})",
    "release_worker": f"select autotag.release_worker('{WORKER}')",
    "release_lost": f"select autotag.release_lost('{WORKER}', '{{}}', '{{}}')",
    "seal_uploads": f"select autotag.seal_uploads('{WORKER}')",
    "tick": "select autotag.tick()",
    "tick_if_due": "select autotag.tick_if_due()",
    "housekeeping": "select autotag.housekeeping()",
    "admit_comparison": f"""
      update autotag.provider_limits set account_error = 'x', account_error_from = 'provider';
      select autotag.admit_comparison({workspace(2)}, {QUESTION} || '{{"model": "gpt-5"}}')""",
    "settle_comparison": f"select autotag.settle_comparison({workspace(2)}, {QUESTION}, {REPORT}, {SENT})",
    "forget_provider": "select autotag.forget_provider()",
}  # fmt: skip
#: An operator's: it waits for the window of its own workspace, and holds nothing of others meanwhile.
PATIENT = {"settle_comparison"}
EVERYTHING = TENANTS | SERVANTS
#: What a tenant's transaction can hold as long as it likes.
HELD_BY_TENANTS = {
    "assets": "select from public.assets for update",
    "the table of assets": "lock table public.assets in access exclusive mode",
    "jobs": "select from autotag.jobs for no key update",
    "batches": "select from autotag.batches where state <> 'done' for no key update",
    "outcomes that are written": f"""
      select pg_advisory_xact_lock(hashtextextended('autotag.settle ' || w.id || t.workspace_id, 0)) from autotag.workers w, autotag.tasks t;
      select from autotag.unstored for update;
      select autotag.finish(t.workspace_id, array_agg(row(t.id, t.job_id, t.asset_id, {RESULT} -> 'result', null, null, null)::autotag.finished), true)
      from autotag.tasks t where t.finished_at is null and (t.worker_id is not null or t.retry_at = 'infinity') group by t.workspace_id""",
    "windows": "select from public.workspace_rate_limits for no key update",
    "an upload that is cancelled": "select public.cancel_tagging(id) from autotag.jobs",
    "an upload where others wait": f"select public.enqueue_tagging(array(select id from public.assets where workspace_id = {workspace(1)}))",
    "an upload of a new workspace": f"select public.enqueue_tagging({ASSETS})",
    "windows that are used": """
      select public.check_rate_limit(w.id, t, 1) from public.workspaces w, unnest(array['realtime', 'batch']::public.tagging_request_type[]) t""",
    "windows that are set": """
      insert into public.workspace_rate_limits (workspace_id, request_type, max_requests)
      select w.id, t, 1000 from public.workspaces w, unnest(array['realtime', 'batch']::public.tagging_request_type[]) t
      on conflict (workspace_id, request_type) do update set max_requests = excluded.max_requests""",
}
#: What two functions may both wait for, and at least how many functions come to it.
MEETING_POINTS = {
    "the provider": ("select from autotag.provider_limits for update", 12),
    "workers": ("select from autotag.workers for update", 6),
    "usage": ("select from autotag.usage for update", 3),
    "assets": (HELD_BY_TENANTS["assets"], 8),
    "jobs": (HELD_BY_TENANTS["jobs"], 10),
    "batches": (HELD_BY_TENANTS["batches"], 8),
    "tasks": ("select from autotag.tasks for update", 8),
    "windows": (HELD_BY_TENANTS["windows"], 2),
}


@dataclass
class Session:
    """A connection whose statements run in a thread and leave nothing behind."""

    connection: psycopg.Connection[tuple[object, ...]]
    thread: threading.Thread | None = None
    failed: psycopg.Error | None = None

    @property
    def pid(self) -> int:
        return self.connection.info.backend_pid

    def start(self, statement: str) -> None:
        def run() -> None:
            try:
                with self.connection.transaction(force_rollback=True):
                    self.connection.execute(statement.encode())
            except psycopg.Error as error:
                self.failed = error

        self.failed = None
        self.thread = threading.Thread(target=run)
        self.thread.start()

    def runs(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def end(self) -> psycopg.Error | None:
        """Waits until the statement has ended. Returns its error, unless the function has reported that a row is
        locked."""
        assert self.thread
        self.thread.join(PATIENCE)
        assert not self.runs(), "it does not end"
        return None if self.failed is None or self.failed.sqlstate == "PT503" else self.failed


@dataclass
class Server:
    """Four sessions in one database: one holds something, two run functions, and one looks."""

    holder: psycopg.Connection[tuple[object, ...]]
    first: Session
    second: Session
    looker: psycopg.Connection[tuple[object, ...]]

    @contextlib.contextmanager
    def held(self, statement: str) -> Iterator[None]:
        with self.holder.transaction(force_rollback=True):
            self.holder.execute(statement.encode())
            yield

    def waits(self, session: Session) -> bool:
        """Waits until the session waits for a lock (true) or its function has ended (false)."""
        deadline = time.monotonic() + PATIENCE
        while session.runs():
            if self.looker.execute("select cardinality(pg_blocking_pids(%s)) > 0", (session.pid,)).fetchone() == (
                True,
            ):
                return True
            assert time.monotonic() < deadline, "it neither ends nor waits"
            time.sleep(0.001)
        return False

    def provider_is_free(self) -> bool:
        return self.looker.execute("select from autotag.provider_limits for update skip locked").fetchone() is not None


@pytest.fixture(scope="module")
def server(postgres: LocalPostgres) -> Iterator[Server]:
    """One server for all tests. Everything that they do is rolled back."""
    with contextlib.ExitStack() as stack:
        url = postgres.url("supabase_admin", stack.enter_context(copied_database(postgres, TEMPLATE)))
        sessions = [stack.enter_context(psycopg.connect(url, autocommit=True)) for _ in range(4)]
        set_the_scene(sessions[0])
        yield Server(sessions[0], Session(sessions[1]), Session(sessions[2]), sessions[3])


def set_the_scene(connection: psycopg.Connection[tuple[object, ...]]) -> None:
    """Creates work of every kind in every state, so that each function has something to do.

    Workspaces 1 to 3 have single calls: some are held by each worker, some wait, one failed; in 3 an answer waits for its row, and an
    image is due again. 4 has a batch at OpenAI, 5 one that the worker builds, and 6 a planned one. 7 has single calls that no claim
    has seen yet. 8 has nothing. 9 has an old upload. 10 has a batch that is being created.
    """
    connection.execute(
        f"""
      update autotag.settings set realtime_max_images = 10, chunk_max_images = 10, express_images = 0;
      insert into public.workspaces (name) select 'w' || n from generate_series(1, 10) n;
      insert into public.assets (workspace_id, storage_path)
      select w.id, w.id || '/' || n from public.workspaces w, generate_series(1, 11) n;
      do $$
      declare
        v_workspace uuid;
      begin
        perform autotag.register_worker(w::uuid, 'h', autotag.schema_version(), true, 'http://p', 'k')
        from unnest(array['{DEAD}', '{WORKER}']) w;
        update autotag.provider_limits set proven_at = now(), next_poll_at = '-infinity';
        for i in 1 .. 7 loop
          v_workspace := (select w.id from public.workspaces w where w.name = 'w' || i);
          if i = 7 then
            perform autotag.claim('{DEAD}', 9, 1);
            perform autotag.claim('{WORKER}', 12, 1);
          end if;
          perform autotag.start_job(v_workspace, null, array(
            select a.id from public.assets a where a.workspace_id = v_workspace order by a.id limit case when i in (4, 5, 6) then 11 else 8 end));
          if i = 4 or i = 5 then
            perform autotag.claim_batches('{WORKER}', 1, i);
            update autotag.batches set state = 'submitted', worker_id = null, openai_batch_id = 'batch_1', openai_status = 'in_progress',
              submitted_at = now(), running_at = now(), request_total = 11, predicted_seconds = 60 where i = 4 and state = 'preparing';
          end if;
        end loop;
        v_workspace := {workspace(10)};
        perform autotag.start_job(v_workspace, null, array(select a.id from public.assets a where a.workspace_id = v_workspace));
        update autotag.batches set state = 'creating', worker_id = '{WORKER}', claim = 1, attempt = 1, asked_at = now(), input_file_id = 'f'
        where workspace_id = v_workspace;
        v_workspace := {workspace(3)};
        perform autotag.keep(array(
          select row(t.id, t.job_id, t.asset_id, '{{"tags": ["a"], "confidence": {{}}, "caption": "c", "model": "m"}}', null, null, null)::autotag.finished
          from autotag.tasks t where t.workspace_id = v_workspace and t.worker_id = '{WORKER}' order by t.id limit 2), false);
        perform autotag.requeue(jsonb_build_array(jsonb_build_object('task', min(t.id), 'failures', 1)))
        from autotag.tasks t where t.workspace_id = v_workspace and t.worker_id = '{WORKER}';
        -- more than a day: a lease that ended later does not expire once no worker has sent a heartbeat for some time (can_expire)
        update autotag.workers set lease_until = now() - interval '2 days' where id = '{DEAD}';
        -- it lives on, however long these tests take
        update autotag.workers set poll_assigned_at = now(), unsent = 5, lease_until = now() + interval '1 day' where id = '{WORKER}';
        update autotag.tasks set stage = 'failed', error_code = 'x', finished_at = now(), worker_id = null, claim = null
        where id = (select min(t.id) from autotag.tasks t where t.worker_id = '{WORKER}' and t.workspace_id = {workspace(2)});
        insert into autotag.jobs (workspace_id, strategy, image_count, completed, created_at, finished_at)
        select w.id, 'batch', 11, 11, now() - interval '1 year', now() - interval '1 year' from public.workspaces w where w.name in ('w1', 'w9');
        insert into autotag.workspaces (workspace_id) values ({workspace(9)});
        insert into autotag.batches (job_id, workspace_id, ordinal, image_count, state, created_at, input_file_id)
        select j.id, j.workspace_id, 9, 11, 'done', now(), 'file_1' from autotag.jobs j where j.workspace_id = {workspace(1)} and j.finished_at is null;
        insert into autotag.usage (workspace_id, day, model, service_tier)
        select w.id, now() at time zone 'utc', 'm', t from public.workspaces w, unnest(array['default', 'batch']) t;
        update autotag.clock set ticked_at = '-infinity', housekeeping_at = '-infinity';
        insert into autotag.arrivals (asset_id, workspace_id, uploader, arrived_at)
        select id, workspace_id, '00000000-0000-0000-0000-000000000000', now() - interval '1 h' from public.assets
        where workspace_id = {workspace(8)};
      end $$""".encode()
    )


def test_every_function_has_something_to_do(server: Server) -> None:
    """Each function changes a row in these tests. A function without work would lock nothing, and its tests would prove nothing."""

    def changed() -> object:
        found = server.holder.execute(
            "select sum(n_tup_ins + n_tup_upd + n_tup_del) from pg_stat_xact_user_tables where schemaname in ('autotag', 'public')"
        ).fetchone()
        return found and found[0]

    idle = []
    for name, statement in EVERYTHING.items():
        with server.held("select"):
            before = changed()
            server.holder.execute(statement.encode())
            if changed() == before:
                idle.append(name)
    assert idle == []


@pytest.mark.parametrize("held", HELD_BY_TENANTS)
def test_nothing_waits_for_a_tenant(server: Server, held: str) -> None:
    """Functions that work for all tenants return whatever lock one tenant holds: they leave that tenant out, or return
    `busy` within a moment."""
    waited = []
    with server.held(HELD_BY_TENANTS[held]):
        for name, statement in SERVANTS.items():
            for seconds in (
                (2, 10) if name not in PATIENT else ()
            ):  # the second time, because this machine may have been busy
                server.first.start(f"set local statement_timeout = '{seconds} s'; {statement}")
                error = server.first.end()
                if not isinstance(error, psycopg.errors.QueryCanceled):
                    assert error is None, f"{name}: {error}"
                    break
            else:
                waited += [name] if name not in PATIENT else []
    assert waited == [], f"these wait for {held}"


@contextlib.contextmanager
def timeouts(server: Server, timeout: str) -> Iterator[None]:
    """Sets the lock_timeout of all functions that have one, so that tests can see them wait."""
    usual = server.looker.execute(
        "select p.oid::regprocedure::text, split_part(c, '=', 2) from pg_proc p, unnest(p.proconfig) c"
        " where p.pronamespace = 'autotag'::regnamespace and c like 'lock_timeout=%'"
    ).fetchall()
    try:
        for name, _ in usual:
            server.looker.execute(f"alter function {name} set lock_timeout = '{timeout}'".encode())
        yield
    finally:
        for name, value in usual:
            server.looker.execute(f"alter function {name} set lock_timeout = '{value}'".encode())


@pytest.mark.parametrize("held", HELD_BY_TENANTS)
def test_who_waits_for_a_tenant_does_not_hold_the_provider(server: Server, held: str) -> None:
    wrong, waiting = [], 0
    with timeouts(server, "0"), server.held(HELD_BY_TENANTS[held]):
        for name, statement in EVERYTHING.items():
            server.first.start(statement)
            if server.waits(server.first):
                waiting += 1
                wrong += [] if server.provider_is_free() else [name]
                server.first.connection.cancel_safe()
            server.first.end()
    assert wrong == [], f"these hold the provider row and wait for {held}"
    assert waiting > 0, "some wait at all"


def deadlocks(server: Server, point: str) -> tuple[list[str], list[str]]:
    """The functions that reach a lock, and the pairs that deadlock if both wait there and go on at the same moment."""
    coming, found = [], []
    hold = MEETING_POINTS[point][0]
    # In production a wait of 50 ms ends before it counts as a deadlock, after a second. Here it is longer, so that two can meet.
    with timeouts(server, "10s"):
        with server.held(hold):
            for name, statement in EVERYTHING.items():
                server.first.start(statement)
                if server.waits(server.first):
                    coming.append(name)
                    server.first.connection.cancel_safe()
                server.first.end()
        for one, other in itertools.product(coming, repeat=2):
            with server.held(hold):
                server.first.start(EVERYTHING[one])
                server.waits(server.first)
                server.second.start(EVERYTHING[other])
                server.waits(server.second)
            ends = [server.first.end(), server.second.end()]
            if any(isinstance(error, psycopg.errors.DeadlockDetected) for error in ends):
                found.append(f"{one} and {other}")
    return coming, found


@pytest.mark.parametrize("point", MEETING_POINTS)
def test_no_two_functions_deadlock(server: Server, point: str) -> None:
    coming, found = deadlocks(server, point)
    assert len(coming) >= MEETING_POINTS[point][1], "functions meet at all"
    assert found == []


def test_a_circle_is_noticed(server: Server) -> None:
    """Proves that the check works: if tick() locks a worker's row before the provider row, it deadlocks with
    register_worker()."""
    row = server.looker.execute("select pg_get_functiondef('autotag.expire_worker'::regproc)").fetchone()
    assert row is not None
    source, lock = str(row[0]), "perform from autotag.provider_limits for update;"
    assert lock in source
    try:
        server.looker.execute(source.replace(lock, "").encode())
        assert "register a dead worker and tick" in deadlocks(server, "the provider")[1]
    finally:
        server.looker.execute(source.encode())
