"""Shared by the tests: a library of pictures, workers, and checks of what the database and the provider counted."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import select
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any

import psycopg
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg.rows import dict_row
from storage3 import AsyncStorageClient

from autotag.config import Settings
from autotag.worker.run import Worker
from autotag.worker.wake import Wake
from lab.edge.storage import put_files
from lab.openai_sim.limits import Limits
from lab.pictures import Drawing, draw
from lab.stack import Member, Stack

PATIENCE = 120.0  # seconds; only a broken promise takes so long, also on a machine that is busy with other things
SOON = 20.0  # seconds that something inside one process may take; only a broken promise takes so long

#: Connections that are free, by URL. A call over a new one takes 17 ms of processor time: the password, the catalogue, the
#: functions; over one that is there, 2 ms.
_kept: defaultdict[str, list[psycopg.Connection[Any]]] = defaultdict(list)


class Library:
    """One workspace of a stack, with the calls of its member and of its owner."""

    def __init__(self, stack: Stack, member: Member | None = None) -> None:
        self.stack = stack
        self.member = member or stack.add_member()
        self.drawings: dict[str, Drawing] = {}

    async def upload(self, drawings: int | Sequence[Drawing], seed: int = 1) -> list[str]:
        """Stores pictures and inserts their rows. Returns the ids in order."""
        stored = await self.upload_files(drawings, seed)
        ids = self.insert([path for path, _ in stored])
        self.drawings |= {asset: drawing for asset, (_, drawing) in zip(ids, stored, strict=True)}
        return ids

    async def upload_files(self, drawings: int | Sequence[Drawing], seed: int = 1) -> list[tuple[str, Drawing]]:
        """Stores pictures without Storage's API (which `store_file` uses). Returns the path and the drawing of each."""
        chosen = list(draw(drawings, seed)) if isinstance(drawings, int) else list(drawings)
        stored = [(f"{self.member.workspace}/{seed}-{drawing.name}", drawing) for drawing in chosen]
        assert self.stack.files, "not the local edge"
        with connected(self.stack.database_url()) as connection:
            files = [(path, drawing.content_type, drawing.data) for path, drawing in stored]
            put_files(connection, self.stack.files, "assets", files)
        return stored

    def watch_failures(self) -> None:
        """From now on, `failures` also counts tasks that are deleted."""
        self.sql("""
            create table public.tries (failures integer not null);
            create function public.note_tries() returns trigger language plpgsql as $$
            begin
              insert into public.tries values (old.failures);
              return null;
            end $$;
            create trigger note_tries after delete on autotag.tasks for each row execute function public.note_tries()""")

    def failures(self) -> int:
        """The number of failures of all images since `watch_failures`."""
        rows = self.sql("select failures as n from autotag.tasks union all select failures from public.tries")
        return sum(row["n"] for row in rows)

    def insert(self, paths: Sequence[str]) -> list[str]:
        """Inserts rows of assets, whether or not there is a file. A bare name is a name in the workspace's folder."""
        paths = [path if "/" in path else f"{self.member.workspace}/{path}" for path in paths]
        rows = self.sql(
            "insert into public.assets (workspace_id, storage_path)"
            " select %s, p from unnest(%s::text[]) with ordinality u (p, i) order by i returning id::text, storage_path",
            self.member.workspace, list(paths),
        )  # fmt: skip
        by_path = {row["storage_path"]: row["id"] for row in rows}
        return [by_path[path] for path in paths]

    def allow_bucket(self, bucket: str) -> None:
        """Lets rows name files in another bucket, too (changes the file rule)."""
        [told] = self.sql("select pg_get_functiondef('autotag.describe_assets'::regproc) as code")
        assert "in ('assets')" in told["code"]
        self.sql(told["code"].replace("in ('assets')", f"in ('assets', '{bucket}')"))

    def sql(self, statement: str, *arguments: object) -> list[dict[str, Any]]:
        """Runs a statement as the project's owner."""
        with connected(self.stack.database_url()) as connection:
            cursor = connection.cursor(row_factory=dict_row).execute(statement, arguments)  # type: ignore[arg-type]
            # `select from …` has rows without columns, and no description.
            return cursor.fetchall() if cursor.pgresult and cursor.pgresult.status == ExecStatus.TUPLES_OK else []

    def rpc(self, function: str, *arguments: object) -> Any:
        """Calls a function as the member does: role authenticated, with the member's claims."""
        return rpc(self.stack, self.member.user, function, *arguments)

    def enqueue(self, assets: Sequence[str]) -> dict[str, Any]:
        """Uploads as the member. Returns the reply of enqueue_tagging."""
        answer: dict[str, Any] = self.rpc("public.enqueue_tagging", list(assets))
        return answer

    def enqueue_as_server(self, assets: Sequence[str]) -> dict[str, Any]:
        """Enqueues as the project's server, whose right to see files is not checked."""
        [row] = self.sql("select to_jsonb(public.enqueue_tagging(%s)) as job", array(assets))
        answer: dict[str, Any] = row["job"]
        return answer

    def claim(self, worker: str, slots: int = 100) -> dict[str, Any]:
        """Claims as a registered worker does. Returns the row of autotag.claim, with the descriptions of describe_tasks
        as `images`."""
        [row] = self.sql(
            "select c.* from autotag.claim(%s, %s, (select claim + 1 from autotag.workers where id = %s)) c",
            worker, slots, worker,
        )  # fmt: skip
        [described] = self.sql("select autotag.describe_tasks(%s, %s::bigint[]) as images", worker, row["tasks"])
        return {**row, "images": described["images"]}

    def claim_batches(self, worker: str, slots: int = 1) -> dict[str, Any]:
        """Claims batches as a registered worker does: the row of autotag.claim_batches."""
        [row] = self.sql(
            "select c.* from autotag.claim_batches(%s, %s, (select batch_claim + 1 from autotag.workers where id = %s)) c",
            worker, slots, worker,
        )  # fmt: skip
        return row

    def settle(self, worker: str, reports: Sequence[Mapping[str, Any]]) -> int:
        """Reports outcomes as a worker does, by workspace. Returns how many were accepted."""
        rows = self.sql(
            "select id, workspace_id::text from autotag.tasks where id = any (%s)", [r["task"] for r in reports]
        )
        workspaces = {row["id"]: row["workspace_id"] for row in rows}
        accepted = 0
        for workspace in set(workspaces.values()):
            own = [report for report in reports if workspaces.get(report["task"]) == workspace]
            [row] = self.sql("select autotag.settle(%s, %s, %s) as told", worker, workspace, json.dumps(own))
            accepted += row["told"]["accepted"]
        return accepted

    def job(self, job_id: str) -> dict[str, Any]:
        """The reply of tagging_job about an upload to the member."""
        answer: dict[str, Any] = self.rpc("public.tagging_job", job_id)
        return answer

    def assets(self) -> dict[str, dict[str, Any]]:
        """The workspace's rows by id."""
        rows = self.sql("select *, id::text as id from public.assets where workspace_id = %s", self.member.workspace)
        return {row["id"]: row for row in rows}

    async def finished(self, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
        """Waits until jobs have ended. Returns the replies of tagging_job."""
        ids = [job["job_id"] for job in jobs]
        await until(lambda: all(self.job(job)["finished_at"] for job in ids), "the jobs to finish")
        return [self.job(job) for job in ids]

    def check_tags(self, assets: Sequence[str] | None = None) -> None:
        """Checks that every picture's own tags are in its own row."""
        rows = self.assets()
        for asset in assets if assets is not None else self.drawings:
            row = rows[asset]
            assert row["tagging_stage"] == "completed", (row["tagging_stage"], row["tagging_error"])
            assert set(row["tags"]) == self.drawings[asset].tags, f"wrong tags on {self.drawings[asset].name}"
            assert row["tagging_result"]["caption"].endswith(".")


async def store_file(storage: AsyncStorageClient, bucket: str, path: str, drawing: Drawing) -> None:
    """Uploads one picture into a bucket."""
    await storage.from_(bucket).upload(path, drawing.data, {"content-type": drawing.content_type})


def rpc(stack: Stack, user: str | dict[str, Any] | None, function: str, *arguments: object) -> Any:
    """Calls a function under the role and claims of a signed-in user (an id, or all claims; None: anon)."""
    own = {"sub": user} if isinstance(user, str) else user or {}
    claims = json.dumps({"role": "authenticated" if user else "anon", **own})
    with connected(stack.database_url("authenticator")) as connection, connection.transaction():
        connection.execute(
            "select set_config('request.jwt.claims', %s, true), set_config('role', %s, true)",
            (claims, "authenticated" if user else "anon"),
        )
        places = ", ".join("%s" for _ in arguments)
        values = [array(a) if isinstance(a, list) else a for a in arguments]
        value = "to_jsonb(x)" if function.startswith("public.") else "x"  # as PostgREST gives it
        cursor = connection.execute(f"select {value} from {function}({places}) x", values)  # type: ignore[arg-type]
        row = cursor.fetchone()
        assert row is not None
        return row[0]


def base_type(kind: str) -> str:
    """The base type of a type of the stand-alone stack, whose ids are uuids."""
    return re.sub(r"^autotag\.(asset|workspace|user)_id\b", "uuid", kind)


def array(values: Sequence[Any]) -> str:
    """A list as text, which Postgres reads as an array of the type of its place."""

    def element(value: Any) -> str:
        if isinstance(value, list):
            return array(value)
        return "null" if value is None else '"' + str(value).replace("\\", "\\\\").replace('"', '\\"') + '"'

    return "{" + ",".join(map(element, values)) + "}"


@contextlib.contextmanager
def connected(url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection in autocommit mode, like new: used ones are kept for the test (`close_connections`)."""
    free = _kept[url]
    connection = free.pop() if free else None
    if (
        connection and select.select([connection], [], [], 0)[0]
    ):  # the server has said something: that it ends the session
        connection.close()
        connection = None
    connection = connection or psycopg.connect(url, autocommit=True, prepare_threshold=None)
    try:
        yield connection
    finally:
        if connection.info.transaction_status == TransactionStatus.IDLE:
            connection.execute("reset all")
            free.append(connection)
        else:
            connection.close()


def close_connections() -> None:
    """Closes the connections that `connected` has kept, so that the next ones have changed settings of the database."""
    while _kept:
        for connection in _kept.popitem()[1]:
            connection.close()


def compress(stack: Stack, speed: float) -> None:
    """Speeds up autotag's clock by a factor."""
    stack.compress(speed)
    close_connections()


async def soon(condition: Callable[[], bool]) -> None:
    """Waits for a condition that this event loop fulfils by itself."""
    async with asyncio.timeout(SOON):
        while True:
            if condition():
                return
            await asyncio.sleep(0.001)


async def until(condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    """Waits for a condition that other processes fulfil."""
    began = time.monotonic()
    while not await asyncio.to_thread(condition):
        waited = time.monotonic() - began
        assert waited < patience, f"waited {patience:g} s for {what}"
        await asyncio.sleep(min(max(0.05, waited / 50), 0.3))  # who waits long needs not look often


def worker_settings(stack: Stack, **changes: Any) -> Settings:
    """The settings for a worker inside the test, as `Stack.worker_environment` has them for a process."""
    environment = {name.lower(): value for name, value in stack.worker_environment().items()}
    return Settings(**{**environment, **changes})


@contextlib.asynccontextmanager
async def worker(stack: Stack, **changes: Any) -> AsyncIterator[Wake]:
    """A worker inside the test's own loop, stopped gracefully at the end."""
    wake = Wake()
    task = asyncio.create_task(Worker(worker_settings(stack, **changes), wake).run())
    try:
        yield wake
    finally:
        wake.request_stop()
        async with asyncio.timeout(PATIENCE):
            await task


def audit(stack: Stack) -> None:
    """Compares the database's counts with its rows, and its usage with the provider's book."""
    with psycopg.connect(stack.database_url(), row_factory=dict_row) as connection:

        def rows(statement: str) -> list[dict[str, Any]]:
            return connection.execute(statement).fetchall()  # type: ignore[arg-type]

        wrong_jobs = rows("""
            select j.id, j.completed, j.failed, c.* from autotag.jobs j
            cross join lateral (
              select count(*) filter (where t.stage = 'failed') as tasks_failed, count(*) as tasks
              from autotag.tasks t where t.job_id = j.id) c
            where (j.failed, j.image_count - j.completed) is distinct from (c.tasks_failed, c.tasks)""")
        assert wrong_jobs == [], "counts of jobs differ from their tasks"
        wrong_queues = rows("""
            select q.job_id, q.queued, c.n from autotag.queues q
            join autotag.jobs j on j.id = q.job_id and j.cancelled_at is null  -- the next claim or tick corrects those
            cross join lateral (
              select count(*) as n from autotag.tasks t where t.job_id = q.job_id and t.lane = 'realtime'
              and t.worker_id is null and t.retry_at is null and t.finished_at is null) c
            where q.queued <> c.n""")
        assert wrong_queues == [], "queues count what is not there"
        wrong_workspaces = rows("""
            select w.workspace_id, w.queued, c.n from autotag.workspaces w
            cross join lateral (
              select coalesce(sum(q.queued), 0) as n from autotag.queues q where q.workspace_id = w.workspace_id and q.joined) c
            where w.queued <> c.n""")
        assert wrong_workspaces == [], "workspaces count what their queues do not hold"
        wrong_assets = rows("""
            select t.asset_id, t.stage, a.tagging_stage from autotag.tasks t join public.assets a on a.id = t.asset_id
            where t.finished_at is null and a.tagging_stage not in ('queued', 'submitted', 'processing')""")
        assert wrong_assets == [], "rows of assets that are being tagged show another stage than these"
        forgotten = rows("""
            select u.task_id from autotag.unstored u left join autotag.tasks t on t.id = u.task_id
            where t.retry_at is distinct from 'infinity' or t.finished_at is not null""")
        assert forgotten == [], "outcomes wait whose tasks do not"
        left = rows("""
            select a.id, a.tagging_stage from public.assets a where a.tagging_stage not in ('completed', 'failed')
            and not exists (select from autotag.tasks t where t.asset_id = a.id and t.finished_at is null)""")
        assert left == [], "rows of assets show that they are being tagged, and they are not"
        usage = rows("select coalesce(sum(images), 0) as images, coalesce(sum(requests), 0) as n from autotag.usage")[0]
        completed = rows("select coalesce(sum(completed), 0) as n from autotag.jobs")[0]["n"]
        assert usage["images"] == completed, "usage counts other images than were tagged"


def answered_pictures(stack: Stack) -> list[str]:
    """The pictures that the provider has answered and billed, by its own records."""
    return [
        entry["picture"] for entry in stack.simulator.request_log if entry.get("picture") and entry["status"] == 200
    ]


@lru_cache(maxsize=4)
def pictures(count: int) -> tuple[Drawing, ...]:
    """This many different pictures, drawn once for all tests of a process."""
    return tuple(draw(count))


def widen(stack: Stack) -> None:
    """Raises the limits here and of the provider, so that no test of this size meets one."""
    stack.configure(
        chunk_delay="0.01 s", realtime_requests_per_minute=1_000_000, realtime_tokens_per_minute=2_000_000_000
    )
    stack.simulator.limits = Limits.of(100_000, 500_000_000, None)
    with psycopg.connect(stack.database_url(), autocommit=True) as connection:
        connection.execute("""
            update autotag.provider_limits set requests_per_minute = 100000, tokens_per_minute = 500000000,
              queued_batch_tokens = 100000000, requests_per_day = null, requests_left = 100000, tokens_left = 500000000""")
    stack.simulator.plan.queued_batch_tokens = 100_000_000


def asked(stack: Stack) -> list[dict[str, Any]]:
    """All single calls that reached the provider, by its records."""
    return [
        entry
        for entry in stack.simulator.request_log
        if entry["path"].endswith("/completions") and entry["method"] == "POST"
    ]


def refused(stack: Stack) -> list[dict[str, Any]]:
    """The single calls that the provider has refused."""
    return [entry for entry in asked(stack) if (entry["status"] or 200) != 200]


def paid(stack: Stack) -> list[dict[str, Any]]:
    """The answers that the provider has billed: single calls and lines of batches."""
    return [entry for entry in stack.simulator.request_log if entry.get("usage")]


def check_money(stack: Stack) -> None:
    """Checks that tagging_usage agrees with the provider's records to the last digit, for each model and service
    tier."""
    billed: dict[tuple[str, str], list[Decimal | int | None]] = defaultdict(lambda: [0, Decimal(0), 0, 0])
    for entry in paid(stack):
        row = billed[entry["model"], "batch" if entry["method"] == "BATCH" else entry["tier"]]
        row[0] = (row[0] or 0) + 1
        row[1] = None if row[1] is None or entry["dollars"] is None else row[1] + Decimal(entry["dollars"])
        row[2] = (row[2] or 0) + entry["usage"]["prompt_tokens"]
        row[3] = (row[3] or 0) + entry["usage"]["completion_tokens"]
    with psycopg.connect(stack.database_url()) as connection:
        rows = connection.execute("""
            select u.model, u.service_tier, sum(u.requests)::integer,
              case when bool_and(u.cost is not null) then sum(u.cost) end, sum(u.input_tokens)::bigint, sum(u.output_tokens)::bigint
            from (select distinct workspace_id from autotag.usage) w
            cross join lateral autotag.list_usage(w.workspace_id, '2000-01-01', '2100-01-01') u group by 1, 2""").fetchall()
    assert {(model, tier): row for model, tier, *row in rows} == dict(billed), "usage differs from the provider's book"


def check_asked_once(stack: Stack) -> None:
    """Checks that no picture was paid for twice."""
    twice = {picture: n for picture, n in Counter(entry["picture"] for entry in paid(stack)).items() if n > 1}
    assert twice == {}, "pictures were paid for twice"
