"""uninstall takes nothing of the host for autotag's, whatever its name: not before, during or after an installation."""

from __future__ import annotations

import json
from pathlib import Path

import psycopg
import pytest

from autotag.install.answers import HostError
from autotag.install.facts import is_own_name
from autotag.install.host import Choices, Host
from autotag.install.migrations import apply_migrations, apply_written, migrations
from autotag.install.own import of_adapter, of_engine
from autotag.install.survey import refuse_to_ask, survey
from autotag.install.uninstall import InUse, drop_autotag, make_plan
from autotag.install.written import written_migrations
from forked import run_command
from lab.postgres import LocalPostgres

HOST = """
    create table public.workspace_members (workspace_id uuid, user_id uuid);
    create table public.assets (id uuid primary key default gen_random_uuid(), workspace_id uuid not null,
      storage_bucket text, storage_path text, image_url text);
    insert into public.assets (workspace_id, image_url) values (gen_random_uuid(), 'https://example.org/1');"""
OWN_COLUMNS = """add column tagging_stage text, add column tagging_progress integer, add column tagging_eta timestamptz,
    add column tagging_error text"""
#: What a project may have before it has heard of autotag, and the names of what has to stay.
BEFORE = {
    "columns": f"alter table public.assets {OWN_COLUMNS}; update public.assets set tagging_stage = 'reviewed' where true",
    "an enum with autotag's labels": "create type public.tagging_request_type as enum ('realtime', 'batch')",
    "a schema": "create schema autotag; create table autotag.my_rules (n integer); create table autotag.settings (n integer)",
    "a view": "create view public.tagging_job_result as select 1 as n",
    "a function": "create schema autotag; create function autotag.now() returns timestamptz language sql as 'select now()';"
    " create function public.tagging_job(job_id uuid) returns text language sql as 'select autotag.now()::text'",
    "a cron job": """
      create schema cron;
      create table cron.job (jobid bigserial, jobname text, command text, database text default current_database());
      insert into cron.job (jobname, command) values ('autotag-tick', 'select 1')""",
    "a migration": """
      create schema supabase_migrations;
      create table supabase_migrations.schema_migrations (version text primary key, statements text[], name text);
      insert into supabase_migrations.schema_migrations values ('20270202000000', null, 'autotag_settings_of_ours')""",
}
#: Where the engine cannot be installed behind the adapter, because a name is taken.
TAKEN = {
    "a table, taken for a view": "create table public.workspace_rate_limits (n integer)",
    "a table, taken for a result": "create table public.tagging_job_result (n integer)",
    "a view": "create view public.tagging_job_result as select 1 as n",
    "an enum in use": "create type public.tagging_stage as enum ('a'); create table public.q (s public.tagging_stage)",
}
#: What a project makes beside an installation, by names like autotag's.
BESIDE = """
    create table public.albums (id integer);
    create policy "autotag: staff may read albums" on public.albums using (true);
    create schema private;
    create function private.check_rate_limit(integer) returns integer language sql as 'select 1';
    create function private.go() returns integer language plpgsql as 'begin return private.check_rate_limit(1); end';
    create function private.went() returns integer language plpgsql set search_path = private as
      'begin return check_rate_limit(1); end';
    create schema cron;
    create table cron.job (jobid bigserial, jobname text, command text, database text default current_database());
    insert into cron.job (jobname, command) values ('autotag-nightly-export', 'select 1'), ('autotag-mine', 'select 1');
    insert into cron.job (jobname, command, database) values
      ('autotag-tick', 'select autotag.tick()', 'another'), ('autotag-tick', 'select autotag.tick()', current_database());
    create function cron.unschedule(bigint) returns boolean language sql as
      'delete from cron.job where jobid = $1 returning true';
    insert into supabase_migrations.schema_migrations (version, name) values ('20270202000000', 'autotag_settings_of_ours')"""
#: Those that use autotag, or are in its schema: they stop the command.
STOPS = {
    "function enqueue_tagging(text)": "create function public.enqueue_tagging(text) returns void language plpgsql as"
    " 'begin perform autotag.now(); end'",
    "table autotag.my_rules": "create table autotag.my_rules (n integer generated always as identity)",
    "view autotag.mine": "create view autotag.mine as select 1 as n",
    "function autotag.now(integer)": "create function autotag.now(integer) returns integer language sql as 'select 1'",
    "type autotag.colours": "create type autotag.colours as enum ('red')",
    "trigger autotag_mine on table albums": "create trigger autotag_mine after insert on public.albums for each row"
    " execute function autotag.collect_inserted()",
}
SNAPSHOT = """
    select 'schema ' || nspname from pg_namespace where nspname !~ '^pg_' and nspname <> 'supabase_migrations'
    union all select 'function ' || oid::regprocedure from pg_proc where pronamespace::regnamespace::text in ('public', 'autotag', 'private')
    union all select 'type ' || oid::regtype || typtype::text from pg_type where typnamespace::regnamespace::text in ('public', 'autotag')
    union all select 'column ' || a.attrelid::regclass || '.' || a.attname from pg_attribute a join pg_class c on c.oid = a.attrelid
      where c.relnamespace::regnamespace::text in ('public', 'autotag') and a.attnum > 0 and not a.attisdropped
    union all select 'policy ' || policyname from pg_policies
    union all select 'constraint ' || conname from pg_constraint where connamespace = 'public'::regnamespace
    union all select 'row ' || (to_jsonb(a) - 'tags' - 'tagging_result')::text from public.assets a"""


def run(url: str, *statements: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            found = connection.execute(statement.encode())
        return found.fetchall() if found.description else []


def snapshot(url: str) -> set[str]:
    return {str(row[0]) for row in run(url, SNAPSHOT)}


@pytest.fixture
def url(postgres: LocalPostgres, bare: str) -> str:
    run(postgres.url(database=bare), HOST)
    return postgres.url(database=bare)


OTHER_KEYS = """
    drop table public.assets, public.workspace_members;
    create table public.workspace_members (workspace_id text, user_id uuid);
    create table public.assets (id bigint not null, workspace_id text not null, storage_bucket text,
      storage_path text, image_url text, primary key (id)) partition by hash (id);
    create table public.assets_0 partition of public.assets for values with (modulus 1, remainder 0);
    insert into public.assets values (1, 'w', null, null, 'https://example.org/1')"""


@pytest.mark.parametrize("other", [False, True])
def test_the_lists_are_what_an_installation_makes(url: str, other: bool) -> None:
    """Nothing that autotag makes counts as the project's, and autotag makes everything that is in the lists."""
    if other:
        run(url, OTHER_KEYS)
    before = snapshot(url)
    assert apply_migrations(url, host=Host(id_type="bigint", workspace_type="text") if other else Host())
    plan = make_plan(url)
    assert plan.yours == []
    made = run(url, """
        select count(*) from pg_proc where pronamespace = 'autotag'::regnamespace union all
        select count(*) from pg_class where relnamespace = 'autotag'::regnamespace and relkind in ('r', 'S', 'v')
          and not exists (select from pg_depend d where d.objid = pg_class.oid and d.deptype = 'i' and d.refobjsubid > 0)
        union all select count(*) from pg_type where typnamespace = 'autotag'::regnamespace
          and (typtype = 'd' or exists (select from pg_class c where c.oid = typrelid and c.relkind = 'c'))""")  # fmt: skip
    lists = [[*of_adapter().functions, *of_engine().functions], [*of_adapter().relations, *of_engine().relations],
             [*of_adapter().types, *of_engine().types]]  # fmt: skip
    assert [len([n for n in names if n.startswith("autotag.")]) for names in lists] == [count for (count,) in made]
    public = [*of_engine().functions, *of_engine().relations, *of_engine().types]
    assert len([name for name in public if name.startswith("public.")]) + 1 == len(plan.objects), "and a policy"
    assert all(is_own_name(f"autotag_{one.name}") for one in migrations(with_host_baseline=True))
    drop_autotag(url, drop_results=True)
    assert snapshot(url) - before == {"column assets.tags"} | ({"column assets_0.tags"} if other else set())
    assert before <= snapshot(url)


@pytest.mark.parametrize("kind", BEFORE)
def test_where_autotag_never_was_there_is_nothing_of_it(url: str, kind: str) -> None:
    run(url, BEFORE[kind])
    before = snapshot(url)
    assert make_plan(url).empty
    assert make_plan(url).yours == []
    drop_autotag(url, drop_results=True)
    assert snapshot(url) == before
    if kind == "a cron job":
        assert run(url, "select count(*) from cron.job") == [(1,)]
    if kind == "a migration":
        assert run(url, "select count(*) from supabase_migrations.schema_migrations") == [(1,)]


def test_columns_that_the_table_had_stay_with_their_values(url: str) -> None:
    run(url, BEFORE["columns"], "alter table public.assets add column tagging_result jsonb; update public.assets set"
        " tagging_error = 'by ann', tagging_result = '{\"mine\": true}' where true", "comment on column"
        " public.assets.tagging_error is 'ours'")  # fmt: skip
    before = snapshot(url)
    assert apply_migrations(url)
    run(url, "update public.assets set tagging_stage = 'approved' where true", "update public.assets set tagging_stage"
        " = 'reviewed' where true")  # autotag's checks are for its own columns  # fmt: skip
    plan = make_plan(url, drop_results=True)
    assert (plan.columns, plan.yours) == ([], [])
    stages = {f"assets.tagging_{name}" for name in ("stage", "progress", "eta", "error")}
    assert set(plan.unmarked) == {*stages, "assets.tagging_result"}
    drop_autotag(url, drop_results=True)
    assert snapshot(url) - before == {"column assets.tags"}
    assert before <= snapshot(url)
    assert run(url, "select tagging_result from public.assets") == [({"mine": True},)]


def test_one_own_column_stays_and_autotags_go(url: str) -> None:
    run(url, "alter table public.assets add column tagging_error text")
    before = snapshot(url)
    for _ in range(2):  # what a first installation leaves is autotag's in a second one
        assert apply_migrations(url)
        assert len(make_plan(url, drop_results=True).columns) == 4
        drop_autotag(url)
    assert {name for name in snapshot(url) if name.startswith("column assets.tagging")} == {
        "column assets.tagging_error", "column assets.tagging_result",
    }  # fmt: skip
    assert apply_migrations(url)
    drop_autotag(url, keep_stages=True)
    assert apply_migrations(url)
    drop_autotag(url, drop_results=True)
    assert {name for name in snapshot(url) - before if not name.startswith("row")} == {"column assets.tags"}


@pytest.mark.parametrize("kind", TAKEN)
def test_half_an_installation_comes_out_and_the_taken_name_stays(
    url: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`supabase db push` installs half of autotag, because it does not look for taken names first."""
    monkeypatch.setattr("autotag.install.migrations.check_names", lambda *_: None)
    run(url, TAKEN[kind])
    before = snapshot(url)
    with pytest.raises(psycopg.Error):
        apply_migrations(url)
    assert make_plan(url).schema
    done = drop_autotag(url, drop_results=True)
    assert (done.yours, done.objects) == ([], [])
    assert snapshot(url) - before == {"column assets.tags"}
    assert before <= snapshot(url)


def test_names_like_autotags_stay_and_what_uses_it_stops(url: str) -> None:
    assert apply_migrations(url)
    installed = snapshot(url)
    run(url, BESIDE)
    assert make_plan(url).yours == []
    beside = snapshot(url) - installed
    run(url, *STOPS.values())
    assert set(make_plan(url).yours) == set(STOPS)
    for missing in STOPS:
        with pytest.raises(InUse, match=missing.partition("(")[0]):
            drop_autotag(url, also=set(STOPS) - {missing})
    drop_autotag(url, also=set(STOPS))
    assert beside | {"function enqueue_tagging(text)"} <= snapshot(url)
    assert run(url, "select jobname || database from cron.job order by jobid limit 3")[2] == ("autotag-tickanother",)
    assert run(url, "select count(*) from cron.job") == [(3,)]
    assert run(url, "select name from supabase_migrations.schema_migrations") == [("autotag_settings_of_ours",)]


RENAMED = {
    "a plain rename": "",
    "a view in front": "create view public.assets with (security_invoker) as select * from public.photos",
    "another table has the name": "create table public.assets (id uuid primary key)",
}


@pytest.mark.parametrize(("kind", "keep"), [("a plain rename", True), *((kind, False) for kind in RENAMED)])
def test_a_renamed_table_loses_its_columns_too(url: str, kind: str, keep: bool) -> None:
    assert apply_migrations(url)
    run(url, "select public.enqueue_tagging(array(select id from public.assets))",
        "alter table public.assets rename to photos", RENAMED[kind] or "select 1")  # fmt: skip
    plan = make_plan(url, keep_stages=keep)
    assert plan.columns == (
        [] if keep else [f"photos.tagging_{name}" for name in ("stage", "progress", "eta", "error")]
    )
    drop_autotag(url, keep_stages=keep, also=plan.yours)
    [(row,)] = run(url, "select to_jsonb(p) from public.photos p")
    assert isinstance(row, dict)
    assert row.get("tagging_stage") == ("failed" if keep else None)
    assert ("tagging_stage" in row) == keep
    assert (plan.yours != []) == (kind == "a view in front" and not keep)


def test_nobody_guesses_which_of_two_tables_it_was(url: str) -> None:
    assert apply_migrations(url)
    run(
        url,
        "create table public.copied (like public.assets including all)",
        "alter table public.assets rename to photos",
    )
    with pytest.raises(HostError, match="comment on column"):
        make_plan(url)
    for name in ("result", "stage", "progress", "eta", "error"):
        run(url, f"comment on column public.copied.tagging_{name} is null")
    assert {name.partition(".")[0] for name in drop_autotag(url).columns} == {"photos"}


async def test_a_migration_of_the_projects_own_is_not_autotags(url: str, tmp_path: Path) -> None:
    (tmp_path / "supabase").mkdir()
    (tmp_path / "supabase" / "config.toml").write_text('project_id = "test"\n')
    folder, environment = tmp_path / "supabase" / "migrations", {"DATABASE_URL": url}
    options = ("--yes", "--members-table", "public.workspace_members", "--file-rule", "any")
    code, _, err = await run_command("init", str(tmp_path), *options, environment=environment)
    assert code == 0, err
    (folder / "20990101000000_autotag_settings.sql").write_text("create table public.from_own_migration (n integer)")
    assert "settings" not in written_migrations(folder)
    assert "settings" not in apply_written(url, written_migrations(folder))
    run(url, "insert into supabase_migrations.schema_migrations (version, name) values ('1', 'autotag_settings')")
    code, out, err = await run_command("uninstall", "--yes", environment=environment)
    assert (code, "_autotag_host_adapter.sql" in out, "autotag_settings" in out) == (0, True, False), err
    assert "column from_own_migration.n" not in snapshot(url)
    code, out, err = await run_command("uninstall", "--yes", "--json", environment=environment)
    assert (code, json.loads(out)["dropped"]) == (0, False), "and its row in the history is no sign of autotag"
    assert apply_written(url, written_migrations(folder))


def test_odd_names_are_quoted(url: str) -> None:
    run(url, """create schema "Büro"; create table "Büro"."ta'ble %s" ("größe" uuid primary key, "order" uuid not null,
        image_url text, "tagging_eta" timestamptz)""")  # fmt: skip
    assert apply_migrations(url, host=Host("Büro.ta'ble %s", id="größe", workspace="order", path=None, bucket=None))
    run(url, """alter table "Büro"."ta'ble %s" rename to "t.x""y" """)
    plan = make_plan(url, drop_results=True)
    assert (plan.yours, plan.unmarked) == ([], ['"Büro"."t.x""y".tagging_eta'])
    drop_autotag(url, drop_results=True)
    columns = run(url, "select array_agg(column_name::text order by column_name collate \"C\") from information_schema.columns"
                       " where table_schema = 'Büro'")  # fmt: skip
    assert columns == [(["größe", "image_url", "order", "tagging_eta", "tags"],)]


def test_columns_that_a_change_of_the_adapter_adds_are_autotags(url: str) -> None:
    assert apply_migrations(url)
    run(url, "alter table public.assets drop column tags, drop column tagging_result")
    found = survey(url, Choices(tags="ai_tags"), refuse_to_ask, may_ask=False)
    assert found.change
    apply_migrations(url, host=found.host, extra=[found.change])
    assert "assets.tagging_result" in make_plan(url, drop_results=True).columns
