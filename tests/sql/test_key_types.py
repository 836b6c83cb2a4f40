"""Keys of every type, from the upload to the broadcast: everything works as with uuids."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg import sql
from typer.testing import CliRunner

from autotag.cli.app import app
from conftest import BARE_TEMPLATE, copied_database
from key_types import HOSTILE, KEYS, Keys, install_keys, new_user
from lab.postgres import LocalPostgres

WORKER = "99999999-0000-4000-8000-000000000001"
RESULT = {"tags": ["red"], "confidence": {"red": 0.9}, "caption": "It is red.", "model": "gpt-6-luna"}
USAGE = {"input": 700, "cached": 0, "cache_write": 0, "output": 50, "reasoning": 0, "model": "gpt-6-luna", "tier": "default"}  # fmt: skip


#: Functions that return uuids of autotag's own: marks and batches.
UUIDS = {
    "file_mark", "visible_file_marks", "rank_batches", "lock_candidates", "record_poll", "apply_poll",
}  # fmt: skip


class Project:
    """A project with keys of one kind: one workspace with a member and a worker, inside a transaction."""

    def __init__(self, connection: psycopg.Connection[Any], keys: Keys) -> None:
        self.connection = connection
        self.keys = keys
        self.claims = 0
        self.user = new_user(keys)
        self.workspace = self.add_workspace(self.user)
        self.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true, 'x', 'y')", WORKER)

    def sql(self, statement: str, *values: object) -> list[Any]:
        cursor = self.connection.execute(statement.encode(), values or None)
        return cursor.fetchall() if cursor.description else []

    def one(self, statement: str, *values: object) -> Any:
        [(value,)] = self.sql(statement, *values)
        return value

    def add_workspace(self, user: str) -> str:
        if self.keys.base[2] == "uuid":
            self.sql("insert into auth.users (id, email) values (%s, %s)", user, user)
        workspace = self.one("insert into public.workspaces (name) values ('w') returning id::text")
        self.sql("insert into public.workspace_members values (%s, %s)", workspace, user)
        return str(workspace)

    def insert(self, images: int, workspace: str | None = None) -> list[str]:
        self.sql(
            "insert into storage.objects (bucket_id, name) select 'assets', %s || '/p' || i from generate_series(1, %s) i"
            " on conflict do nothing", workspace or self.workspace, images,
        )  # fmt: skip
        rows = self.sql(
            "insert into public.assets (workspace_id, storage_path) select %s, %s || '/p' || i from generate_series(1, %s) i"
            " returning id::text", workspace or self.workspace, workspace or self.workspace, images,
        )  # fmt: skip
        return [row[0] for row in rows]

    def as_user(self, user: str, statement: str, *values: object) -> Any:
        """The value of a statement that a signed-in user executes."""
        self.sql("select set_config('request.jwt.claims', %s, true), set_config('role', 'authenticated', true)",
                 json.dumps({"role": "authenticated", "sub": user}))  # fmt: skip
        try:
            return self.one(statement, *values)
        finally:
            if self.connection.info.transaction_status != psycopg.pq.TransactionStatus.INERROR:
                self.sql("select set_config('request.jwt.claims', '', true), set_config('role', 'none', true)")

    def enqueue(self, assets: list[str], user: str | None = None) -> dict[str, Any]:
        call = f"select to_jsonb(public.enqueue_tagging(%s::{self.keys.base[0]}[]))"
        told: dict[str, Any] = self.as_user(user or self.user, call, assets)
        return told

    def claim(self) -> list[dict[str, Any]]:
        self.claims += 1
        tasks = self.one("select tasks from autotag.claim(%s, 100, %s)", WORKER, self.claims)
        images: list[dict[str, Any]] = self.one("select autotag.describe_tasks(%s, %s::bigint[])", WORKER, tasks)
        return images

    def settle(self, images: list[dict[str, Any]], **outcome: Any) -> dict[str, Any]:
        said = outcome or {"result": RESULT, "usage": USAGE}
        reports = [
            {"task": i["task"], "attempt": i["attempt"], "mark": i["mark"], "called": True, **said} for i in images
        ]
        told: dict[str, Any] = self.one(
            "select autotag.settle(%s, %s, %s)", WORKER, images[0]["workspace"], json.dumps(reports)
        )
        return told

    def rows(self) -> dict[str, tuple[str | None, list[str] | None]]:
        return {row[0]: (row[1], row[2]) for row in self.sql("select id::text, tagging_stage, tags from public.assets")}

    def refusal(self, statement: str, *values: object, user: str | None = None) -> tuple[str, dict[str, Any]]:
        """The code and the detail with which a call is refused."""
        with pytest.raises(psycopg.Error) as refused, self.connection.transaction():
            self.as_user(user or self.user, statement, *values)
        detail = json.loads(refused.value.diag.message_detail or "{}")
        return str(detail.get("code", refused.value.sqlstate)), detail


@pytest.fixture(scope="module", params=KEYS)
def keyed(request: pytest.FixtureRequest, postgres: LocalPostgres) -> Iterator[tuple[psycopg.Connection[Any], Keys]]:
    keys = KEYS[request.param]
    with copied_database(postgres, BARE_TEMPLATE) as name:
        install_keys(postgres, name, keys)
        with psycopg.connect(postgres.url(database=name), autocommit=True) as connection:
            connection.execute(
                "update autotag.settings set chunk_delay = '1 ms', upload_quiet = '1 ms', upload_longest = '1 ms'"
            )
            connection.execute(
                "update autotag.provider_limits set proven_at = '-infinity', base_url = 'x', fingerprint = 'y'"
            )
            yield connection, keys


@pytest.fixture
def project(keyed: tuple[psycopg.Connection[Any], Keys]) -> Iterator[Project]:
    with keyed[0].transaction(force_rollback=True):
        yield Project(*keyed)


def test_from_the_upload_to_the_broadcast(project: Project) -> None:
    assets = project.insert(3)
    job = project.enqueue(assets)
    assert (job["image_count"], job["skipped"]) == (3, 0)
    again = project.enqueue(assets)
    assert (again["job_id"], again["image_count"], again["skipped"]) == (job["job_id"], 0, 3)
    images = project.claim()
    assert sorted(image["asset_id"] for image in images) == sorted(assets)
    assert {image["workspace"] for image in images} == {project.workspace}
    assert all(image["path"] for image in images), images
    assert project.settle(images)["accepted"] == 3
    assert project.rows() == dict.fromkeys(assets, ("completed", ["red"]))
    [(topic, end)] = project.sql("select topic, payload from realtime.messages where event = 'job-complete'")
    assert (topic, end["job_id"], end["many"]) == (f"tagging:{project.workspace}", job["job_id"], False)
    assert sorted(end["asset_ids"]) == sorted(project.keys.natural(assets, 0)), "ids of their natural type"
    call = f"select to_jsonb(x) from public.tagging_usage(%s::{project.keys.base[1]}) x"
    day = project.as_user(project.user, call, project.workspace)
    assert (day["user_id"], day["images"]) == (project.keys.natural(project.user, 2), 3)
    assert project.enqueue(assets)["image_count"] == 0, "the pictures are not remembered"
    assert project.one("select autotag.describe_job(%s)", job["job_id"])["completed"] == 3


def test_a_message_names_few_short_ids(project: Project) -> None:
    """A message names at most 100 ids, because these also have to fit into a URL, and fewer if the ids are long
    texts."""

    def name(images: int, length: int) -> tuple[int | None, int]:
        key = {"uuid": "md5(i::text)", "text": f"rpad(i::text, {length}, 'x')"}.get(project.keys.base[0], "i::text")
        [(count, size)] = project.sql(
            f"with ids as (select array(select ({key})::autotag.asset_id from generate_series(1, {images}) i) as list),"
            " told as (select autotag.add_changed('{}', list) as ids from ids)"
            " select cardinality(ids), octet_length(autotag.unique_ids(ids)::text) from told"
        )
        return count, size

    count, size = name(100, 60)
    assert (count, size < 10_000) == (100, True)
    assert name(101, 60)[0] is None
    if project.keys.base[0] == "text":
        assert name(100, 200)[0] is None
        assert name(3, 2600)[0] == 3


def test_a_message_names_images_that_changed_twice_once(project: Project) -> None:
    """Batches of 51 to 100 images change their stage together. Each image counts once, however often it changes."""
    key = {"uuid": "md5(i::text)", "text": "i::text"}.get(project.keys.base[0], "i::text")
    ids = f"array(select ({key})::autotag.asset_id from generate_series(%s::int, %s::int) i)"
    told = f"select cardinality(autotag.add_changed({ids}, {ids}))"
    assert project.one(told, 1, 80, 1, 80) == 80
    assert project.one(told, 1, 80, 41, 100) == 100
    assert project.one(told, 1, 80, 41, 101) is None
    assert project.one(f"select cardinality(autotag.add_changed(null, {ids}))", 1, 3) is None
    assert project.one(f"select cardinality(autotag.add_changed({ids}, null))", 1, 3) is None


def test_strangers_and_refusals(project: Project) -> None:
    stranger, (mine, other) = new_user(project.keys), project.insert(2)
    theirs = project.add_workspace(stranger)
    [foreign] = project.insert(1, theirs)
    call, key = f"select to_jsonb(public.enqueue_tagging(%s::{project.keys.base[0]}[]))", project.keys.natural
    assert project.refusal(call, [mine], user=stranger) == (
        "unknown_asset",
        {"code": "unknown_asset", "asset_ids": [key(mine, 0)]},
    )
    project.sql("insert into public.workspace_members values (%s, %s)", theirs, project.user)
    code, detail = project.refusal(call, [other, foreign])
    assert (code, detail["workspace_ids"]) == (
        "several_workspaces",
        sorted([key(project.workspace, 1), key(theirs, 1)]),
    )
    usage = f"select count(*) from public.tagging_usage(%s::{project.keys.base[1]})"
    assert project.refusal(usage, project.workspace, user=stranger)[1]["workspace_id"] == key(project.workspace, 1)
    limit = f"select allowed from public.peek_rate_limit(%s::{project.keys.base[1]}, 'realtime', 1)"
    assert project.as_user(project.user, limit, project.workspace) is True


def test_topics(project: Project) -> None:
    listen, stranger = "select autotag.may_listen(%s)", new_user(project.keys)
    own = f"tagging:{project.workspace}"
    assert project.as_user(project.user, listen, own)
    assert not project.as_user(stranger, listen, own)
    for topic in (None, "", "tagging:", "tagging:null", "tagging", f" {own}", f"{own} ", f"x{own}", "tagging:" + "9" * 400, "tagging:'",
                  f"tagging:0{project.workspace}", own.upper(), f"tagging::{project.workspace}", "tagging:{}", "tagging:%"):  # fmt: skip
        assert project.as_user(project.user, listen, topic) is False, topic


def test_cancel_and_retry(project: Project) -> None:
    assets = project.insert(4)
    job = project.enqueue(assets)["job_id"]
    images = project.claim()
    project.settle(images[:1], error={"kind": "image", "code": "not_an_image", "message": "No image."})
    project.settle(images[1:2])
    project.sql("select autotag.release_worker(%s)", WORKER)
    assert project.as_user(project.user, "select to_jsonb(public.cancel_tagging(%s))", job)["cancelled"] == 2
    again = project.as_user(project.user, "select to_jsonb(public.retry_tagging(%s))", job)
    assert again["image_count"] == 3
    retried = project.sql("select asset_id::text from autotag.tasks where finished_at is null order by id")
    assert [row[0] for row in retried] == [i["asset_id"] for i in images if i != images[1]]


def test_existing_images_are_read_in_pages(project: Project) -> None:
    assets, after, found = project.insert(7), None, []
    order = [row[0] for row in project.sql("select id::text from public.assets order by id")]
    assert project.one("select autotag.preview_backfill(%s, true, null, 50)", project.workspace)["images"] == 7
    while True:
        part = project.one("select autotag.backfill(%s, true, %s, 3)", project.workspace, after)
        if part["last"] is None:
            break
        after = part["last"]
        found.append(part["images"])
    assert (found, after) == ([3, 3, 1], order[-1])
    assert sorted(assets) == sorted(order)
    assert project.one("select autotag.preview_backfill(%s, true, null, 50)", project.workspace)["images"] == 0


def seal(project: Project) -> dict[str, Any]:
    project.sql("select pg_sleep(0.005)")  # until upload_quiet has passed
    [(sealed, more, notices)] = project.sql("select sealed, more, notices from autotag.seal_uploads(%s)", WORKER)
    return {"sealed": sealed, "more": more, "notices": notices}


def test_automatic_mode(project: Project) -> None:
    project.sql("select autotag.set_automatic(true)")
    own = project.insert(2)
    member = "with n as (insert into public.assets (workspace_id, storage_path) values (%s, %s) returning 1) select count(*) from n"
    assert project.as_user(project.user, member, project.workspace, f"{project.workspace}/q") == 1
    assert project.one("select count(*) from autotag.arrivals") == 3
    [first, second] = [seal(project), seal(project)]
    assert (first["sealed"], second["sealed"]) == (1, 1), (first, second)
    jobs = project.sql("select user_id::text, image_count from autotag.jobs order by image_count")
    assert jobs == [(project.user, 1), (None, 2)]
    assert {project.rows()[asset][0] for asset in own} == {"queued"}
    assert project.one("select count(*) from autotag.list_arriving(null, null, 10)") == 0


def test_automatic_mode_leaves_out_what_the_database_refuses(project: Project) -> None:
    good, odd = project.insert(2)
    project.sql(
        """create function public.refuse() returns trigger language plpgsql as $$ begin raise exception 'odd'; end $$"""
    )
    project.sql("create constraint trigger odd after update on public.assets deferrable initially deferred for each row"
                f" when (new.id = {sql.Literal(odd).as_string()}) execute function public.refuse()")  # fmt: skip
    project.sql("insert into autotag.arrivals (asset_id, workspace_id, uploader, arrived_at) select a.id, a.workspace_id, autotag.nobody(),"
                " autotag.now() from public.assets a")  # fmt: skip
    told = seal(project)
    assert [notice["event"] for notice in told["notices"]] == ["image_not_enqueued"]
    assert odd in told["notices"][0]["notice"]
    assert (project.rows()[good][0], project.rows()[odd][0]) == ("queued", None)


def test_uploads_wait_for_their_quota(project: Project) -> None:
    project.sql(
        "insert into autotag.quotas (workspace_id, scope, period, max_images) values (%s, 'workspace', 'day', 2)",
        project.workspace,
    )
    project.sql(
        "insert into autotag.quotas (user_id, scope, period, max_images) values (%s, 'user', 'day', 1)", project.user
    )
    call = f"select to_jsonb(public.enqueue_tagging(%s::{project.keys.base[0]}[]))"
    assert project.refusal(call, project.insert(2))[0] == "quota_exceeded"
    assert project.enqueue(project.insert(1))["image_count"] == 1
    project.sql("select autotag.set_automatic(true)")
    project.insert(3)
    assert seal(project)["sealed"] == 1, "one image fits"
    seal(project)
    assert project.one("select count(*) from autotag.uploads where uploader = autotag.nobody()") == 1
    waiting = project.one("select autotag.status()")["waiting"]
    assert {w["workspace_id"] for w in waiting if w["kind"] == "upload"} == {project.workspace}


def test_another_try_is_judged_by_both_quotas(project: Project) -> None:
    project.sql(
        "insert into autotag.quotas (workspace_id, user_id, scope, period, max_images)"
        " values (%s, null, 'workspace', 'day', 9), (null, %s, 'user', 'day', 9)", project.workspace, project.user,
    )  # fmt: skip
    project.enqueue(project.insert(2))
    error = {"kind": "transient", "code": "bad_answer", "message": "Cut off.", "retry": True}
    reports = [
        {"task": i["task"], "attempt": i["attempt"], "called": True, "error": error, "usage": USAGE}
        for i in project.claim()
    ]
    settled = project.one(
        "select autotag.settle(%s, %s, %s, null, false)", WORKER, project.workspace, json.dumps(reports)
    )
    assert settled["accepted"] == 2
    assert project.one("select count(*) from autotag.tasks where finished_at is null") == 2


def test_outcomes_that_wait(project: Project) -> None:
    assets = project.insert(2)
    project.enqueue(assets)
    reports = [
        {"task": i["task"], "attempt": i["attempt"], "called": True, "result": RESULT, "usage": USAGE}
        for i in project.claim()
    ]
    project.one("select autotag.settle(%s, %s, %s, null, true)", WORKER, project.workspace, json.dumps(reports))
    assert project.one("select workspaces::text[] from autotag.list_unstored(%s)", WORKER) == [project.workspace]
    tasks = project.one("select autotag.pick_unstored(%s, %s, 10)", WORKER, project.workspace)
    assert (
        project.one("select autotag.store_waiting(%s, %s, %s::bigint[])", WORKER, project.workspace, tasks)["stored"]
        == 2
    )
    assert project.rows() == dict.fromkeys(assets, ("completed", ["red"]))


def test_a_batch(project: Project) -> None:
    assets = project.insert(60)
    job = project.enqueue(assets)
    assert job["strategy"] == "batch"
    [(batches,)] = project.sql("select batches from autotag.claim_batches(%s, 1, 1)", WORKER)
    batch = (WORKER, batches[0]["batch"], batches[0]["attempt"])
    images = project.one("select autotag.batch_images(%s, %s, %s, 0, 1000)", *batch)
    assert {image["asset_id"] for image in images} == set(assets[5:])
    for state in ("preparing", "uploading", "creating"):
        project.one("select autotag.batch_step(%s, %s, %s, %s, 'file')", *batch, state)
    project.one("select autotag.batch_submitted(%s, %s, %s, 'batch_1', 'in_progress', 'file')", *batch)
    project.one("select autotag.show_batch(%s, %s, 0, 500)", *batch[:2])
    assert project.rows()[assets[-1]][0] == "submitted"
    project.sql("update autotag.batches set state = 'harvesting', reserved_tokens = 0, worker_id = %s", WORKER)
    answers = [{"task": i["task"], "result": RESULT, "usage": USAGE, "mark": i["mark"]} for i in images]
    project.one("select autotag.batch_answers(%s, %s, %s, %s)", WORKER, batch[1],
                project.one("select attempt from autotag.batches"), json.dumps(answers))  # fmt: skip
    assert [project.rows()[asset][0] for asset in assets[5:]] == ["completed"] * 55


def test_what_operators_read(project: Project) -> None:
    assets = project.insert(3)
    project.enqueue(assets)
    images = project.claim()
    assert project.one("select autotag.status()")["jobs"][0]["workspace_id"] == project.workspace
    project.settle(images)
    sample = project.one("select autotag.comparison_sample(%s, 10)", project.workspace)
    assert sorted(image["asset_id"] for image in sample) == sorted(assets)
    assert all(image["tags"] == ["red"] for image in sample)
    levels = {finding["check"]: finding["level"] for finding in project.one("select autotag.diagnose()")["findings"]}
    assert levels
    assert "error" not in {levels.get("files"), levels.get("access")}, levels


def test_the_host_writes_its_limits(project: Project) -> None:
    """The host writes limits into the view, whose key has the base type."""
    project.sql("insert into public.workspace_rate_limits (workspace_id, request_type, max_requests) values (%s, 'realtime', 2)"
                " on conflict (workspace_id, request_type) do update set max_requests = excluded.max_requests", project.workspace)  # fmt: skip
    assert (
        project.one("select max_requests from public.workspace_rate_limits where workspace_id = %s", project.workspace)
        == 2
    )
    project.enqueue(project.insert(3))
    assert len(project.claim()) == 2


def test_indexes_serve_every_type(project: Project) -> None:
    project.sql("set local enable_seqscan = off")
    for query in (
        "select from public.assets a where a.id = any (%s::autotag.asset_id[])",
        "select from autotag.tasks t where t.asset_id = any (%s::autotag.asset_id[]) and t.finished_at is null",
    ):
        plan = "\n".join(row[0] for row in project.sql(f"explain {query}", project.insert(2)))
        assert "Index Cond" in plan, plan
    view = "explain select from public.workspace_rate_limits where workspace_id = %s and request_type = 'realtime'"
    assert "Index Cond: (" in "\n".join(row[0] for row in project.sql(view, project.workspace))


def test_ids_have_the_domains_and_what_clients_see_has_their_base(project: Project) -> None:
    names = {"workspace_id": "workspace", "asset_id": "asset", "user_id": "user", "uploader": "user"}
    private = {n: f"autotag.{kind}_id" for n, kind in names.items()}
    asset, workspace, user = project.keys.base
    public = {"workspace_id": workspace, "asset_id": asset, "user_id": user}
    wrong = []
    for schema, name, kind, where in project.sql("""
        select n.nspname::text, x.name, format_type(x.type, null), p.proname::text from pg_proc p join pg_namespace n on n.oid = p.pronamespace
          cross join lateral unnest(coalesce(p.proargnames, '{}'), coalesce(p.proallargtypes, p.proargtypes::oid[])) x (name, type)
          where n.nspname in ('autotag', 'public') and x.name is not null
        union all
        select n.nspname, a.attname, format_type(a.atttypid, null), c.relname from pg_attribute a join pg_class c on c.oid = a.attrelid
          join pg_namespace n on n.oid = c.relnamespace
          where a.attnum > 0 and (n.nspname = 'autotag' and c.relkind in ('r', 'v', 'c') and c.relname <> 'keys'
            or c.oid = 'public.workspace_rate_limits'::regclass)
        union all
        select 'autotag', m[1], m[2], p.proname from pg_proc p
          cross join lateral regexp_matches(p.prosrc, '^\\s+v_(\\w+) ((?:autotag\\.)?[a-z]+(?:_id)?(?:\\[\\])?)[ ;]', 'gn') m
          where p.pronamespace = 'autotag'::regnamespace"""):  # fmt: skip
        plain = name.removeprefix("p_").removesuffix("s")
        expected = (private if schema == "autotag" else public).get(plain)
        if expected and where != "windows" and kind != expected + ("[]" if name.endswith("s") else ""):
            wrong.append((schema, where, name, kind))
    assert wrong == []
    [(functions,)] = project.sql("""
        select array_agg(p.proname::text order by 1) from pg_proc p where p.pronamespace = 'autotag'::regnamespace
          and p.prorettype = any ('{uuid,uuid[]}'::regtype[]) and p.proargnames is distinct from null""")
    assert set(functions) == UUIDS, "a function returns uuids that are no marks, batches or jobs"


def test_a_zero_is_no_user_and_no_key_is_guessed(project: Project) -> None:
    """A token whose id is not of the type means nobody. (Postgres itself refuses other ids.)"""
    nonsense = {"uuid": "x", "bigint": "9" * 30, "integer": str(2**31), "text": None}[project.keys.base[2]]
    if nonsense is not None and project.keys.base[2] != "uuid":
        assert project.as_user(nonsense, "select autotag.may_listen(%s)", f"tagging:{project.workspace}") is False
    assert project.one("select autotag.nobody() is not null")


#: Base type -> ids that are hard to carry.
ODD = {
    "uuid": ["00000000-0000-0000-0000-000000000000", "ffffffff-ffff-ffff-ffff-ffffffffffff"],
    "bigint": ["0", "-1", str(2**53 + 1), str(2**63 - 1), str(-(2**63))],
    "integer": ["0", "-1", str(2**31 - 1), str(-(2**31))],
    "text": ["", " ", "null", "NULL", "{}", "{a,b}", "a,b", '"', "\\", "\\\\", "'", "%s", "%", "_", "é\U0001f984", "x" * 300, "1", "[1]", "\t\n", "a/b"],
}  # fmt: skip


def test_odd_ids_survive_every_way(project: Project) -> None:
    kind = project.keys.base[0]
    odd = [text for text in ODD[kind] if text or project.keys is not KEYS["mixed"]]
    for text in odd:
        project.sql(
            "insert into public.assets (id, workspace_id, image_url) values (%s, %s, 'https://x.org/a')",
            text,
            project.workspace,
        )
    job = project.enqueue(odd)
    assert job["image_count"] == len(odd)
    images = project.claim()
    while found := project.claim():
        images += found
    assert sorted(image["asset_id"] for image in images) == sorted(odd)
    assert project.settle(images)["accepted"] == len(images)
    assert project.rows() == dict.fromkeys(odd, ("completed", ["red"]))
    again = project.one("select jsonb_agg(asset_id) from autotag.tagged_assets(%s, 100)", project.workspace)
    assert sorted(again, key=str) == sorted(project.keys.natural(odd, 0), key=str)
    last = max(odd, key=lambda text: project.one("select count(*) from public.assets where id <= %s", text))
    assert project.one("select cardinality(autotag.list_assets(%s, false, %s, 10))", project.workspace, last) == 0


def test_commands_report_a_wrong_id_with_a_sentence(
    keyed: tuple[psycopg.Connection[Any], Keys], monkeypatch: pytest.MonkeyPatch
) -> None:
    connection, keys = keyed
    info = connection.info
    monkeypatch.setenv(
        "DATABASE_URL", f"postgresql://{info.user}:{info.password}@{info.host}:{info.port}/{info.dbname}"
    )
    for wrong in {"uuid": ["mine"], "bigint": ["mine", "9" * 30], "integer": ["mine", str(2**40)], "text": []}[
        keys.base[1]
    ]:
        for command in ("usage", "enqueue"):
            done = CliRunner().invoke(app, [command, "--workspace", wrong])
            assert done.exit_code == 2, done.output
            assert "An option has a wrong value: " in done.output
            assert len(done.output.strip().splitlines()) <= 3, done.output
    right = CliRunner().invoke(
        app, ["usage", "--workspace", {"uuid": "0" * 32, "text": HOSTILE}.get(keys.base[1], "7"), "--json"]
    )
    assert right.exit_code == 0, right.output
