"""Projects that already have an object with a name that autotag needs, or code that takes whole rows of the table: init
reports both before it writes anything, and the app works afterwards."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from tenacity import stop_after_attempt
from typer.testing import CliRunner

from autotag.cli.app import app
from autotag.install import migrations as install
from autotag.install.answers import HostError
from autotag.install.host import Choices
from autotag.install.migrations import apply_migrations
from autotag.install.survey import Survey, refuse_to_ask, survey
from autotag.install.uninstall import drop_autotag
from conftest import BARE_TEMPLATE, copied_database
from lab.postgres import LocalPostgres

WORKSPACE = "00000000-0000-4000-8000-0000000000a1"
ROW = f"insert into public.assets (workspace_id, image_url) values ('{WORKSPACE}', 'https://x.example/a.jpg');"
STORE = """select autotag.store_tags(
  array(select id from public.assets)::autotag.asset_id[], %s, array[%s::jsonb], array[null]::uuid[])"""
ANSWER = {"tags": ["barn"], "confidence": {}, "caption": "c", "model": "m"}
Project = Callable[..., str]


@pytest.fixture(scope="module")
def shared(postgres: LocalPostgres) -> Iterator[str]:
    with copied_database(postgres, BARE_TEMPLATE) as name:
        yield name


def make(url: str, columns: str, statements: str = "", *, row: bool = True) -> str:
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute(
            f"""
            drop schema if exists public, private, autotag cascade;
            drop table if exists supabase_migrations.schema_migrations;
            create schema public;
            create table public.workspace_members (workspace_id uuid, user_id uuid, primary key (workspace_id, user_id));
            create table public.assets (id uuid primary key default gen_random_uuid(), workspace_id uuid not null,
              image_url text, tags text[]{columns and ", "}{columns});
            {ROW if row else ""} {statements}""".encode()
        )
    return url


@pytest.fixture
def project(postgres: LocalPostgres, shared: str) -> Project:
    """Makes a project with these columns in its table of images, and these statements."""
    return lambda columns, statements="", row=True: make(postgres.url(database=shared), columns, statements, row=row)


def surveyed(url: str) -> Survey:
    return survey(url, Choices(members_table="workspace_members", file_rule="any"), refuse_to_ask, may_ask=False)


def refusal(url: str) -> str:
    with pytest.raises(HostError) as told:
        surveyed(url)
    assert "\n" not in str(told.value)
    with psycopg.connect(url) as owner:
        assert owner.execute("select to_regprocedure('autotag.adapter_version()')").fetchone() == (None,)
    return str(told.value)


#: Columns of the project's own, with what is in them -> what the sentence has.
OWN_COLUMNS = {
    "a value": ("tagging_stage text", "update public.assets set tagging_stage = 'done'", "tagging_stage of its own (with values such as done)"),
    "a value that autotag would write": ("tagging_stage text", "update public.assets set tagging_stage = 'queued'", "with values such as queued"),
    "a number": ("tagging_progress int", "update public.assets set tagging_progress = 1000", "with values such as 1000"),
    "a time": ("tagging_eta timestamptz(3)", "update public.assets set tagging_eta = now()", "tagging_eta of its own (with values"),
    "a default": ("tagging_stage text default 'new'", "", "the default 'new'::text"),
    "a check": ("tagging_error text check (length(tagging_error) < 10)", "", "the constraint assets_tagging_error_check"),
    "a foreign key": ("tagging_stage text references public.stages", "", "the constraint assets_tagging_stage_fkey"),
    "a unique index": ("tagging_stage text", "create unique index one_each on public.assets (tagging_stage)", "the constraint one_each"),
    "a generated column": ("tagging_stage text generated always as (lower(image_url)) stored", "", "is generated"),
    "a varchar that is too short": ("tagging_error varchar(20)", "", "tagging_error is character varying(20); autotag needs a column of this name that is text."),
    "a domain": ("tagging_stage public.short", "", "tagging_stage is short; autotag needs"),
    "a time without a zone": ("tagging_eta timestamp", "", "tagging_eta is timestamp without time zone"),
    "a result of the project's": ("tagging_result jsonb", """update public.assets set tagging_result = '{"note": "typed by a person"}'""", "tagging_result of its own (with values such as {"),
    "a result that looks like one": ("tagging_result jsonb", """update public.assets set tagging_result = '{"model": "ours", "caption": "a"}'""", "tagging_result of its own (with values"),
    "a result with a default": ("tagging_result jsonb not null default '{}'", "", "the default '{}'::jsonb"),
    "a result that is required": ("tagging_result jsonb not null", "", "(no nulls)"),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_COLUMNS)
def test_a_column_of_the_projects_own_is_not_taken(project: Project, name: str) -> None:
    columns, statements, sentence = OWN_COLUMNS[name]
    url = project("", row=name != "a result that is required")
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute("create domain public.short as text check (length(value) < 9);"
                      "create table public.stages (name text primary key)")  # fmt: skip
        owner.execute(f"alter table public.assets add column {columns}; {statements}".encode())
    assert sentence in refusal(url)


def test_nothing_is_written_then(project: Project, tmp_path: Path) -> None:
    url = project("tagging_stage text default 'new'")
    (tmp_path / "supabase").mkdir()
    (tmp_path / "supabase" / "config.toml").touch()
    for command in ("init", "migrate"):
        done = CliRunner().invoke(
            app, [command, "--yes", "--members-table=workspace_members", f"--database-url={url}", str(tmp_path)]
        )
        assert (done.exit_code, "rename column tagging_stage to" in done.output) == (2, True), done.output
    assert not (tmp_path / "supabase" / "migrations").exists()


def test_files_are_not_applied_to_a_database_with_such_a_column(project: Project, tmp_path: Path) -> None:
    """The files were written for another database, such as the local stack, and this one has a column with a name that
    autotag needs."""
    found = surveyed(project(""))
    (tmp_path / "supabase").mkdir()
    (tmp_path / "supabase" / "config.toml").touch()
    install.write_migrations(tmp_path / "supabase" / "migrations", found.host, {})
    url = project("tagging_stage text", "update public.assets set tagging_stage = 'done'")
    done = CliRunner().invoke(app, ["migrate", f"--database-url={url}", str(tmp_path)])
    assert (done.exit_code, "with values such as done" in done.output) == (2, True), done.output


@pytest.mark.parametrize(
    ("columns", "value", "refused"),
    [
        ("", "'{6f1c2d3e-0000-4000-8000-000000000001}'", True),
        ("labels jsonb", "'[1, 2]'", True),
        ("labels jsonb", "'[\"6F1C2D3E-0000-4000-8000-000000000001\"]'", True),
        ("labels jsonb", "'[\"barn\"]'", False),
        ("", "'{barn,2024}'", False),
        ("labels json", "'[]'", False),
    ],
)
def test_lists_of_ids_are_no_tags(project: Project, columns: str, value: str, refused: bool) -> None:
    name = columns.partition(" ")[0] or "tags"
    drop = "alter table public.assets drop column tags;" if columns else ""
    url = project(columns, f"{drop} update public.assets set {name} = {value};")
    if refused:
        assert f"public.assets.{name} has lists of ids" in refusal(url)
    else:
        assert surveyed(url).host.tags == name


@pytest.mark.parametrize("own", ["20991231000000_my-thing.sql", "20991231000000_my thing (2).sql"])
def test_files_are_later_than_all_that_the_supabase_cli_applies(project: Project, own: str, tmp_path: Path) -> None:
    (tmp_path / own).touch()
    written = install.write_migrations(tmp_path, surveyed(project("")).host, {})
    assert min(written) > own, written


def test_a_version_that_leaves_none_behind_it_is_told(project: Project, tmp_path: Path) -> None:
    (tmp_path / "99991231235959_last.sql").touch()
    with pytest.raises(HostError, match="version 99991231235959, which leaves none behind it"):
        install.write_migrations(tmp_path, surveyed(project("")).host, {})


def test_a_database_that_cannot_be_written_is_told(project: Project, tmp_path: Path) -> None:
    (tmp_path / "supabase").mkdir()
    (tmp_path / "supabase" / "config.toml").touch()
    url = project("") + "?options=-cdefault_transaction_read_only%3Don"
    done = CliRunner().invoke(
        app, ["init", "--yes", "--members-table=workspace_members", f"--database-url={url}", str(tmp_path)]
    )
    assert (done.exit_code, "the database is read-only" in done.output) == (1, True), done.output


EMPTY = "tagging_stage varchar, tagging_progress smallint, tagging_eta timestamptz, tagging_error varchar, tagging_result jsonb"


def test_empty_columns_are_used(project: Project) -> None:
    url = project(EMPTY)
    found = surveyed(url)
    assert [note for note in found.notes if "As it is empty, autotag uses it" in note]
    apply_migrations(url, host=found.host)
    with psycopg.connect(url, autocommit=True) as owner:
        assert owner.execute(
            "select (public.enqueue_tagging(array(select id from public.assets))).image_count"
        ).fetchone() == (1,)
        owner.execute(STORE.encode(), (WORKSPACE, json.dumps(ANSWER)))
        shown = owner.execute("select tagging_stage, tagging_progress, tags from public.assets").fetchone()
        assert shown == ("completed", 100, ["barn"])
    assert surveyed(url).facts.adapter == 1, "a second init"


def test_an_installation_goes_on_from_the_results_of_an_earlier_one(project: Project) -> None:
    url = project("")
    apply_migrations(url, host=surveyed(url).host)
    with psycopg.connect(url, autocommit=True) as owner:
        owner.execute(STORE.encode(), (WORKSPACE, json.dumps(ANSWER)))
        owner.execute("update public.assets set tags = tags || '{Mine}'")
        owner.execute(STORE.encode(), (WORKSPACE, json.dumps(ANSWER)))
    drop_autotag(url)
    assert not [note for note in surveyed(url).notes if "already" in note]


def test_columns_that_autotag_has_left_are_taken_with_their_values(project: Project) -> None:
    url = project("tagging_stage text", "update public.assets set tagging_stage = 'failed';"
                  "comment on column public.assets.tagging_stage is 'autotag: …'")  # fmt: skip
    assert surveyed(url).host.table == "public.assets"


#: Objects with the names of autotag's -> how the sentence names them.
OWN_NAMES = {
    "a function with other arguments": ("create function public.check_rate_limit(who uuid) returns boolean language sql as 'select true'", "function check_rate_limit(who uuid)"),
    "a function with the same": ("create function public.enqueue_tagging(asset_ids uuid[]) returns void language sql as 'select null::void'", "function enqueue_tagging(asset_ids uuid[])"),
    "an enum": ("create type public.tagging_stage as enum ('a')", "type tagging_stage"),
    "a domain": ("create domain public.tagging_job_status as text", "type tagging_job_status"),
    "a table": ("create table public.workspace_rate_limits (n int)", "table workspace_rate_limits"),
    "a view": ("create view public.tagging_job_result as select 1 as n", "view tagging_job_result"),
    "a composite type": ("create type public.tagging_usage_result as (n int)", "type tagging_usage_result"),
    "two": ("create table public.workspace_rate_limits (n int); create type public.tagging_stage as enum ('a')", "table workspace_rate_limits, type tagging_stage"),
    "a schema with a table": ("create schema autotag; create table autotag.mine (x int)", "table mine"),
    "a schema with a function": ("create schema autotag; create function autotag.caller() returns text language sql as 'select 1::text'", "function caller()"),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_NAMES)
def test_a_name_that_the_project_uses_is_told_before_anything_is_applied(project: Project, name: str) -> None:
    statements, sentence = OWN_NAMES[name]
    url = project("", statements)
    assert re.search(rf"has {re.escape(sentence)}, (and|which)", refusal(url))
    with pytest.raises(HostError, match=re.escape(sentence)):
        apply_migrations(url, with_host_baseline=True)


def test_an_empty_schema_and_other_functions_are_no_matter(project: Project) -> None:
    url = project("", "create schema autotag; create schema private;"
                  "create function private.check_rate_limit(uuid) returns int language sql as 'select 1'")  # fmt: skip
    assert apply_migrations(url, host=surveyed(url).host)
    assert surveyed(url).facts.adapter == 1


HISTORY = "create table public.history (like public.assets); alter table public.history add column at timestamptz default now();"
TRIGGER = (
    "create function public.h() returns trigger language plpgsql as $$ begin {} return coalesce(new, old); end $$;"
    " create trigger t {} on public.assets for each row execute function public.h();"
)
COPY = "insert into public.history select old.*, now();"


@pytest.mark.parametrize(
    "body", [COPY, "execute 'insert into public.history select ($1).*, now()' using old;", "insert into public.history values (old.*);",
             "perform set_config('a.b', 'x', false); if new.image_url = old.image_url then insert into public.history select (old).*, now(); end if;"],
)  # fmt: skip
def test_a_trigger_that_takes_whole_rows_is_tried_and_stops_init(project: Project, body: str) -> None:
    history = HISTORY if "now()" in body else "create table public.history (like public.assets);"
    url = project("", history + TRIGGER.format(body, "before update or delete"))
    said = refusal(url)
    assert "an update of a row fails in h() (INSERT has more expressions than target columns)" in said
    with psycopg.connect(url, autocommit=True) as owner:
        assert owner.execute("select count(*) from public.history").fetchone() == (0,), "taken back"
        owner.execute("update public.assets set image_url = 'x'")


#: What a trigger's function does, and when -> whether init names it.
DOUBTFUL = {
    "only on delete": (COPY, "before delete", True),
    "only on insert": ("insert into public.history select new.*, now();", "after insert", True),
    "for other rows": ("if new.image_url = 'special' then " + COPY + " end if;", "before update", True),
    "a comparison": ("if new.* is distinct from old.* then new.image_url := lower(new.image_url); end if;", "before update", False),
    "a comparison of rows": ("if row(new.*) is distinct from row(old.*) then null; end if;", "before update", False),
    "as json": ("perform to_jsonb(new.*); perform row_to_json(old);", "before update", False),
    "in a comment": ("-- old.*\n null;", "before update", False),
    "by name": ("insert into public.history (id, workspace_id) select old.id, old.workspace_id;", "before update or delete", False),
}  # fmt: skip


@pytest.mark.parametrize("name", DOUBTFUL)
def test_a_trigger_that_may_fail_is_named(project: Project, name: str) -> None:
    body, when, named = DOUBTFUL[name]
    url = project("", HISTORY + TRIGGER.format(body, when))
    notes = [note for note in surveyed(url).notes if "whole rows" in note]
    assert bool(notes) == named, notes
    assert not named or "h() (trigger t)" in notes[0]


def test_a_trigger_that_could_leave_the_database_is_not_run(project: Project, postgres: LocalPostgres) -> None:
    url = project("", HISTORY + TRIGGER.format(COPY, "before update"))
    with psycopg.connect(postgres.url("supabase_admin", url.rpartition("/")[2]), autocommit=True) as admin:
        admin.execute("create foreign data wrapper elsewhere; create server another foreign data wrapper elsewhere")
        try:
            assert [note for note in surveyed(url).notes if "h() (trigger t) takes whole rows" in note]
        finally:
            admin.execute("drop foreign data wrapper elsewhere cascade")
    assert "an update of a row fails" in refusal(url)


#: Functions -> whether init names them.
READERS = {
    "a result with the old columns": ("returns table (id uuid, workspace_id uuid, image_url text, tags text[]) language sql as 'select * from public.assets'", "f()"),
    "the columns as a row": ("returns setof public.assets language sql as 'select id, workspace_id, image_url, tags from public.assets'", "f()"),
    "a copy": ("returns void language sql as 'insert into public.history select a.*, now() from public.assets a'", "f()"),
    "the same in plpgsql": ("returns table (a uuid, b uuid, c text, d text[]) language plpgsql as 'begin return query select x.* from public.assets x; end'", "f()"),
    "a copy in plpgsql": ("returns void language plpgsql as 'begin insert into history select *, now() from assets; end'", "f()"),
    "rows": ("returns setof public.assets language sql as 'select * from public.assets'", None),
    "rows in plpgsql": ("returns setof public.assets language plpgsql as 'begin return query select a.* from public.assets a; end'", None),
    "a count": ("returns bigint language sql as 'select count(*) from public.assets'", None),
    "a record": ("returns void language plpgsql as 'declare r record; begin select * into r from public.assets; end'", None),
}  # fmt: skip


@pytest.mark.parametrize("name", READERS)
def test_functions_that_take_whole_rows_are_named(project: Project, name: str) -> None:
    code, named = READERS[name]
    url = project("", HISTORY + f"create function public.f() {code};", row=False)
    notes = [note for note in surveyed(url).notes if "whole rows" in note]
    assert [f"Attention: {named}" in note for note in notes] == ([True] if named else []), notes


def test_of_several_sessions_one_applies_and_the_others_have_nothing_to_do(project: Project) -> None:
    url = project("")
    results: list[Any] = []
    ready = threading.Barrier(3)

    def run() -> None:
        ready.wait()
        try:
            results.append(apply_migrations(url, host=surveyed(url).host))
        except BaseException as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert sorted(map(len, results)) == [0, 0, 2], results


def test_a_lock_on_realtimes_messages_stops_nobody_else(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """migrate gives up after a second, so that inserts do not queue behind it, and names the session that holds the
    lock."""
    url = project("") + "?options=-cstatement_timeout%3D20s"  # rather than to wait for ever
    monkeypatch.setattr(install._apply.retry, "stop", stop_after_attempt(1))
    command = ["migrate", "--yes", "--members-table=workspace_members", "--file-rule=any", f"--database-url={url}"]
    with psycopg.connect(url, application_name="a reader") as reader:
        reader.execute("select count(*) from realtime.messages")
        done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    assert re.search(r"session \d+ \(a reader\) locks realtime\.messages; run the command again", done.output), (
        done.output
    )
    done = CliRunner().invoke(app, command)
    assert (done.exit_code, "Applied: 0_1_0" in done.output) == (0, True), done.output
