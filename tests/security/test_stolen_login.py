"""A stolen login of a worker can waste what that login's worker holds, and nothing else.

Each function that ``autotag_worker`` may call is called with hostile values for each of its arguments, by a login that has a
worker of its own beside another login's. After each call nothing of the other's has changed, what is stored is bounded and
printable, nothing was told that is none of its business, and the other worker can still do all the work. Functions are
read from the catalogue: a new one fails until it has a decision here.
"""

from __future__ import annotations

import contextlib
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row

from lab.postgres import LocalPostgres
from lab.stack import WORKER_ROLE
from support import base_type

THIEF_ROLE = "thief"
#: What becomes of a stolen login's calls of each function.
DECISIONS = {
    "batch_answers": "tags or fails the images of a batch that it holds",
    "batch_finish": "ends a batch that it holds: what is left of it is tried again",
    "batch_images": "describes the images of a batch that it holds",
    "batch_split": "makes two of a batch that it holds and builds, none of them empty",
    "batch_step": "moves a batch that it holds, in the one order that there is",
    "note_images": "says what was done to images of a batch that it holds, in few words",
    "batch_submitted": "lets go of a batch that it holds and creates",
    "report_batch_failure": "puts off a batch that it holds; trouble of the account stops everybody until somebody's probe works",
    "record_poll": "says what the provider says of batches in flight, when it was handed the look at them",
    "claim": "gets what waits, within all limits",
    "claim_batches": "gets batches that wait, and the look at the provider when it is due",
    "describe_tasks": "describes the images that it holds",
    "describe_brief": "says what the images that it holds are asked",
    "report_unreadable": "adds a failure to images that it holds",
    "diagnose": "counts, names of logins, and one image that is not its own",
    "diagnose_write": "has one row written and taken back, as its report on a claimed image would write it",
    "files_deleted": "leaves files of batches that are over to expire at the provider",
    "heartbeat": "keeps its own worker alive",
    "tick_if_due": "runs what is overdue, as pg_cron does",
    "list_unstored": "workspaces whose outcomes wait for the host's rows",
    "metrics": "counts",
    "pick_unstored": "ids of images whose outcomes wait for the host's rows",
    "postpone_stores": "puts off outcomes that wait; says of one image at a time that its row is slow, as it could fail an image that it claims",
    "report_poll_failure": "puts off the looks at the provider, an hour at most",
    "provider_checked": "says the end of the model that is asked, and whether there is a Batch API, when it was asked for that",
    "receive_webhook": "lets workers look at the provider sooner, or not sooner",
    "register_worker": "a worker of its own; its address and key are asked from then on, until they fail or it is gone",
    "release_lost": "gives back what it holds",
    "release_worker": "gives back what it holds",
    "report_stages": "moves its images forward, never to an end",
    "schema_version": "the version",
    "seal_uploads": "makes jobs of uploads that are complete, as every worker does; learns ids, and why the host refuses a row",
    "send_test_broadcast": "a broadcast that means nothing",
    "settle": "tags or fails the images that it holds; waits of an hour at most, limits within bounds",
    "show_batch": "shows on the rows of a batch that the provider has what is so",
    "status": "counts and ids, no image",
    "store_waiting": "stores what waits",
    "take_outbox": "messages that wait for a worker to deliver them, where there is no realtime.send",
    "worker_settings": "two numbers",
}

HOSTILE = (
    "\x1b[31m\x07\x7f\x85\x9b\u061c\u200b\u200e\u200f\u2028\u2029\u202a\u202e\u2066\u2069\ufeff\U000e0041\r\n\tend"
)
LONG = "x" * 20_000
MANY = 10_001  # more than any list of a worker
DEEP = "[" * 1000 + "]" * 1000
HUGE = (10**400, -1e308, 2**63, -1, 0.5)
START = "2040-01-01 12:00:00+00"  # after the installation
SECRET = re.compile(r"[0-9a-f-]{36}/secret-[0-9a-f-]{36}")  # where an image of the scene lies


@dataclass
class Scene:
    """Two workers, of two logins, and what each holds."""

    connection: psycopg.Connection[dict[str, Any]]
    good: str = "00000000-0000-4000-8000-00000000000a"
    thief: str = "00000000-0000-4000-8000-00000000000b"
    tasks: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # worker -> single calls in hand
    batch: dict[str, str] = field(default_factory=dict)
    batch_tasks: dict[str, list[int]] = field(default_factory=dict)
    workspaces: list[str] = field(default_factory=list)
    home: dict[str, str] = field(default_factory=dict)  # worker -> the workspace of its first single call
    theirs: list[int] = field(default_factory=list)  # tasks that the good worker holds, or the provider has
    their_assets: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)  # all of which something may change
    said: list[Any] = field(default_factory=list)  # hostile JSON
    worked_out: dict[str, str | None] = field(default_factory=dict)  # state -> what work_goes_on found
    looked_at: dict[str, str | None] = field(default_factory=dict)  # state -> what is wrong with it
    login: str | None = "?"  # what the session has become; "?": a rollback may have changed it

    def rows(self, statement: str, *arguments: object) -> list[dict[str, Any]]:
        """The rows of a statement that the superuser executes."""
        return self.rows_as(None, statement, *arguments)

    def rows_as(self, login: str | None, statement: str, *arguments: object) -> list[dict[str, Any]]:
        self.become(login)
        cursor = self.connection.execute(statement.encode(), arguments)
        return cursor.fetchall() if cursor.description else []

    def value(self, statement: str, *arguments: object) -> Any:
        return next(iter(self.rows(statement, *arguments)[0].values()))

    def become(self, login: str | None) -> None:
        """The login that the session was opened by, as security definers see it."""
        if login == self.login:
            return
        name = sql.SQL("reset session authorization")
        self.connection.execute(
            name if login is None else sql.SQL("set session authorization {}").format(sql.Identifier(login))
        )
        self.login = login

    def as_(self, login: str, statement: str, *arguments: object) -> Any:
        found = self.rows_as(login, statement, *arguments)
        return next(iter(found[0].values())) if found else None

    def claim(self, login: str, worker: str, images: int) -> list[dict[str, Any]]:
        """The descriptions of the images that the worker's next claim gets."""
        number = self.value("select claim + 1 as n from autotag.workers where id = %s", worker)
        ids = self.as_(login, "select tasks from autotag.claim(%s, %s, %s)", worker, images, number)
        described: list[dict[str, Any]] = self.as_(login, "select autotag.describe_tasks(%s, %s)", worker, ids)
        return described

    def advance(self, seconds: float) -> None:
        self.rows("select set_config('autotag.now', (autotag.now() + make_interval(secs => %s))::text, false)", seconds)


@pytest.fixture
def scene(postgres: LocalPostgres, database: str) -> Iterator[Scene]:
    with psycopg.connect(postgres.url("supabase_admin", database), autocommit=True, row_factory=dict_row) as connection:
        for role in (WORKER_ROLE, THIEF_ROLE):
            with contextlib.suppress(psycopg.errors.DuplicateObject):
                connection.execute(sql.SQL("create role {} login").format(sql.Identifier(role)))
            connection.execute(sql.SQL("grant autotag_worker to {}").format(sql.Identifier(role)))
        yield set_the_scene(Scene(connection))
        connection.execute(sql.SQL("revoke autotag_worker from {}").format(sql.Identifier(THIEF_ROLE)))


def set_the_scene(scene: Scene) -> Scene:
    rows, value = scene.rows, scene.value
    rows("""update autotag.settings set test_clock = true, realtime_max_images = 10, chunk_max_images = 10, express_images = 0,
      batch_poll_interval = '1 min', lease = '150 s'""")
    rows("select set_config('autotag.now', %s, false)", START)
    scene.workspaces = [str(row["id"]) for row in rows(
        "insert into public.workspaces (name) select 'w' || n from generate_series(1, 5) n returning id")]  # fmt: skip
    for number, workspace in enumerate(scene.workspaces):
        assets = [str(row["id"]) for row in rows(
            """insert into public.assets (workspace_id, storage_path)
            select %s, %s || '/secret-' || gen_random_uuid() from generate_series(1, %s) returning id""",
            workspace, workspace, 10 if number < 2 else 11)]  # fmt: skip
        rows("select autotag.start_job(%s, null, %s::uuid[])", workspace, assets)
    for worker, login in ((scene.good, WORKER_ROLE), (scene.thief, THIEF_ROLE)):
        scene.as_(
            login, "select autotag.register_worker(%s, 'host', autotag.schema_version(), true, 'http://p', 'k')", worker
        )
    rows("update autotag.provider_limits set proven_at = autotag.now(), next_poll_at = autotag.now() + interval '1 min',"
         " checked_at = autotag.now()")  # fmt: skip
    for worker, login, images in ((scene.good, WORKER_ROLE, 3), (scene.thief, THIEF_ROLE, 12)):
        scene.tasks[worker] = [
            {"task": task["task"], "attempt": task["attempt"]} for task in scene.claim(login, worker, images)
        ]
        first = scene.tasks[worker][0]["task"]
        scene.home[worker] = str(value("select workspace_id from autotag.tasks where id = %s", first))
        [batch] = scene.as_(login, "select batches from autotag.claim_batches(%s, 1, 1)", worker)
        scene.batch[worker] = batch["batch"]
        scene.batch_tasks[worker] = [row["id"] for row in rows(
            "select id from autotag.tasks where batch_id = %s order by id", batch["batch"])]  # fmt: skip
    assert [len(scene.tasks[worker]) for worker in (scene.good, scene.thief)] == [3, 12]
    # … and one that the provider has
    rows("""update autotag.batches set state = 'submitted', openai_batch_id = 'batch_good', openai_status = 'in_progress',
      submitted_at = autotag.now(), running_at = autotag.now(), progress_at = autotag.now(), request_total = 11, predicted_seconds = 60,
      admitted_at = autotag.now(), asked_at = autotag.now(), output_tokens = 400, attempt = 1 where state = 'planned'""")
    assert value("select count(*) from autotag.batches where state = 'submitted'") == 1
    submitted = value("select id from autotag.batches where state = 'submitted'")
    scene.as_(WORKER_ROLE, "select autotag.show_batch(%s, %s, 0, 100)", scene.good, submitted)
    # an outcome that waits for the host's row
    rows("""select autotag.keep(array(select row(t.id, t.job_id, t.asset_id,
      '{"tags": ["good"], "confidence": {}, "caption": "c", "model": "m"}', null, null, null)::autotag.finished
      from autotag.tasks t where t.lane = 'realtime' and t.worker_id is null and t.retry_at is null order by t.id limit 1), false)""")
    assert value("select count(*) from autotag.unstored") == 1
    theirs = rows("select id, asset_id::text as asset from autotag.tasks where worker_id = %s or batch_id <> %s",
                  scene.good, scene.batch[scene.thief])  # fmt: skip
    scene.theirs, scene.their_assets = [row["id"] for row in theirs], [row["asset"] for row in theirs]
    return scene


# -- what is tried


def results() -> list[Any]:
    tag = "blue"
    return [
        None, 5, "x", [], {}, {"tags": None}, {"tags": "blue"}, {"tags": [1, None, ["blue"], {"tag": "blue"}, True]},
        {"tags": [tag] * 2000, "confidence": {tag: 1}, "caption": "c"},
        {"tags": [f"tag {n}" for n in range(500)], "confidence": {f"tag {n}": 1 for n in range(500)}, "caption": "c"},
        {"tags": [HOSTILE, "x" * 51, LONG, "", " ", "a\nb", tag, "a\\u001bb"], "confidence": {HOSTILE: 1, tag: 1}, "caption": HOSTILE,
         "model": HOSTILE},
        {"tags": [tag, 'a", "b'], "confidence": {tag: 1}, "caption": LONG, "model": LONG},
        *({"tags": [tag], "confidence": {tag: number}, "caption": "c"} for number in HUGE),
        {"tags": [tag], "confidence": {tag: HOSTILE, "other": 1, LONG: 1}, "caption": {"a": HOSTILE}, "model": [HOSTILE]},
        {"tags": [tag], "confidence": [HOSTILE], "caption": "c", HOSTILE: HOSTILE, "more": {"a": LONG}},
        {"tags": [tag], "confidence": {tag: "0.5"}, "caption": "c", "model": "m"},
    ]  # fmt: skip


def errors() -> list[Any]:
    return [
        5, "x", [HOSTILE], {}, {"kind": HOSTILE, "code": HOSTILE, "message": HOSTILE, "origin": HOSTILE, "parameter": HOSTILE},
        {"kind": {"a": 1}, "code": [HOSTILE], "message": {"a": HOSTILE}, "retry": "perhaps", "retry_after": "soon"},
        {"kind": "image", "code": LONG, "message": LONG, "retry": [True]},
        *({"kind": kind, "code": "rate_limited", "message": "m", "retry_after": number, "origin": "provider"}
          for number in HUGE for kind in ("rate_limit", "transient")),
        *({"kind": "account", "code": code, "message": HOSTILE, "origin": "provider"} for code in ("no_batch_api", "http_413", "x")),
        {"kind": "image", "code": "answer_too_long", "message": "m", "retry": True},
        *({"kind": "account", "code": "x", "message": "m", "parameter": parameter, "origin": "provider"}
          for parameter in ("token_cap", "response_format", "reasoning_effort", "detail", "service_tier", "expires_after")),
    ]  # fmt: skip


def usages() -> list[Any]:
    names = ("input", "cached", "cache_write", "output", "reasoning")
    return [
        5, "x", [HOSTILE], {}, *({**dict.fromkeys(names, number), "model": "m", "tier": "t"} for number in HUGE),
        dict.fromkeys((*names, "model", "tier"), HOSTILE), dict.fromkeys((*names, "model", "tier"), LONG),
        {**dict.fromkeys(names, "NaN"), "model": {"a": HOSTILE}, "tier": [HOSTILE]},
        {**dict.fromkeys(names, 10_000_000), "model": "gpt-5.6-sol", "tier": "priority"},
    ]  # fmt: skip


def reports(scene: Scene, worker: str) -> list[Any]:
    """Reports about everything that a worker holds, each hostile in one way."""
    held = [*scene.tasks[worker], *({"task": task, "attempt": 1} for task in scene.batch_tasks[worker])]
    fine = {"result": {"tags": ["stolen"], "confidence": {"stolen": 1}, "caption": "c", "model": "m"}}
    said: list[dict[str, Any]] = [
        fine, *({"result": result} for result in results()), *({"error": error} for error in errors()),
        *({**fine, "usage": usage} for usage in usages()), {**fine, "called": "perhaps"}, {"called": False, "error": {"kind": "image"}},
        *({"stage": stage} for stage in ("queued", "preparing", "completing", "completed", "failed", HOSTILE, 5, None)),
    ]  # fmt: skip
    lists = [[{**task, **report} for task in held] for report in said]
    strange: list[Any] = [
        *({"task": number, "attempt": number} for number in HUGE), {"task": "1", "attempt": "1"}, {"task": HOSTILE},
        {"task": None}, {"task": [1]}, None, 5, HOSTILE, [], [[]],
    ]  # fmt: skip
    return [*lists, [*strange, {**held[0], **fine}]]


def seen(scene: Scene) -> list[Any]:
    """Hostile values for reports about headers and about looks at the provider."""
    names = ("requests_limit", "requests_left", "tokens_limit", "tokens_left", "age", "retry_after", "sent", "sent_age")
    batches = [
        {"id": "batch_good", "status": status, "output_file_id": HOSTILE, "error_file_id": LONG, "total": number,
         "done": number, "error_code": HOSTILE, "error": LONG + HOSTILE, "error_kind": "account"}
        for status in ("gone", "completed", "failed", "in_progress", HOSTILE) for number in HUGE[:4]
    ]  # fmt: skip
    return [
        *(dict.fromkeys(names, value) for value in (*HUGE, 0, 1, "NaN", HOSTILE, None, [1])),
        {"model": HOSTILE, "shutdown_date": "2026-13-99", "batches": False},
        {"model": "gpt-6-luna", "shutdown_date": "2000-01-01", "batches": False},
        {"model": "g*", "shutdown_date": "2026-01-01", "batches": "no"}, *([batch] for batch in batches), batches,
        [{"id": HOSTILE, "status": "completed"}, {"id": ["batch_good"], "status": "gone"}, 5, None],
        [{"id": scene.batch[scene.good], "status": "gone"}],
    ]  # fmt: skip


def values(scene: Scene, kind: str, name: str) -> list[Any]:
    """Hostile values of a type; the first is what the thief would honestly say."""
    own = {"p_worker": scene.thief, "p_batch": scene.batch[scene.thief], "p_workspace_id": scene.home[scene.thief]}.get(
        name
    )
    ids = [own or scene.workspaces[0], None, scene.good, scene.thief, *scene.batch.values(), scene.workspaces[1], str(uuid.uuid4()),
           "00000000-0000-0000-0000-000000000000"]  # fmt: skip
    texts = ["creating", None, "", LONG, HOSTILE, "preparing", "uploading", "planned", "submitted", "ended", "done", "cancelled",
             "queued", "completed", "batch_good", "file-1", "batch.completed", "0.1.0", "99999999999999.1", "0.1.0" + HOSTILE]  # fmt: skip
    if name == "p_version":
        texts.insert(0, "0.1.0")
    if name == "p_claim":
        return [2, None, 1, 0, -1, 2**31 - 1, -(2**31)]  # 1 was its last
    if name == "p_event_type":
        texts.insert(0, "batch.completed")
    hostile: dict[str, list[Any]] = {
        "uuid": ids, "integer": [1, None, 0, -1, 2**31 - 1, -(2**31)], "bigint": [1, None, 0, -1, 2**63 - 1, -(2**63)],
        "boolean": [name != "p_keep", None, name == "p_keep"], "text": texts, "double precision": [1.0, None, float("nan"), float("inf"), -1.0, 1e308],
        "uuid[]": [None, [], [None], [scene.batch[scene.good]], [str(uuid.UUID(int=n)) for n in range(MANY)], [[scene.good]]],
        "bigint[]": [None, [], [None], [task["task"] for task in scene.tasks[scene.good]], list(range(MANY)), [[1, 2]]],
        "integer[]": [[], None, [None], [1], [0], [2**31 - 1] * MANY, [[1, 2]]],
        "text[]": [[], None, [None], [HOSTILE], [LONG], ["file-1"] * MANY, [["a"]]],
        "jsonb": [],
    }  # fmt: skip
    assert kind in hostile, f"{name} is a {kind}: what is hostile there?"
    if kind == "jsonb" and not scene.said:
        plain = ["null", "5", '"x"', "{}", "[]", "[null]", "[[]]", DEEP, '{"a":' * 1000 + "1" + "}" * 1000,
                 json.dumps([{}] * MANY), json.dumps({"kind": "x", "message": LONG}), json.dumps([HOSTILE])]  # fmt: skip
        made = [*reports(scene, scene.thief), *reports(scene, scene.good)[:3], *errors(), *seen(scene)]
        scene.said = [json.dumps(made[0]), None, *plain, *(json.dumps(one) for one in made[1:])]
    return scene.said if kind == "jsonb" else hostile[kind]


@dataclass(frozen=True)
class Attempt:
    function: str
    places: str
    arguments: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.function}({', '.join(repr(a)[:200] for a in self.arguments)})"


def granted(scene: Scene) -> list[tuple[str, list[str], list[str]]]:
    """Each function that the role may call: its name, and its arguments' names and types."""
    found = scene.rows("""
      select p.proname::text as name,
        array(select format_type(t, null) from unnest(p.proargtypes) with ordinality u (t, i) order by i) as kinds,
        coalesce(array(select n from unnest(p.proargnames, p.proargmodes) u (n, m) where coalesce(m, 'i') in ('i', 'b')), '{}') as names
      from pg_proc p where p.pronamespace = 'autotag'::regnamespace and has_function_privilege('autotag_worker', p.oid, 'execute')
      order by 1""")
    return [(row["name"], list(row["names"]), [base_type(kind) for kind in row["kinds"]]) for row in found]


def attempts(scene: Scene, only: str | None) -> Iterator[Attempt]:
    """Calls of every granted function: each hostile value of one argument with valid values of the others; and calls in
    the name of another login's worker."""
    for function, names, kinds in granted(scene):
        if only and function not in only.split():
            continue
        choices = [values(scene, kind, name) for name, kind in zip(names, kinds, strict=True)]
        places = ", ".join(f"%s::{kind}" for kind in kinds)
        honest = [choice[0] for choice in choices]
        yield Attempt(function, places, tuple(honest))
        for at, choice in enumerate(choices):
            for value in choice[1:]:
                yield Attempt(function, places, (*honest[:at], value, *honest[at + 1 :]))
        if "p_worker" in names:
            other = {
                "p_worker": scene.good, "p_batch": scene.batch[scene.good], "p_state": "uploading",
                "p_workspace_id": scene.home[scene.good],
            }  # fmt: skip
            # what would do most: half of a batch is split off, all that is held is given back
            most = {
                "bigint": scene.batch_tasks[scene.good][4],
                "bigint[]": [task["task"] for task in scene.tasks[scene.good]],
                "uuid[]": [],
            }
            theirs = [
                other.get(name, most.get(kind, value)) for name, kind, value in zip(names, kinds, honest, strict=True)
            ]
            stages = [{**task, "stage": "completing"} for task in scene.tasks[scene.good]]
            for told in (
                [*reports(scene, scene.good)[:2], stages, *seen(scene), *errors()] if "jsonb" in kinds else [None]
            ):
                told = json.dumps(told)
                yield Attempt(
                    function, places, tuple(told if k == "jsonb" else v for k, v in zip(kinds, theirs, strict=True))
                )


# -- what must hold afterwards


def of_others(scene: Scene) -> dict[str, Any]:
    """The present state of everything that does not belong to the thief."""
    mine = scene.batch[scene.thief]
    return {
        "tasks": scene.rows("select to_jsonb(t) as row from autotag.tasks t where id = any (%s) order by id", scene.theirs),
        "batches": scene.rows("select to_jsonb(b) as row from autotag.batches b where id <> %s and job_id not in"
                              " (select job_id from autotag.batches where id = %s) order by id", mine, mine),
        "worker": scene.rows("select to_jsonb(w) as row from autotag.workers w where id = %s", scene.good),
        "settings": scene.rows("select to_jsonb(s) as row from autotag.settings s"),
        "kinds": scene.rows("select to_jsonb(k) as row from autotag.error_kinds k order by kind"),
        "quotas": scene.rows("select to_jsonb(q) as row from autotag.quotas q"),
        "models": scene.rows("select name, input_price, output_price, shutdown_date from autotag.models order by name"),
        "assets": scene.rows("select to_jsonb(a) as row from public.assets a where id = any (%s::uuid[]) order by id", scene.their_assets),
    }  # fmt: skip


def texts(scene: Scene) -> list[tuple[str, str, str]]:
    """Columns in which something is stored that people see: table, column, type."""
    return [(row["table"], row["column"], row["type"]) for row in scene.rows("""
      select a.attrelid::regclass::text as table, a.attname::text as column, format_type(a.atttypid, null) as type
      from pg_attribute a join pg_class c on c.oid = a.attrelid
      where c.relkind = 'r' and a.attnum > 0 and not a.attisdropped and format_type(a.atttypid, null) in ('text', 'jsonb', 'text[]')
        and (c.relnamespace = 'autotag'::regnamespace and c.relname not in ('settings', 'error_kinds')
          or c.oid = 'public.assets'::regclass and a.attname not in ('storage_path', 'storage_bucket', 'image_url'))""")]  # fmt: skip


def wrong(scene: Scene, before: dict[str, Any], columns: list[tuple[str, str, str]]) -> str | None:
    """The first promise that an attempt has broken; None: none."""
    after = of_others(scene)
    for what, rows in after.items():
        if rows != before[what]:
            return f"{what} that are not the thief's have changed"
    odd = [
        row["place"] for row in scene.rows(" union all ".join(odd_texts(*column) for column in columns)) if row["odd"]
    ]
    if odd:
        return f"{', '.join(odd)} holds what cannot be shown, or too much"
    [provider] = scene.rows("""
      select requests_per_minute, tokens_per_minute, tokens_per_image, requests_left, tokens_left,
        extract(epoch from greatest(blocked_until, ask_after, autotag.now()) - autotag.now()) as block
      from autotag.provider_limits""")
    if not provider["block"] <= 3600:
        return "the provider is blocked for more than an hour"
    for name, most in (("requests_per_minute", 10**6), ("tokens_per_minute", 2 * 10**9), ("tokens_per_image", 10**6)):
        if not 1 <= provider[name] <= most:
            return f"{name} is {provider[name]}"
    for name in ("requests_left", "tokens_left"):
        if not -1e10 <= provider[name] <= 1e10:
            return f"{name} is {provider[name]}"
    if scene.rows(
        "select 1 from public.workspace_rate_limits w, unnest(w.units) u where u not between 0 and 1000000000"
    ):
        return "a window is out of bounds"
    if scene.rows(
        """select 1 from autotag.usage where not (input_tokens between 0 and 10000000 * requests::bigint and
      output_tokens between 0 and 10000000 * requests::bigint and images <= requests and coalesce(cost, 0) between 0 and 1000 * requests)
      or requests > 40 or workspace_id <> all (%s::uuid[])""",
        scene.workspaces,
    ):
        return "usage is out of bounds"
    if scene.value("select count(*) from autotag.workers") > 3:
        return "there are workers that nobody registered"
    return None


def odd_texts(table: str, column: str, kind: str) -> str:
    """SQL for whether a column of a table holds a text that cannot be shown, or one that is too long."""
    name = f'"{column}"'
    shown = name if kind == "text" else f"replace({name}::text, '\\\\', '')"
    escape = "" if kind == "text" else f" or {shown} ~ '\\\\[bfnrtu]'"
    most = 1000 if kind == "text" else 30_000
    condition = f"{printable_not(shown)}{escape} or length({name}::text) > {most}"
    return f"select '{table}.{column}' as place, exists (select from {table} where {condition}) as odd"


def printable_not(column: str) -> str:
    """SQL for a text that has something odd in it, without asking what is tested here."""
    odd = r"[\u0001-\u001f\u007f-\u009f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\U000e0000-\U000e007f]"
    return f"{column} ~ '{odd}'"


def told_too_much(scene: Scene, answer: str, function: str) -> bool:
    """Whether an answer names an image that the thief does not hold (the doctor's sample is one)."""
    told = set(SECRET.findall(answer))
    if function == "diagnose":
        return len(told) > 1
    held = {row["storage_path"] for row in scene.rows(
        """select a.storage_path from public.assets a join autotag.tasks t on t.asset_id = a.id
        left join autotag.batches b on b.id = t.batch_id where t.worker_id = %s or b.worker_id = %s""",
        scene.thief, scene.thief)}  # fmt: skip
    return not told <= held


def drain(scene: Scene) -> str | None:
    """Lets the good worker do everything that there is; what is left, if it cannot."""
    good = {"tags": ["good"], "confidence": {"good": 1}, "caption": "c", "model": "m"}
    usage = {
        "input": 700,
        "cached": 0,
        "cache_write": 0,
        "output": 100,
        "reasoning": 0,
        "model": "gpt-6-luna",
        "tier": "default",
    }
    own = [*scene.tasks[scene.good]]
    for _ in range(200):
        told = json.dumps([{**task, "result": good, "usage": usage} for task in own])
        sent: str | None = json.dumps({"sent": len(own), "sent_age": 0})
        for workspace in homes(scene, own) or scene.workspaces[:1]:
            scene.as_(WORKER_ROLE, "select autotag.settle(%s, %s, %s, %s)", scene.good, workspace, told, sent)
            sent = None
        [waiting] = scene.rows_as(WORKER_ROLE, "select workspaces::text[] from autotag.list_unstored(%s)", scene.good)
        for workspace in waiting["workspaces"]:
            scene.as_(
                WORKER_ROLE,
                "select autotag.store_waiting(%s, %s, autotag.pick_unstored(%s, %s, 1000))",
                scene.good,
                workspace,
                scene.good,
                workspace,
            )
        for batch in scene.rows("select id, attempt, state from autotag.batches where worker_id = %s", scene.good):
            lines = scene.rows("select id from autotag.tasks where batch_id = %s", batch["id"])
            answers = json.dumps([{"task": line["id"], "result": good, "usage": usage} for line in lines])
            held = (scene.good, batch["id"], batch["attempt"])
            scene.as_(WORKER_ROLE, "select autotag.batch_answers(%s, %s, %s, %s)", *held, answers)
            scene.as_(WORKER_ROLE, "select autotag.batch_finish(%s, %s, %s)", *held)
        if not scene.value("select count(*) from autotag.tasks where finished_at is null"):
            return None
        for _ in range(1 if own else 5):
            scene.advance(60 if own else 70)  # a lease is 150 s, and half of it without a beat is an outage
            scene.as_(WORKER_ROLE, "select autotag.heartbeat(%s, '{}', '{}')", scene.good)
        scene.as_(WORKER_ROLE, "select autotag.tick_if_due()")
        claimed = scene.claim(WORKER_ROLE, scene.good, 1000)
        own = [{"task": task["task"], "attempt": task["attempt"]} for task in claimed]
        number = scene.value("select batch_claim + 1 as n from autotag.workers where id = %s", scene.good)
        [look] = scene.rows_as(WORKER_ROLE, "select poll from autotag.claim_batches(%s, 50, %s)", scene.good, number)
        if look["poll"]:
            ended = json.dumps(
                [{"id": one["id"], "status": "completed", "total": 11, "done": 11} for one in look["poll"]]
            )
            scene.as_(WORKER_ROLE, "select autotag.record_poll(%s, %s)", scene.good, ended)
    left = scene.rows("select lane, stage, count(*) as n from autotag.tasks where finished_at is null group by 1, 2")
    return f"images are never tagged: {left}"


def homes(scene: Scene, tasks: list[dict[str, Any]]) -> list[str]:
    """The workspaces of tasks."""
    ids = [task["task"] for task in tasks]
    rows = scene.rows("select distinct workspace_id::text as w from autotag.tasks where id = any (%s) order by 1", ids)
    return [row["w"] for row in rows]


def find(scene: Scene, only: str | None = None, naming: str | None = None, most: int = 5) -> tuple[list[str], int]:
    """Makes the attempts. Returns the promises that they have broken, and how many attempts there were.

    Args:
        scene: the scene.
        only: only attempts at these functions.
        naming: only attempts with this argument.
        most: stops when it has found so many.
    """
    before, columns = of_others(scene) | {"everything": fingerprint(scene)}, texts(scene)
    found: list[str] = []
    count = 0
    for attempt in attempts(scene, only):
        if naming and naming not in attempt.arguments:
            continue
        count += 1
        problem = try_out(scene, attempt, before, columns)
        if problem:
            found.append(f"{problem}: {attempt}")
            if len(found) == most:
                break
    return found, count


class Over(Exception):
    """The attempt is over; nothing of it stays."""


def try_out(scene: Scene, attempt: Attempt, before: dict[str, Any], columns: list[tuple[str, str, str]]) -> str | None:
    problem: str | None = None
    try:
        with scene.connection.transaction():
            scene.rows("select setseed(0)")  # waits are jittered: states that differ in nothing else are one
            begun = time.monotonic()
            answer, refused = call(scene, attempt)
            took = time.monotonic() - begun
            if refused is not None:
                problem = refused or None
            elif took > 5:
                problem = f"it took {took:.1f} s"
            elif told_too_much(scene, answer, attempt.function):
                problem = "it told of images that the thief does not hold"
            elif scene.value("select pg_current_xact_id_if_assigned() is null"):
                pass  # nothing was written
            elif (state := fingerprint(scene)) != before["everything"]:
                if state not in scene.looked_at:
                    scene.looked_at[state] = wrong(scene, before, columns)
                problem = scene.looked_at[state] or work_goes_on(scene)
            raise Over
    except Over:
        scene.login = "?"
        scene.rows("select set_config('autotag.now', %s, false)", START)
    return problem


def work_goes_on(scene: Scene) -> str | None:
    """Lets the good worker finish its work, and returns what is undone or wrong afterwards; None: nothing.

    That depends on all that is stored but the tags and the bill of what is done, the ids of webhooks and the words of
    errors; and of what is asked, on whether it is the good worker's. States that differ only there are tried once.
    """
    asked = f"""exists (select from autotag.workers g where g.id = '{scene.good}'
      and (g.base_url, g.fingerprint) is not distinct from (t.base_url, t.fingerprint))"""
    row = "to_jsonb(t) - array['error', 'base_url', 'fingerprint']"
    state = fingerprint(
        scene,
        ("assets", "autotag.usage", "autotag.webhooks"),
        lambda table: f"({row}, {asked})" if table in ("autotag.workers", "autotag.provider_limits") else f"({row})",
    )
    if state not in scene.worked_out:
        scene.worked_out[state] = drain(scene) or wrong_at_the_end(scene)
    return scene.worked_out[state]


def fingerprint(scene: Scene, without: tuple[str, ...] = (), of: Callable[[str], str] = lambda _: "t") -> str:
    """A hash of all tables except ``without``. of: the SQL that stands for a row of a table."""
    if not scene.tables:
        scene.tables = [row["name"] for row in scene.rows("""
          select oid::regclass::text as name from pg_class where relkind = 'r' and (relnamespace = 'autotag'::regnamespace
            or oid = 'public.assets'::regclass) order by 1""")]  # fmt: skip
    parts = ", ".join(
        f"(select md5(coalesce(string_agg({of(table)}::text, ' ' order by {of(table)}::text), '')) from {table} t)"
        for table in scene.tables
        if table not in without
    )
    return str(scene.value(f"select concat({parts})"))


def call(scene: Scene, attempt: Attempt) -> tuple[str, str | None]:
    """The function's answer, and what is wrong with the form of a refusal ("": nothing; None: it was not refused)."""
    try:
        with scene.connection.transaction():
            found = scene.rows_as(
                THIEF_ROLE,
                f"select to_jsonb(f)::text as f from autotag.{attempt.function}({attempt.places}) f",
                *attempt.arguments,
            )
            return " ".join(str(row["f"]) for row in found), None
    except psycopg.Error as error:
        scene.login = "?"
        state = error.sqlstate or ""
        # What is no number or no list of ids does not reach the function.
        fine = state.startswith("PT4") or (state.startswith("22") and not error.diag.context) or state == "54001"
        return "", "" if fine else f"{state} {error.diag.message_primary} ({(error.diag.context or '')[:150]})"


def wrong_at_the_end(scene: Scene) -> str | None:
    held = [task["task"] for task in scene.tasks[scene.good]]
    if scene.rows("select 1 from autotag.tasks where id = any (%s)", held):
        return "what the good worker held has failed"
    if scene.value("select count(*) from public.assets where tags = '{good}'") < 3:
        return "the good worker's tags are not stored"
    return None


def test_every_function_of_a_worker_has_a_decision(scene: Scene) -> None:
    assert {name for name, _, _ in granted(scene)} == set(DECISIONS)


@pytest.mark.long
def test_a_stolen_login_wastes_nothing_but_its_own(scene: Scene) -> None:
    found, count = find(scene)
    assert found == [], "\n".join(found)
    assert count >= 300


def test_an_honest_call_is_told_where_its_images_lie(scene: Scene) -> None:
    """A worker learns the paths of the images that it holds. So there are secrets that the other tests could find in an
    answer to the thief."""
    mine, theirs = (scene.batch[worker] for worker in (scene.thief, scene.good))
    images = scene.as_(THIEF_ROLE, "select autotag.batch_images(%s, %s, 1, 0, 1000)", scene.thief, mine)
    paths = {image["path"] for image in images}
    assert len(paths) == len(scene.batch_tasks[scene.thief])
    assert all(SECRET.fullmatch(path) for path in paths)
    assert not told_too_much(scene, json.dumps(images), "batch_images")
    images = scene.as_(WORKER_ROLE, "select autotag.batch_images(%s, %s, 1, 0, 1000)", scene.good, theirs)
    assert told_too_much(scene, json.dumps(images), "batch_images")
    scene.advance(60)
    scene.as_(WORKER_ROLE, "select autotag.release_worker(%s)", scene.good)
    claimed = scene.claim(THIEF_ROLE, scene.thief, 100)
    assert claimed
    assert all(SECRET.fullmatch(task["path"]) for task in claimed)
    assert not told_too_much(scene, json.dumps(claimed), "claim")


#: Defences, each broken on purpose: what replaces it, and the functions whose attempts have to show it.
BROKEN = {
    "logins are not told apart": ("""
      create or replace function autotag.is_own_worker(p_worker uuid) returns boolean language sql as 'select true'""", "settle batch_images release_worker"),
    "any text is printable": ("""
      create or replace function autotag.printable(p_text text, p_length integer) returns text language sql strict
      as 'select left(p_text, p_length)'""", "register_worker settle"),
    "no number is clamped": ("""
      create or replace function autotag.clean_number(p_report jsonb, p_name text, p_min double precision, p_max double precision)
      returns double precision language sql as $$ select case when jsonb_typeof(p_report -> p_name) = 'number'
        and abs((p_report ->> p_name)::numeric) < 1e300 then (p_report ->> p_name)::double precision end $$""", "settle report_poll_failure"),
    "results are stored as they come": ("""
      create or replace function autotag.canonical_results(p_results jsonb[]) returns boolean[] language sql
      as 'select array_fill(true, array[cardinality(p_results)])'""", "settle batch_answers"),
    "whatever was learned is believed": ("""
      create or replace function autotag.guess_prompt(p_question jsonb) returns integer language sql as 'select 100000000'""", "settle"),
}  # fmt: skip


OWN = "create or replace function autotag.is_own_worker(p_worker uuid) returns boolean language sql as 'select true'"
LEASE = "create or replace function autotag.lock_worker(p_worker uuid) returns boolean language sql as 'select true'"
LOOK = "create or replace function autotag.is_poll_assigned(p_worker uuid) returns timestamptz language sql as 'select autotag.now()'"
#: What tells logins apart, replaced, and the functions that stand behind it: each alone has to be noticed. (Of the scene's
#: there is nothing that files_deleted, report_poll_failure, batch_submitted and claim_batches could do in the other's name.)
TOLD_APART = {
    "batch_images": OWN, "settle": OWN, "report_stages": OWN, "release_worker": OWN, "release_lost": OWN, "describe_tasks": OWN, "report_unreadable": OWN, "batch_answers": OWN,
    "batch_finish": OWN, "batch_split": OWN, "report_batch_failure": OWN, "batch_step": OWN, "claim": LEASE, "record_poll": LOOK,
    "provider_checked": LOOK,
}  # fmt: skip


@pytest.mark.parametrize("function", TOLD_APART)
def test_each_group_of_functions_tells_logins_apart(scene: Scene, function: str) -> None:
    scene.rows(TOLD_APART[function])
    assert find(scene, function, naming=scene.good, most=1)[0] != []


@pytest.mark.parametrize("defence", BROKEN)
def test_a_broken_defence_is_noticed(scene: Scene, defence: str) -> None:
    statement, functions = BROKEN[defence]
    scene.rows(statement)
    assert find(scene, functions, most=1)[0] != []


def test_a_report_of_usage_is_believed_up_to_a_bound(scene: Scene) -> None:
    """Ten million tokens, of a dearer model in a dearer tier, do not use up a month's quota."""
    scene.rows("update autotag.settings set service_tier = 'default'")
    scene.rows("select autotag.sync_question(p) from autotag.provider_limits p")
    scene.rows("update autotag.tasks set reserved_at = autotag.now() where worker_id = %s", scene.thief)
    task = scene.tasks[scene.thief][0]
    lie = dict.fromkeys(("input", "cached", "cache_write", "output", "reasoning"), 10_000_000)
    workspace = scene.value("select workspace_id from autotag.tasks where id = %s", task["task"])
    scene.as_(THIEF_ROLE, "select autotag.settle(%s, %s, %s)", scene.thief, workspace, json.dumps([
        {**task, "result": {"tags": ["a"]}, "usage": {**lie, "model": "gpt-5.6-sol", "tier": "priority"}}]))  # fmt: skip
    [row] = scene.rows("""select u.cost, u.input_tokens, u.output_tokens, autotag.price_tokens('gpt-6-luna', 'default',
      u.input_tokens, u.cached_tokens, u.cache_write_tokens, u.output_tokens) as asked, (autotag.believable_usage()).input as bound
      from autotag.usage u where u.model = 'gpt-5.6-sol'""")
    assert row["input_tokens"] == row["bound"] <= 100_000
    assert row["output_tokens"] <= 4 * 16_000 + 4000
    assert row["cost"] == row["asked"]
    assert row["cost"] < 0.1


def test_what_a_worker_reported_of_the_provider_is_tried_anew(scene: Scene) -> None:
    """A day after the login was revoked, or at once with forget_provider()."""
    scene.rows("update autotag.models set cap_parameter = 'max_tokens' where name = 'gpt-6-luna'")  # by the owner
    before = scene.rows("select m.* from autotag.models m where m.name = 'gpt-6-luna'")

    def degrade() -> None:
        for parameter in ("token_cap", "response_format", "response_format", "detail"):
            assert scene.value("select autotag.downgrade_request_form('gpt-6-luna', %s)", parameter)
        scene.rows("update autotag.provider_limits set has_batches = false, batches_refused = true, keep_files = null,"
                   " degraded_at = autotag.now()")  # fmt: skip

    def healed() -> bool:
        [provider] = scene.rows("select has_batches, batches_refused, keep_files from autotag.provider_limits")
        return scene.rows("select m.* from autotag.models m where m.name = 'gpt-6-luna'") == before and provider == {
            "has_batches": None,
            "batches_refused": False,
            "keep_files": 604800,
        }

    degrade()
    scene.advance(3600)
    scene.rows("select autotag.tick()")
    assert not healed()
    scene.advance(24 * 3600)
    scene.rows("select autotag.tick()")
    assert healed()
    degrade()
    scene.rows(
        "update autotag.models set answer_format = 'json_object' where name = 'gpt-6-luna'"
    )  # by the owner, meanwhile
    scene.rows("select autotag.forget_provider()")
    assert scene.value("select answer_format from autotag.models where name = 'gpt-6-luna'") == "json_object"
    scene.rows("update autotag.models set answer_format = 'json_schema' where name = 'gpt-6-luna'")
    assert healed()
    assert scene.value("select proven_at is null from autotag.provider_limits")
