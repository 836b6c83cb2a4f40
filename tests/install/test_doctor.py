"""`autotag doctor` finds what is wrong, says what fixes it, and its exit code is the worst finding."""

from __future__ import annotations

import json
import os
import re
from typing import Any

import psycopg
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from autotag.config import DoctorSettings
from autotag.doctor import broadcast, findings
from autotag.doctor import examine as doctor
from autotag.http.serve import serve
from conftest import ROOT
from forked import run_command
from lab.edge import tokens
from lab.openai_sim.webhooks import make_secret
from lab.postgres import LocalPostgres, free_port
from lab.stack import WORKER_ROLE, Stack
from support import Library, until, worker

WEBHOOK_SECRET = make_secret()
ENDS_IN = (
    "update autotag.models set shutdown_date = (now() at time zone 'utc')::date + {}, successor = 'gpt-6.1-terra'"
    " where name = 'gpt-6-luna'"
)
NO_PRICE = "update autotag.models set input_price = null, output_price = null where name = 'gpt-6-luna'"


def settings(stack: Stack, **changes: Any) -> DoctorSettings:
    environment = {name.lower(): value for name, value in stack.worker_environment().items()}
    return DoctorSettings(**{**environment, **changes})


async def examined(stack: Stack, **changes: Any) -> dict[str, doctor.Finding]:
    return {finding.check: finding for finding in await doctor.examine(settings(stack, **changes))}


async def test_all_is_well(library: Library) -> None:
    """Every check is fine except pg_cron, which is in another database of this server, and choices of the project."""
    assets = await library.upload(1)
    library.sql("select autotag.tick()")
    async with worker(library.stack):
        await library.finished(library.enqueue(assets))
        found = await examined(library.stack)
    wrong = {check: f for check, f in found.items() if f.level != "ok"}
    # a limit of spending and the right to create temporary objects are the project's own to decide
    assert set(wrong) <= {"pg_cron", "spending", "temporary objects"}, wrong
    assert "arrived after" in found["broadcast"].message
    assert "newest image could be read" in found["storage"].message
    assert "gpt-6-luna is known" in found["api"].message
    assert all(f.fix is None for f in found.values() if f.level == "ok")
    assert all(f.fix for f in found.values() if f.level != "ok")


@pytest.mark.parametrize(
    ("damage", "check", "level", "says"),
    [
        ("drop function autotag.schema_version", "schema", "error", "not (completely) in this database"),
        ("create or replace function autotag.schema_version() returns text language sql immutable parallel safe"
         " set search_path = '' as 'select ''9.9.9''::text'", "schema", "warning", "is of version 9.9.9"),
        ("alter table public.assets drop column storage_path cascade", "host adapter", "error", "storage_path"),
        ("create rule sometimes as on update to public.assets where old.id is null do instead nothing", "rules", "error", "(sometimes)"),
        ("create rule also as on update to public.assets do also select 1", "rules", "error", "no tags can be stored"),
        ("update autotag.settings set test_clock = true", "clock", "error", "change autotag's time"),
        ("update autotag.clock set ticked_at = now() - interval '1 h'", "clock", "error", "last ran 01:00:00 ago"),
        ("update autotag.settings set model = 'gpt-none'", "api", "error", "does not have the model gpt-none"),
        (ENDS_IN.format(80), "model", "warning", "gpt-6-luna shuts down on"),
        (ENDS_IN.format(80), "model", "warning", "in 80 days; its successor is gpt-6.1-terra"),
        (ENDS_IN.format(10), "model", "error", "in 10 days; its successor is gpt-6.1-terra"),
        (ENDS_IN.format(-1), "model", "error", "gpt-6-luna was shut down on"),
        (NO_PRICE, "price", "warning", "The price of gpt-6-luna is not known"),
        (NO_PRICE + "; insert into autotag.quotas (scope, period, max_cost) values ('user', 'day', 1)",
         "price", "error", "no quota in dollars is enforced"),
        ("grant execute on function autotag.enqueue to anon", "grants", "error", "anon may call autotag.enqueue"),
        ("revoke execute on function public.enqueue_tagging from authenticated", "grants", "error", "may not call"),
        ("select autotag.pause_tagging('OpenAI refused the account: no credit', 'provider')", "account", "error", "no credit"),
        ("drop function realtime.send(jsonb, text, text, boolean)", "realtime.send", "warning", "no realtime.send"),
        ("drop function realtime.send(jsonb, text, text, boolean);"
         "insert into autotag.outbox (topic, event, payload, private, created_at)"
         " values ('t', 'e', '{}', true, now() - interval '1 h')", "realtime.send", "error", "1 broadcasts wait"),
    ],
)  # fmt: skip
async def test_damage_is_found_and_fixed(
    stack: Stack, damage: str, check: str, level: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broadcast, "TIMEOUT", 2.0)
    monkeypatch.setattr(findings, "PROBE_AGAIN_AFTER", 0.0)
    as_owner(stack, damage)
    found = (await examined(stack))[check]
    assert (found.level, says in found.message) == (level, True), found
    assert found.fix


def as_owner(stack: Stack, statement: str) -> None:
    with psycopg.connect(stack.database_url("supabase_admin"), autocommit=True) as connection:
        connection.execute(statement.encode())


async def test_no_worker_and_workers_that_poll_are_told(library: Library) -> None:
    assert (await examined(library.stack))["workers"].level == "error"
    library.sql("select autotag.register_worker(gen_random_uuid(), 'h', autotag.schema_version(), false)")
    assert "1 of 1 workers poll" in (await examined(library.stack))["workers"].message


@pytest.mark.parametrize(
    ("changes", "check", "level", "says"),
    [
        ({"database_url": "postgresql://tagger:wrong@127.0.0.1:{port}/postgres"}, "connection", "error", "password"),
        ({"database_url": "postgresql://tagger:x@127.0.0.1:1/postgres"}, "connection", "error", "refused"),
        ({"supabase_secret_key": "wrong"}, "storage", "error", "Storage refused the key: Invalid Compact JWS."),
        ({"supabase_secret_key": "sb_publishable_x"}, "storage", "error", "Storage refused the key: it is not the secret"),
        ({"supabase_secret_key": "wrong"}, "broadcast", "error", "Realtime refused the key (401)"),
        ({"supabase_url": "http://127.0.0.1:1"}, "storage", "error", "cannot be reached"),
        ({"supabase_url": "http://127.0.0.1:1"}, "broadcast", "error", "Realtime cannot be reached"),
        ({"supabase_url": None}, "storage", "warning", "not set"),
        ({"openai_api_key": "sk-wrong"}, "api", "error", "not valid"),
        ({"openai_api_key": None}, "api", "error", "not set"),
        ({"openai_base_url": "http://127.0.0.1:1/v1"}, "api", "error", "could not be reached"),
        ({"openai_webhook_secret": "nonsense"}, "webhook", "error", "whsec_"),
        ({"openai_webhook_secret": WEBHOOK_SECRET}, "webhook", "error", "no address"),
        ({"webhook": "0.0.0.0:80"}, "webhook", "error", "needs OPENAI_WEBHOOK_SECRET"),
        ({"openai_webhook_secret": WEBHOOK_SECRET, "webhook": "0.0.0.0:80"}, "webhook", "ok", "serves"),
    ],
)  # fmt: skip
async def test_a_wrong_setting_is_found(
    stack: Stack, postgres: LocalPostgres, changes: dict[str, Any], check: str, level: str, says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(broadcast, "TIMEOUT", 2.0)
    monkeypatch.setattr(findings, "PROBE_AGAIN_AFTER", 0.0)
    if "database_url" in changes:
        changes = {"database_url": changes["database_url"].format(port=postgres.port)}
    found = (await examined(stack, **changes))[check]
    assert (found.level, says in found.message) == (level, True), found
    assert level == "ok" or found.fix


async def test_a_project_that_has_just_started_is_fine(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Realtime answers the first join of a project before it reads that project's messages. So the first probes are
    lost, and repeated."""
    monkeypatch.setattr(broadcast, "PROBE_INTERVAL", 0.25)
    stack.manners.cold_start = 0.6
    found = (await examined(stack))["broadcast"]
    assert (found.level, "arrived after" in found.message) == ("ok", True), found
    assert int(re.findall(r"after (\d+) ms", found.message)[0]) < 500, "it says what the probe took that arrived"
    monkeypatch.setattr(broadcast, "TIMEOUT", 1.0)
    stack.manners.cold_start = 60.0
    stack.manners.forget()
    found = (await examined(stack))["broadcast"]
    assert (found.level, "No broadcast from the database arrived" in found.message) == ("error", True), found


async def test_a_project_without_public_topics_is_fine(stack: Stack) -> None:
    stack.manners.private_only = True
    found = (await examined(stack))["broadcast"]
    assert (found.level, "private topics only" in found.message) == ("skipped", True), found


async def test_an_outage_is_told_in_sentences(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gateway answers with an HTML page. The findings have sentences instead."""
    monkeypatch.setattr(findings, "PROBE_AGAIN_AFTER", 0.0)
    stack.manners.down = True
    found = await examined(stack)
    for check in ("storage", "broadcast"):
        assert (found[check].level, "(502)" in found[check].message) == ("error", True), found[check]
        assert "key" not in found[check].message.lower() + (found[check].fix or "").lower()
    assert not any("<" in finding.message for finding in found.values())


async def test_one_failed_request_is_no_finding(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every probe that fails temporarily is repeated."""
    monkeypatch.setattr(findings, "PROBE_AGAIN_AFTER", 0.0)
    stack.manners.failures = 1
    assert (await examined(stack))["storage"].level == "ok"
    assert stack.manners.failures == 0


async def test_a_missing_file_is_not_blamed_on_the_key(library: Library) -> None:
    job = library.enqueue(await library.upload(1))
    library.rpc("public.cancel_tagging", job["job_id"])  # its image is an example again
    library.sql("delete from storage.objects")
    found = (await examined(library.stack))["storage"]
    assert (found.level, found.message.startswith("The key works")) == ("warning", True), found
    assert "SUPABASE_SECRET_KEY" not in (found.fix or "")


async def test_a_model_that_is_gone_is_told_with_its_successor(stack: Stack) -> None:
    stack.simulator.plan.models = frozenset({"gpt-6-luna", "gpt-6.1-terra"})
    stack.configure(model="gpt-4.1-mini")
    as_owner(stack, "update autotag.models set shutdown_date = '2026-01-14' where name = 'gpt-4.1-mini'")
    found = (await examined(stack))["api"]
    assert (found.level, found.fix) == (
        "error", "Use its successor: update autotag.settings set model = 'gpt-6-luna';"
    )  # fmt: skip
    assert found.message == "This account does not have the model gpt-4.1-mini. It has: gpt-6-luna, gpt-6.1-terra."
    stack.configure(model="my-model")
    found = (await examined(stack))["api"]
    assert (found.level, f"{stack.openai_url}/models" in (found.fix or "")) == ("error", True), found


async def test_the_end_that_the_provider_names_is_told(stack: Stack) -> None:
    stack.configure(model="gpt-4o-mini")
    assert "gpt-4o-mini is known and shuts down on 2027-01-14" in (await examined(stack))["api"].message


async def test_a_provider_that_lists_no_models_is_fine_when_calls_work(library: Library) -> None:
    """A 404 for the list of models does not mean that the key is wrong."""
    stack = library.stack
    stack.simulator.plan.models_endpoint = False
    library.sql("update autotag.provider_limits set proven_at = null")
    found = (await examined(stack))["api"]
    assert (found.level, "has no list of models (404)" in found.message) == ("warning", True), found
    assert "OPENAI_BASE_URL" in (found.fix or "")
    async with worker(stack):
        await library.finished(library.enqueue(await library.upload(1)))
    found = (await examined(stack))["api"]
    assert (found.level, "but calls work" in found.message) == ("ok", True), found
    # another model has to show that it works
    stack.configure(model="gpt-4o-mini")
    assert (await examined(stack))["api"].level == "warning"


async def test_a_model_that_is_not_listed_is_fine_when_calls_to_it_work(library: Library) -> None:
    """Azure's deployments have names that are not in its list of models."""
    stack = library.stack
    async with worker(stack):
        await library.finished(library.enqueue(await library.upload(1)))
    stack.simulator.plan.models = frozenset({"gpt-4o-mini"})
    found = (await examined(stack))["api"]
    assert (found.level, "does not list gpt-6-luna, but calls to it work" in found.message) == ("ok", True), found


async def test_a_page_instead_of_the_api_is_found(stack: Stack) -> None:
    async def page(_: Request) -> Response:
        return HTMLResponse("<html><body>Welcome</body></html>")

    port = free_port()
    async with serve(Starlette(routes=[Route("/{path:path}", page)]), "127.0.0.1", port):
        found = (await examined(stack, openai_base_url=f"http://127.0.0.1:{port}"))["api"]
    assert (found.level, "No OpenAI-compatible API answers" in found.message, "<" in found.message) == (
        "error",
        True,
        False,
    ), found
    assert "/v1" in (found.fix or "")


async def test_what_the_provider_lacks_is_shown(library: Library) -> None:
    stack = library.stack
    plan = stack.simulator.plan
    plan.batch_api, plan.rate_headers = False, False
    plan.token_parameters, plan.effort_parameter = frozenset({"max_tokens"}), False
    async with worker(stack):
        await library.finished(library.enqueue(await library.upload(2)))
        await until(lambda: library.sql("select 1 from autotag.provider_limits where not has_batches") != [],
                    "the worker to ask for a Batch API")  # fmt: skip
    found = await examined(stack)
    assert found["provider"].level == "ok"
    for what in ("a Batch API", "rate-limit headers"):
        assert what in found["provider"].message
    assert "max_tokens instead of max_completion_tokens" in found["request"].message
    assert "no reasoning_effort" in found["request"].message


async def test_the_key_the_bucket_and_the_file_are_told_apart(library: Library) -> None:
    stack = library.stack
    wrong = {
        "signature verification failed": tokens.sign("the secret that was rotated away", "service_role"),
        '"exp" claim timestamp check failed': tokens.sign(stack.jwt_secret, "service_role", lifetime=-60),
        "it is not the secret key": stack.anon_key,
    }
    async with worker(stack):
        await library.finished(library.enqueue(library.insert([f"{library.member.workspace}/never-uploaded.jpg"])))
    for says, key in wrong.items():
        found = (await examined(stack, supabase_secret_key=key))["storage"]
        assert (found.level, says in found.message) == ("error", True), found
        assert "SUPABASE_SECRET_KEY" in (found.fix or "")
    found = (await examined(stack))["storage"]
    assert (found.level, "The key works" in found.message) == ("warning", True), found
    assert "never-uploaded.jpg" in found.message
    library.sql("update storage.buckets set id = 'other' where id = 'assets'")
    found = (await examined(stack))["storage"]
    assert (found.level, "the bucket assets, which does not exist (buckets: other)" in found.message) == ("error", True)


@pytest.mark.parametrize(("status", "says"), [(503, "answered with an error (503)"), (200, "does not lead to Storage"),
                                              (404, "does not lead to Storage")])  # fmt: skip
async def test_a_page_instead_of_storage_is_not_printed(stack: Stack, status: int, says: str) -> None:
    async def page(_: Request) -> Response:
        return HTMLResponse("<html><body>Bad gateway</body></html>", status)

    port = free_port()
    async with serve(Starlette(routes=[Route("/{path:path}", page)]), "127.0.0.1", port):
        found = await doctor._storage(settings(stack, supabase_url=f"http://127.0.0.1:{port}"), None)
    assert (found.level, says in found.message, "<" in found.message) == ("error", True, False), found
    assert found.fix


async def test_a_broadcast_that_gets_lost_is_found(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """realtime.send never fails, so doctor has to listen."""
    monkeypatch.setattr(broadcast, "TIMEOUT", 2.0)
    monkeypatch.setattr(findings, "PROBE_AGAIN_AFTER", 0.0)
    as_owner(stack, "drop trigger notify_edge on realtime.messages")
    assert "No broadcast from the database arrived" in (await examined(stack))["broadcast"].message


async def test_a_clock_that_is_wrong_is_found(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings.time, "time", lambda: 1_000_000_000.0)
    found = await examined(stack)
    assert (found["clock skew"].level, "behind" in found["clock skew"].message) == ("error", True)


async def test_a_worker_that_may_do_everything_is_told(library: Library) -> None:
    """A worker should not use a login with the owner's rights, whatever its name (hosted projects have
    cli_login_postgres)."""
    stack = library.stack
    as_owner(stack, "create role cli_login_owner login in role postgres")
    try:
        found = (await examined(stack))["roles"]
        assert (found.level, found.message) == ("ok", f"Workers may log in as {WORKER_ROLE}.")
        library.sql("select autotag.register_worker(gen_random_uuid(), 'h', autotag.schema_version(), true)")
        found = (await examined(stack))["roles"]
        assert (found.level, "logged in as postgres, which may do everything" in found.message) == ("warning", True), (
            found
        )
        assert WORKER_ROLE in (found.fix or "")
        as_owner(stack, "update autotag.workers set login = 'cli_login_owner'")
        assert "as cli_login_owner" in (await examined(stack))["roles"].message
        as_owner(stack, f"update autotag.workers set login = '{WORKER_ROLE}'")
        assert (await examined(stack))["roles"].level == "ok"
    finally:
        as_owner(stack, "drop role cli_login_owner")


async def test_without_a_workers_login_it_says_how_to_make_one(stack: Stack) -> None:
    as_owner(stack, f"revoke autotag_worker from {WORKER_ROLE}")
    try:
        found = (await examined(stack, database_url=stack.database_url()))["roles"]
    finally:
        as_owner(stack, f"grant autotag_worker to {WORKER_ROLE}")
    assert found.level == "warning"
    assert "password '" not in (found.fix or ""), "it would stand in the server's log"


NO_TOKEN = """
    create function public.audit() returns trigger language plpgsql as $$ begin
      if auth.uid() is null then raise exception 'not authenticated'; end if; return new; end $$;
    create trigger audit before update on public.assets for each row execute function public.audit()"""
SILENT = """
    create function public.audit() returns trigger language plpgsql as $$ begin return null; end $$;
    create trigger audit before update on public.assets for each row execute function public.audit()"""
DEFERRED = """
    create function public.audit() returns trigger language plpgsql as $$ begin raise exception 'too late'; end $$;
    create constraint trigger audit after update on public.assets deferrable initially deferred
      for each row execute function public.audit()"""


@pytest.mark.parametrize(
    ("host", "level", "says", "tried"),
    [
        ("select", "ok", "taken back", True),
        ("alter table public.assets add check (cardinality(tags) <= 3)", "error", "violates check constraint", True),
        (NO_TOKEN, "error", "not authenticated", False),
        (SILENT, "error", "did not change", False),
        (SILENT.replace("return null", "return old"), "error", "did not change", False),
        (SILENT.replace("return null", "new.tags := old.tags; return new"), "error", "kept none of ten", False),
        (SILENT.replace("return null", "new.tags := new.tags[:5]; return new"), "warning", "kept 3 of ten", False),
        ("alter table public.assets add check (not 'Barn' = any (tags))", "warning", "a capital", True),
        (
            SILENT.replace("return null", "new.tags := array_append(new.tags, 'x'); return new"),
            "ok",
            "taken back",
            False,
        ),
        (DEFERRED, "error", "too late", False),
    ],
    ids=[
        "nothing",
        "a constraint",
        "a trigger that asks for a token",
        "a silent trigger",
        "an undoing trigger",
        "a trigger that keeps the tags",
        "a trigger that keeps five",
        "a check for lower case",
        "a trigger that adds",
        "a deferred trigger",
    ],
)
async def test_what_refuses_tags_is_found_before_anything_is_paid(
    library: Library, host: str, level: str, says: str, tried: bool
) -> None:
    early = (await examined(library.stack))["write"]
    assert (early.level, early.message) == ("skipped", "There is no image yet whose row could be written.")
    library.insert(["a.jpg"])
    library.sql("update public.assets set tags = '{Mine,Yours}'")
    library.sql(host)
    before = library.sql("select to_jsonb(a) as row, xmin::text from public.assets a")
    quiet = (await examined(library.stack))["write"]
    asked = {f.check: f for f in await doctor.examine(settings(library.stack), try_write=True)}["write"]
    assert (asked.level, says in asked.message) == (level, True), asked
    assert quiet == asked if tried else (quiet.level, quiet.fix) == ("skipped", "autotag doctor --try-write")
    assert tried or "audit" in quiet.message
    assert library.sql("select to_jsonb(a) as row, xmin::text from public.assets a") == before


async def test_rows_that_refused_their_tags_are_reported(library: Library) -> None:
    assets = await library.upload(1)
    library.sql("alter table public.assets add check (cardinality(tags) <= 1)")
    async with worker(library.stack):
        await library.finished(library.enqueue(assets))
    found = await examined(library.stack)
    assert "1 images refused" in found["stored"].message
    assert "violates check constraint" in found["write"].message
    [row] = library.sql("select tagging_stage, tagging_error from public.assets")
    assert row == {"tagging_stage": "failed", "tagging_error": "The database refused to store the tags of this image."}


async def test_the_page_shows_what_is_checked(stack: Stack) -> None:
    """docs/install.md has the same checks in the same order, and the same words for those that are fine."""
    page = (ROOT / "docs" / "install.md").read_text()
    sample = page.split("check                       finding\n")[1].split("```")[0].splitlines()
    shown = [row for line in sample if (row := re.fullmatch(r"(\S.*?)\s+(ok|skipped|warning|error)\s+(\S.*)", line))]
    found = await examined(stack)
    assert [row[1] for row in shown] == list(found)
    always = (
        "grants",
        "host adapter",
        "realtime.send",
        "account",
        "request",
        "provider",
        "clock skew",
        "pooler",
        "price",
    )
    for row in shown:
        if row[1] in always:
            assert row[3] == found[row[1]].message


async def test_a_login_without_the_role_is_told_what_to_grant(stack: Stack) -> None:
    as_owner(stack, "revoke usage on schema autotag from autotag_worker")
    found = await examined(stack)
    assert "grant autotag_worker" in (found["schema"].fix or "")


async def test_the_command_prints_and_its_exit_code_is_the_worst(library: Library) -> None:
    async def run(*arguments: str, **changes: str) -> tuple[int, str, str]:
        environment = {"PATH": os.environ["PATH"], **library.stack.worker_environment(), **changes}
        return await run_command("doctor", *arguments, environment=environment)

    code, out, _ = await run("--json")
    told = json.loads(out)
    assert (code, told["worst"]) == (2, "error")
    assert {"check", "level", "message", "fix"} == set(told["findings"][0])
    library.sql("select autotag.tick()")
    async with worker(library.stack):
        await until(lambda: library.sql("select 1 from autotag.workers") != [], "the worker")
        code, out, _ = await run()
    assert code == 1, out
    assert "pg_cron" in out
    assert "→" in out
    code, _, err = await run(DATABASE_URL="")
    assert (code, err.startswith("autotag: DATABASE_URL is wrong")) == (2, True)
    assert WORKER_ROLE not in err
