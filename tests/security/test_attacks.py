"""Each role can do what the documentation says and nothing else: attempts of every kind of attacker, and controls that
break one defence each and are found."""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest
from attacks import api, broadcaster, member, port, topics, uploader, whose
from attacks.attempt import Attempt, run
from attacks.scene import Scene, set_scene
from psycopg.rows import dict_row
from rich.console import Console

from autotag.cli import console, watch
from autotag.cli.screen import render
from autotag.http import guard, webhook
from autotag.http.serve import serve
from autotag.openai import answers
from autotag.openai.provider import Provider
from autotag.operate.follow import follow
from lab.postgres import free_port
from lab.stack import Stack, worker_process
from support import paid, until, widen, worker

LEAST = 60  # attempts of each role
WATCH = "12:00:00"  # how each line of `autotag watch` begins here


@pytest.fixture
async def scene(stack: Stack) -> AsyncIterator[Scene]:
    async with set_scene(stack) as furnished:
        yield furnished


def assert_nothing(findings: list[str]) -> None:
    assert not findings, f"{len(findings)} attempts had an effect or an odd answer:\n" + "\n".join(findings[:50])


def outsiders(scene: Scene, caller: str) -> list[Attempt]:
    """Attempts of a caller who has nothing to do with the victim's workspace."""
    kinds = (api.rpcs, api.rows, api.storage, api.tokens, topics.private_topics, api.statements)
    return [attempt for kind in kinds for attempt in kind(scene, caller)]


@pytest.mark.parametrize("caller", ["anon", "nobody", "neighbour"])
async def test_outsiders(scene: Scene, caller: str) -> None:
    attempts = outsiders(scene, caller)
    assert len(attempts) >= LEAST
    before = scene.snapshot(caller)
    async with scene.victim_listens():
        found = await run(scene, attempts)
    found += [f"asked: {entry}" for entry in scene.stack.simulator.request_log]
    assert_nothing(found + await scene.findings(before, caller))


async def test_a_member(scene: Scene) -> None:
    """A member with a quota of five images a day gets no more than five, also by the calls that the provider has
    recorded."""
    assets = await member.furnish(scene)
    member.take_announcements(scene)
    before = scene.snapshot("member")
    attempts = [*member.tables(scene), *member.rpcs(scene), *member.limits(scene, assets)]
    assert len(attempts) >= LEAST
    async with scene.victim_listens():
        found = await run(scene, attempts)
    ended = scene.member.sql(
        "select id from autotag.jobs where workspace_id = %s and finished_at is not null",
        scene.member.member.workspace,
    )
    assert 0 < member.take_announcements(scene) <= len(ended)
    found += await scene.findings(before, "member") + member.cheating(scene)
    assert_nothing(found)
    async with worker(scene.stack):
        await until(
            lambda: not scene.member.sql("select id from autotag.jobs where finished_at is null"), "every upload"
        )
    assert len(paid(scene.stack)) <= member.QUOTA + 1, "the victim's one image is paid for, too"
    scene.victim.check_tags([scene.ids["live asset"]])


@pytest.fixture
async def served(scene: Scene, tmp_path: Path) -> AsyncIterator[port.Ports]:
    """A worker process with both its ports, which has done what there was to do; its log is in `tmp_path`."""
    ports = port.Ports(free_port(), free_port())
    environment = scene.stack.worker_environment() | {
        "AUTOTAG_HTTP": f"{port.HOST}:{ports.http}", "AUTOTAG_WEBHOOK": f"{port.HOST}:{ports.webhook}",
        "OPENAI_WEBHOOK_SECRET": scene.stack.simulator.plan.webhook_secret,
    }  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        async with worker_process(environment, log):
            await idle(scene)
            yield ports


async def idle(scene: Scene) -> None:
    await until(lambda: not scene.member.sql("select id from autotag.jobs where finished_at is null"), "every upload")
    last: dict[str, Counter[str]] = {}

    def is_stable() -> bool:
        nonlocal last
        before, last = last, scene.snapshot()
        return last == before

    await until(is_stable, "the last reports")


def log_findings(log: Path, most: int) -> list[str]:
    """Lines that should not be in a log, and a log that is too long."""
    text = log.read_bytes()
    found = [f"log: {len(text):,} bytes"] if len(text) > most else []
    found += [f"log: {line[:300]!r}" for line in text.splitlines() if not _is_event(line)]
    return found + [
        f"log: {line[:3000]!r}"
        for line in text.splitlines()
        if b"Traceback" in line or b"unexpected_error_raised" in line
    ]


def _is_event(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict) and line.isascii() and line.decode().isprintable()
    except ValueError:
        return False


async def test_the_ports(scene: Scene, served: port.Ports, tmp_path: Path) -> None:
    secret = scene.stack.simulator.plan.webhook_secret
    attempts = [*port.requests(served), *port.deliveries(served, secret)]
    assert len(attempts) >= LEAST
    before, asked_before = scene.snapshot(), len(scene.stack.simulator.request_log)
    found = await run(scene, attempts) + await scene.findings(before)
    found += [f"asked: {entry}" for entry in scene.stack.simulator.request_log[asked_before:]]
    # With the secret: a look at OpenAI, and the deliveries' ids.
    found += await run(scene, port.stolen(served, secret))
    found += [line for line in await scene.findings(before) if "autotag.webhooks got" not in line]
    found += [
        f"asked: {e}"
        for e in scene.stack.simulator.request_log[asked_before:]
        if (e["method"], e["path"]) != ("GET", "/v1/batches")
    ]
    assert_nothing(found + log_findings(tmp_path / "log", 100_000))
    assert b"200 OK" in await port.exchange(served.http, b"GET /healthz HTTP/1.0\r\n\r\n")


async def test_the_public_topic(scene: Scene, capsys: pytest.CaptureFixture[str]) -> None:
    """Messages on the public topic reach its listeners as text, and have no other effect."""
    attempts = broadcaster.attempts(scene)
    assert len(attempts) >= LEAST
    assert_nothing(await watched(scene, attempts, capsys, 1000))


async def watched(scene: Scene, attempts: list[Attempt], capsys: pytest.CaptureFixture[str], least: int) -> list[str]:
    """Makes the attempts while `autotag watch` runs. Returns everything wrong in its output, and every other effect."""
    told: list[dict[str, Any]] = []

    def show(topic: str, event: str, payload: dict[str, Any]) -> None:
        told.append(payload)
        console.say(f"{WATCH}  {topic:<45}  {event:<14}  {watch.describe_payload(payload)}")
        console.say_json({"topic": topic, "event": event, "payload": payload})

    def has_joined() -> bool:
        """Whether it has shown a message that is sent here."""
        scene.victim.sql(
            """select realtime.send('{"batch_id": "first"}'::jsonb, 'batch-complete', 'batch-updates', false)"""
        )
        return any(payload.get("batch_id") == "first" for payload in told)

    workspace = scene.victim.member.workspace
    watching = asyncio.create_task(follow(scene.stack.supabase_url, scene.stack.secret_key, workspace, show))
    try:
        await until(lambda: has_joined() or watching.done(), "it to join")
        before, joined = scene.snapshot(), len(told)
        async with scene.victim_listens():
            found = await run(scene, attempts)
        found += await scene.findings(before)
        scene.victim.sql(
            """select realtime.send('{"batch_id": "real"}'::jsonb, 'batch-complete', 'batch-updates', false)"""
        )
        await until(lambda: any(p.get("batch_id") == "real" for p in told) or watching.done(), "the real message")
        assert not watching.done(), watching.exception()
    finally:
        watching.cancel()
    assert len(told) - joined >= least, "the forged ones arrive"
    for line in capsys.readouterr().out.split("\n"):
        as_text = line.startswith((f"{WATCH}  batch-updates", f"{WATCH}  tagging:")) and len(line) < 20_000
        if line and not (line.isprintable() and (as_text or line.startswith("{"))):
            found.append(f"shown: {line[:200]!r}")
    return found


async def test_an_uploader(scene: Scene, tmp_path: Path) -> None:
    """Each hostile upload ends with the expected sentence, and everybody else's pictures get their tags meanwhile."""
    uploads, stack = uploader.Uploads(), scene.stack
    await uploads.insert(scene)
    widen(stack)
    stack.configure(batch_max_images=1000, chunk_max_images=900, chunk_size=200)
    attempts = uploads.attempts()
    assert len(attempts) >= LEAST
    environment = stack.worker_environment() | {
        "AUTOTAG_IMAGE_MAX_BYTES": str(uploader.MAX_BYTES), "AUTOTAG_MEMORY": str(uploader.MEMORY),
        "AUTOTAG_IMAGE_HOSTS": uploader.HOSTS,
    }  # fmt: skip
    enqueue_all(scene, [asset for asset, _ in uploads.assets.values()])
    scene.victim.enqueue(uploads.good)
    with (tmp_path / "log").open("wb") as log:
        async with worker_process(environment, log):
            await idle(scene)
    found = await run(scene, attempts) + uploader.stored(scene)
    scene.victim.check_tags([*uploads.good, scene.ids["live asset"]])
    victims = [drawing.tags for drawing in scene.victim.drawings.values()]
    times = Counter(frozenset(entry["tags"]) for entry in paid(stack) if frozenset(entry["tags"]) in victims)
    found += [f"asked: a picture of the victim's {n} times" for n in times.values() if n > 1]
    found += [f"asked: {entry}" for entry in stack.simulator.request_log if entry["status"] not in (200, 404)]
    found += log_findings(tmp_path / "log", 400 * len(attempts) + 20_000)
    shown = io.StringIO()
    with psycopg.connect(stack.database_url(), row_factory=dict_row) as connection:
        row = connection.execute("select autotag.status() as s").fetchone()
    Console(file=shown, width=250, force_terminal=True, color_system=None).print(render(row["s"]))
    found += [f"shown: {line[:200]!r}" for line in shown.getvalue().split("\n") if not line.isprintable()]
    assert_nothing(found)


def enqueue_all(scene: Scene, assets: list[str]) -> None:
    """Enqueues like automatic mode, because `enqueue_tagging` refuses rows that name another user's file."""
    member = scene.member.member
    scene.member.sql("select autotag.start_job(%s, %s, %s::uuid[])", member.workspace, member.user, assets)


async def test_a_user_calls_by_sql_what_stands_behind_the_rpcs(scene: Scene) -> None:
    """The API does not expose the schema autotag. But even a direct call of its functions does not accept another
    workspace's images."""
    foreign = whose.insert(scene, foreign_ways(scene)[:6])
    attempts = api.behind(scene, "neighbour", list(foreign.values()))
    before = scene.snapshot("neighbour")
    async with scene.victim_listens():
        found = await run(scene, attempts)
    assert_nothing(found + await scene.findings(before, "neighbour"))
    async with worker(scene.stack):
        await idle(scene)
    rows = {asset: row["tags"] for asset, row in scene.neighbour.assets().items()}
    assert any(rows.values()), "their own are tagged"
    assert not [asset for asset in foreign.values() if rows[asset]]


# -- whose a file is


def foreign_ways(scene: Scene) -> list[whose.Way]:
    return [way for way in whose.ways(scene) if way.foreign]


def odd_ways(scene: Scene) -> list[whose.Way]:
    """The ways that do not name the file by its ordinary name."""
    return [way for way in whose.ways(scene) if way.name not in ("itself", "in its own bucket")]


async def test_a_row_that_names_anothers_file_is_refused(scene: Scene) -> None:
    foreign = foreign_ways(scene)
    before = scene.snapshot("neighbour")
    found = await run(scene, whose.attempts(scene, foreign))
    assert_nothing(found + await scene.findings(before, "neighbour"))


async def test_a_row_that_names_anothers_file_later_is_not_tagged(scene: Scene) -> None:
    """A row names a file of its own workspace when it is enqueued, and another workspace's file when the worker asks
    for its location."""
    foreign = foreign_ways(scene)
    own = scene.neighbour
    assets = own.insert([f"{own.member.workspace}/{i}.jpg" for i in range(len(foreign))])
    own.enqueue(assets)
    for asset, way in zip(assets, foreign, strict=True):
        own.sql(
            "update public.assets set storage_path = %s, storage_bucket = %s where id = %s", way.path, way.bucket, asset
        )
    assert_nothing(await stolen_tags(scene))


async def test_odd_names_lead_to_nobody_elses_file(scene: Scene) -> None:
    """Even without the file rule, an odd spelling of a file's name does not lead to that file."""
    [told] = scene.neighbour.sql("select pg_get_functiondef('autotag.describe_assets'::regproc) as code")
    rule = "f.bucket in ('assets') and starts_with(f.path, a.workspace_id::text || '/')"
    assert rule in told["code"]
    broken(scene, told["code"].replace(rule, "true"))
    for asset in whose.insert(scene, odd_ways(scene)).values():
        with suppress(psycopg.ProgrammingError):  # refused, whatever the rule
            scene.neighbour.enqueue([asset])
    assert scene.neighbour.sql("select 1 from autotag.tasks"), "some are taken, and then looked for"
    assert_nothing(await stolen_tags(scene))


async def stolen_tags(scene: Scene) -> list[str]:
    """Runs a worker, and returns the neighbour's rows in which it has stored tags, that is tags of the victim's
    picture."""
    async with worker(scene.stack, image_hosts=frozenset({"127.0.0.1", "localhost"})):
        await idle(scene)
    rows = scene.neighbour.assets().values()
    return [f"stored: {row['storage_path']} {row['tags']}" for row in rows if row["tags"] or row["tagging_result"]]


# -- controls: one defence is broken, and the attempts find it


def broken(scene: Scene, *statements: str) -> None:
    with psycopg.connect(scene.stack.database_url("supabase_admin"), autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


async def control(scene: Scene, caller: str, attempts: list[Attempt], only: str) -> list[str]:
    before = scene.snapshot(caller)
    async with scene.victim_listens():
        found = await run(scene, attempts, only)
    return found + await scene.findings(before, caller)


async def test_a_grant_to_anon_is_found(scene: Scene) -> None:
    broken(scene, "grant usage on schema autotag to anon",
           "grant execute on function public.tagging_strategy, autotag.describe_strategy to anon")  # fmt: skip
    found = await control(scene, "anon", api.rpcs(scene, "anon"), "calls tagging_strategy")
    assert any("as it is meant to be: 200" in line for line in found), found


async def test_rows_that_anon_sees_are_found(scene: Scene) -> None:
    broken(
        scene,
        "grant select on public.assets to anon",
        "create policy p on public.assets for select to anon using (true)",
    )
    found = await control(scene, "anon", api.rows(scene, "anon"), "GET assets")
    assert any("told the victim's tag" in line for line in found), found


async def test_a_membership_of_everybody_is_found(scene: Scene) -> None:
    broken(scene, "create or replace function autotag.is_member(p_workspace_id autotag.workspace_id) returns boolean language sql stable"
                  " security definer set search_path = pg_catalog, pg_temp as 'select true'")  # fmt: skip
    attempts = [*api.rpcs(scene, "nobody"), *topics.private_topics(scene, "nobody")]
    found = await control(scene, "nobody", attempts, "as it is meant to be|joins private")
    for sign in (
        "calls cancel_tagging as",
        "calls tagging_usage as",
        "joins private 'tagging:",
        "changed: autotag.jobs",
    ):
        assert any(sign in line for line in found), (sign, found)


async def test_a_dropped_policy_is_found(scene: Scene) -> None:
    broken(
        scene,
        "alter table public.assets disable row level security",
        "alter table storage.objects disable row level security",
    )
    attempts = [*api.rows(scene, "neighbour"), *api.storage(scene, "neighbour")]
    found = await control(scene, "neighbour", attempts, "DELETE assets|GET assets|Storage (PUT|POST object/list)")
    for sign in ("told the victim's path", "changed: public.assets lost", "changed: the file"):
        assert any(sign in line for line in found), (sign, found)


async def test_who_may_speak_on_a_private_topic_is_found(scene: Scene) -> None:
    broken(scene, "create policy p on realtime.messages for insert to anon with check (true)")
    attempts = [a for a in topics.private_topics(scene, "anon") if "over HTTP to private" in a.name]
    assert any("heard by the victim" in line for line in await control(scene, "anon", attempts, "")), (
        "nothing was heard"
    )


async def test_a_quota_that_counts_nothing_is_found(scene: Scene) -> None:
    assets = await member.furnish(scene)
    broken(scene, "create or replace function autotag.check_quotas(p_workspace_id autotag.workspace_id, p_user_id autotag.user_id, p_images integer,"
                  " p_each numeric default null) returns void language sql as ''", "grant update (tagging_eta) on public.assets to authenticated")  # fmt: skip
    attempts = [*member.tables(scene), *member.limits(scene, assets)]
    found = await control(scene, "member", attempts, "ten at the same time|changes assets.tagging_eta")
    assert any("ten at the same time: 10 taken" in line for line in found), found
    assert any("changes assets.tagging_eta" in line for line in found), found


async def test_a_port_without_limits_or_signatures_is_found(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    provider, secret = Provider("none", "http://none.invalid/v1", 1), scene.stack.simulator.plan.webhook_secret
    monkeypatch.setattr(guard, "MAX_BODY_BYTES", 10**9)
    monkeypatch.setattr(provider._client.webhooks, "verify_signature", lambda *_, **__: None)

    async def receive(*_: str) -> str:
        return "accepted"

    here = port.Ports(free_port(), free_port())
    async with serve(webhook.make_app(provider, secret, receive), port.HOST, here.webhook, guarded=True):
        attempts = [a for a in port.requests(here) if "100 KB" in a.name] + port.deliveries(here, secret)
        found = await run(scene, attempts)
    assert any("100 KB: 400" in line for line in found), found
    assert sum("204 answer" in line for line in found) > 20, found


async def test_answers_that_are_stored_as_they_come_are_found(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = uploader.Uploads()
    await uploads.insert(scene, "say (escape|turned|invisible)")
    monkeypatch.setattr(answers, "clean_text", lambda text: text)
    signature = "autotag.canonical_results(p_results jsonb[]) returns boolean[]"  # the database would make it text, too
    every = "select array_fill(true, array[cardinality(p_results)])"
    broken(scene, f"create or replace function {signature} language sql immutable as '{every}'")
    enqueue_all(scene, [asset for asset, _ in uploads.assets.values()])
    async with worker(scene.stack):
        await idle(scene)
    assert len(uploader.stored(scene)) == 3


async def test_a_watch_that_shows_what_it_is_told_is_found(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch, "printable", lambda text, _: str(text))
    monkeypatch.setattr(console, "one_line", lambda text: text)
    attempts = [attempt for attempt in broadcaster.attempts(scene) if "says" in attempt.name]
    found = await watched(scene, attempts, capsys, 20)
    assert sum("shown:" in line for line in found) > 10, found


async def test_every_role_makes_enough_attempts(scene: Scene) -> None:
    ports, secret = port.Ports(1, 2), scene.stack.simulator.plan.webhook_secret
    counts = {caller: len(outsiders(scene, caller)) for caller in ("anon", "nobody", "neighbour")}
    counts["member"] = len([*member.tables(scene), *member.rpcs(scene), *member.limits(scene, ["x"])])
    counts["port"] = len([*port.requests(ports), *port.deliveries(ports, secret), *port.stolen(ports, secret)])
    counts["uploader"] = len(
        [*uploader.places(scene), *uploader.answers()]
    )  # and the files, which take seconds to make
    counts["broadcaster"] = len(broadcaster.attempts(scene))
    counts["whose a file is"] = 2 * len(foreign_ways(scene)) + len(odd_ways(scene))  # at once and later; without a rule
    print(counts)
    assert min(counts.values()) >= LEAST, counts
