"""autotag can be uninstalled: nothing of the host goes that nobody named, and a new installation works."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import psycopg
import pytest

from autotag.install.answers import HostError
from autotag.install.host import Choices
from autotag.install.migrations import apply_migrations
from autotag.install.own import of_engine
from autotag.install.survey import refuse_to_ask, survey
from autotag.install.uninstall import InUse, drop_autotag, make_plan
from cli_tools import supabase
from forked import run_command
from lab.postgres import LocalPostgres

HOST = """
    create table public.workspace_members (workspace_id uuid, user_id uuid);
    create table public.assets (id uuid primary key default gen_random_uuid(), workspace_id uuid not null,
      storage_bucket text, storage_path text, image_url text);
    insert into public.assets (workspace_id, image_url) values (gen_random_uuid(), 'https://example.org/1');
    create function public.tagging_summary() returns integer language sql as 'select 1'"""
#: pg_cron lives in another database of the server.
CRON = """
    create schema cron;
    create table cron.job (jobid bigserial, jobname text, command text, database text default current_database());
    insert into cron.job (jobname, command) values ('autotag-tick', 'select autotag.tick()'),
      ('autotag-housekeeping', 'select autotag.housekeeping(); delete from cron.job_run_details'), ('backup', 'select 1');
    create function cron.unschedule(bigint) returns boolean language sql as
      'delete from cron.job where jobid = $1 returning true'"""
#: The host's own objects that use autotag, each as the command names it.
USES = {
    "view tagged_photos": "create view public.tagged_photos as select id, tagging_stage from public.assets",
    "view limits": "create view public.limits as select workspace_id from public.workspace_rate_limits",
    "policy mine on table photos": "create policy mine on public.photos using (autotag.is_member(workspace_id))",
    "index by_stage": "create index by_stage on public.assets (tagging_stage)",
    "column image of table albums": "create table public.albums (n integer, image autotag.asset_id)",
    "column stages of table queues": "create table public.queues (n integer, stages public.tagging_stage[])",
    "column answer of table calls": "create table public.calls (n integer, answer public.tagging_cancel_result)",
    "function chosen(tagging_strategy_name)": "create function public.chosen(public.tagging_strategy_name) returns text"
    " language sql as 'select $1::text'",
    "default value for column c of table counters": "create table public.counters (c timestamptz default autotag.now())",
    "trigger shown on table assets": "create trigger shown after update of tagging_stage on public.assets for each row"
    " execute function public.nothing()",
    "function upload()": "create function public.upload() returns void language plpgsql as"
    " 'begin perform enqueue_tagging(array[]::uuid[]); end'",
}


@pytest.fixture
def url(postgres: LocalPostgres, bare: str) -> str:
    """A project's database with autotag in automatic mode, and an upload."""
    url = postgres.url(database=bare)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(HOST)
    return url


def install(url: str) -> None:
    assert apply_migrations(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("select autotag.set_automatic(true)")
        connection.execute("select public.enqueue_tagging(array(select id from public.assets))")


def objects(url: str) -> set[str]:
    """Everything outside the system's schemas that has a name."""
    with psycopg.connect(url, autocommit=True) as connection:
        found = connection.execute("""
            select 'schema ' || nspname from pg_namespace where nspname not like 'pg\\_%' and nspname <> 'supabase_migrations'
            union all select 'function ' || oid::regprocedure from pg_proc where pronamespace = 'public'::regnamespace
            union all select 'type ' || oid::regtype from pg_type where typnamespace = 'public'::regnamespace and typtype = 'e'
            union all select 'relation ' || oid::regclass from pg_class where relnamespace = 'public'::regnamespace
            union all select 'column ' || c.relname || '.' || a.attname from pg_attribute a join pg_class c on c.oid = a.attrelid
              where c.relnamespace = 'public'::regnamespace and c.relkind = 'r' and a.attnum > 0 and not a.attisdropped
            union all select 'policy ' || policyname from pg_policies
            union all select 'trigger ' || tgname from pg_trigger where not tgisinternal
            union all select 'constraint ' || conname from pg_constraint where connamespace = 'public'::regnamespace
            union all select 'row ' || id::text from public.assets""")
        return {row[0] for row in found}


@pytest.mark.parametrize(("keep", "drop"), [(False, False), (True, False), (False, True)])
def test_nothing_of_autotag_is_left_and_the_host_is_intact(url: str, keep: bool, drop: bool) -> None:
    before = objects(url)
    install(url)
    plan = make_plan(url)
    assert plan.yours == [], "autotag's own are not the host's"
    assert plan.unfinished == 1
    done = drop_autotag(url, keep_stages=keep, drop_results=drop)
    stays = {"column assets.tags"} | (set() if drop else {"column assets.tagging_result"})
    stays |= {f"column assets.tagging_{name}" for name in ("stage", "progress", "eta", "error") if keep}
    assert objects(url) - before == stays
    assert before - objects(url) == set()
    assert {f"column {name}" for name in done.kept} | {"column assets.tags"} == stays
    assert make_plan(url, keep_stages=keep).empty
    install(url)


COPIES = """
    create schema backup;
    create table backup.assets_2026 as table public.assets;
    create table public.photos_old (like public.assets including all);
    create role somebody;
    grant create on schema public to somebody;
    alter table public.photos_old owner to somebody"""


def test_copies_of_the_table_stay_as_they_are(postgres: LocalPostgres, url: str) -> None:
    install(url)
    with psycopg.connect(postgres.url("supabase_admin", url.rpartition("/")[2]), autocommit=True) as admin:
        try:
            admin.execute(COPIES.encode())
            done = drop_autotag(url, drop_results=True)
            assert {name.rpartition(".")[0] for name in done.columns} == {"assets"}
            assert {"backup.assets_2026.tagging_stage", "photos_old.tagging_result"} <= set(done.kept)
            columns = admin.execute("select count(*) from information_schema.columns where column_name like 'tagging\\_%'"
                                    " and table_name in ('assets_2026', 'photos_old')").fetchone()  # fmt: skip
            assert columns == (10,)
            # Without the schema nobody knows which of two tables it was.
            assert not any(name.startswith(("backup.", "photos_old.")) for name in make_plan(url).columns)
        finally:
            admin.execute(
                "drop table if exists public.photos_old; revoke all on schema public from somebody; drop role if exists somebody"
            )


async def test_stages_that_stay_tell_no_lies(url: str) -> None:
    """An image that was being tagged is shown as failed, and a new installation can find and tag it."""
    install(url)
    drop_autotag(url, keep_stages=True)
    with psycopg.connect(url) as connection:
        [(stage, error)] = connection.execute("select tagging_stage, tagging_error from public.assets").fetchall()
    assert (stage, "autotag was removed" in error) == ("failed", True)
    assert apply_migrations(url)
    with psycopg.connect(url) as connection:
        [(workspace,)] = connection.execute("select workspace_id::text from public.assets").fetchall()
    _, out, err = await run_command("enqueue", "--workspace", workspace, "--json", environment={"DATABASE_URL": url})
    assert json.loads(out)["predicted"]["images"] == 1, out + err


def test_what_the_host_uses_is_shown_and_stops_it(url: str) -> None:
    install(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("create table public.photos (workspace_id uuid)")
        connection.execute(
            "create function public.nothing() returns trigger language plpgsql as 'begin return null; end'"
        )
        for statement in USES.values():
            connection.execute(statement.encode())
    before = objects(url)
    assert set(make_plan(url).yours) == set(USES)
    for missing in USES:
        with pytest.raises(InUse, match=missing.split("(")[0]):
            drop_autotag(url, also=set(USES) - {missing})
    assert objects(url) == before
    kept_by_stages = {"view tagged_photos", "index by_stage", "trigger shown on table assets"}
    assert set(make_plan(url, keep_stages=True).yours) == set(USES) - kept_by_stages
    drop_autotag(url, also=set(USES))
    left = objects(url)
    assert {"function upload()", "relation albums", "relation counters", "relation photos", "column albums.n"} <= left
    assert {"column queues.n", "column calls.n"} <= left
    assert (
        not {"relation tagged_photos", "relation limits", "policy mine", "relation by_stage", "column albums.image"}
        & left
    )


def test_a_removal_by_hand_is_noticed_and_finished(url: str, tmp_path: Path) -> None:
    """After `drop schema`, the history of `supabase db push` still has the migrations, so it would never apply them
    again. The enums stay, too."""
    before = objects(url)
    install(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("drop schema autotag cascade")
    with pytest.raises(HostError, match="run autotag uninstall"):
        apply_migrations(url)
    with pytest.raises(HostError, match="run autotag uninstall"):
        survey(url, Choices(), refuse_to_ask, may_ask=False)
    left = {f"type {name}" for name in of_engine().enums()}
    assert left <= objects(url)
    drop_autotag(url)
    assert not left & objects(url)
    assert before <= objects(url)
    install(url)


def test_an_enum_of_the_hosts_with_such_a_name_stays(url: str) -> None:
    """Without the schema, an enum's name does not show whose it is."""
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("create type public.tagging_stage as enum ('queued', 'done')")
    assert make_plan(url).empty
    drop_autotag(url)
    assert "type tagging_stage" in objects(url)


async def test_the_cli_pushes_again_after_it(url: str, tmp_path: Path) -> None:
    """init and the real Supabase CLI install autotag twice. Between these, it is uninstalled and the files are deleted,
    as the command says."""
    (tmp_path / "supabase").mkdir()
    (tmp_path / "supabase" / "config.toml").write_text('project_id = "test"\n')
    environment = {"DATABASE_URL": url}
    for _ in range(2):
        code, out, err = await run_command(
            "init", str(tmp_path), "--yes", "--members-table", "public.workspace_members", "--file-rule", "any",
            environment=environment,
        )  # fmt: skip
        assert (code, "supabase db push" in out) == (0, True), err
        supabase("db", "push", f"--remote={url}", "--yes", "--workdir", str(tmp_path))
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("select autotag.schema_version()")
        code, out, err = await run_command("uninstall", "--yes", environment=environment)
        assert (code, "migration history" in out, "_autotag_0_1_0.sql" in out) == (0, True, True), err
        for file in (tmp_path / "supabase" / "migrations").glob("*_autotag_*.sql"):
            file.unlink()


KEPT = """
    insert into autotag.vocabulary (workspace_id, tag) select workspace_id, 'barn' from public.assets;
    insert into autotag.vocabulary (tag) values ('field'), ('sky');
    insert into autotag.profiles (workspace_id, language, created_at) select workspace_id, 'German', now() from public.assets;
    insert into autotag.profiles (language, created_at) values ('French', now());
    insert into autotag.quotas (scope, period, max_images) values ('user', 'day', 7);
    insert into autotag.usage (workspace_id, day, model, service_tier) select workspace_id, current_date, 'm', 'default' from public.assets"""


async def test_what_is_lost_is_named_with_the_commands_that_keep_it(url: str, tmp_path: Path) -> None:
    install(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(KEPT)
    environment = {"DATABASE_URL": url}
    code, out, _ = await run_command("uninstall", "--dry-run", environment=environment)
    assert code == 0
    for what in (
        "3 tags of the vocabulary",
        "2 versions of profiles",
        "1 quota.",
        "1 row of usage",
        "1 running upload",
    ):
        assert f"This is lost: {what}" in out, out
    told = json.loads((await run_command("uninstall", "--dry-run", "--json", environment=environment))[1])
    kept = {}
    for command in (one for loss in told["losses"] for one in loss["keep"]):
        assert f"  {command}\n" in out
        words, _, file = command.partition(" > ")
        if words.startswith("autotag "):
            code, kept[file], err = await run_command(*shlex.split(words)[1:], environment=environment)
            assert code == 0, err
    assert [name.split("-")[0] for name in kept] == ["vocabulary.csv", "vocabulary", "profile.json", "profile"]
    assert all(word in "".join(kept.values()) for word in ("barn", "field", "sky", "German", "French")), kept


async def test_versions_of_profiles_go_on_after_a_new_installation(url: str, tmp_path: Path) -> None:
    """An image that version 2 of the old installation tagged does not count as tagged with a version of the new one."""
    install(url)
    new = "insert into autotag.profiles (language, created_at) values ('German', now()) returning version"
    with psycopg.connect(url, autocommit=True) as connection:
        assert [connection.execute(new).fetchone() for _ in range(2)] == [(1,), (2,)]
        connection.execute("update public.assets set tagging_result = '{\"profile\": 2}'")
        connection.execute("insert into public.assets (workspace_id, tagging_result) values (gen_random_uuid(),"
                           " '{\"profile\": 2000000000}'), (gen_random_uuid(), '{\"profile\": \"9\"}')")  # fmt: skip
        own = '{"given": [], "confidence": {}, "caption": "c", "model": "m"}'
        connection.execute("update public.assets set tagging_result = tagging_result || %s::jsonb", (own,))
    drop_autotag(url)
    (tmp_path / "supabase").mkdir()
    (tmp_path / "supabase" / "config.toml").write_text('project_id = "test"\n')
    options = ("--yes", "--members-table", "public.workspace_members", "--file-rule", "any")
    for command in (("init", str(tmp_path), *options), ("migrate", str(tmp_path))):
        code, out, err = await run_command(*command, environment={"DATABASE_URL": url})
        assert (code, "profile_versions" in out) == (0, True), err
    with psycopg.connect(url) as connection:
        assert connection.execute(new).fetchone() == (3,)
    # The same from the files of the first installation.
    [extra] = (tmp_path / "supabase" / "migrations").glob("*profile_versions.sql")
    extra.unlink()
    drop_autotag(url)
    code, _, err = await run_command("migrate", str(tmp_path), environment={"DATABASE_URL": url})
    assert code == 0, err
    with psycopg.connect(url) as connection:
        assert connection.execute(new).fetchone() == (3,)


async def test_the_command_shows_first_and_drops_only_when_told(url: str) -> None:
    install(url)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(CRON)
        connection.execute(USES["view tagged_photos"].encode())
    environment, before = {"DATABASE_URL": url}, objects(url)
    code, out, _ = await run_command("uninstall", "--dry-run", environment=environment)
    assert code == 0
    for line in ("function enqueue_tagging", "public.workspace_rate_limits", "members listen to their workspaces", "assets.tagging_stage",
                 "autotag-tick", "20261128000003_autotag_0_1_0", "your tags, assets.tagging_result", "view tagged_photos", "1 image"):  # fmt: skip
        assert line in out, out
    code, out, err = await run_command("uninstall", "--yes", environment=environment)
    assert (code, "--cascade" in err) == (1, True)
    code, out, _ = await run_command("uninstall", "--json", environment=environment)
    told = json.loads(out)
    assert (code, told["dropped"], told["blocked_by"]) == (1, False, ["view tagged_photos"])
    named = ("--cascade", "view tagged_photos")
    code, _, err = await run_command("uninstall", *named, environment=environment)
    assert (code, "--yes" in err) == (2, True), "nobody can be asked"
    assert objects(url) == before
    code, out, err = await run_command("uninstall", "--json", "--yes", *named, environment=environment)
    assert (code, json.loads(out)["dropped"]) == (0, True), err
    with psycopg.connect(url, autocommit=True) as connection:
        assert connection.execute("select array_agg(jobname) from cron.job").fetchone() == (["backup"],)
    code, out, _ = await run_command("uninstall", environment=environment)
    assert (code, "nothing of autotag" in out) == (0, True)
