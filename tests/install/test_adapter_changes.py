"""New answers reach an installed adapter by a migration, which leaves functions alone that the project has changed."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from autotag.cli.options import CHOICES
from autotag.install.adapter import FUNCTION, TEMPLATE, hash_body, render
from autotag.install.facts import Facts, read_facts
from autotag.install.host import Choices, Host, HostError
from autotag.install.migrations import apply_migrations, write_migrations
from autotag.install.preview import show_examples
from autotag.install.survey import Survey, refuse_to_ask, survey
from autotag.install.written import recorded_answers
from conftest import BARE_TEMPLATE, copied_database
from lab.postgres import LocalPostgres

WORKSPACE, USER = str(uuid.uuid4()), str(uuid.uuid4())
SCHEMA = f"""
    insert into storage.buckets (id, name) values ('library', 'library');
    create table public.workspaces (id uuid primary key);
    create table public.workspace_members (workspace_id uuid references public.workspaces, user_id uuid references auth.users,
      status text, primary key (workspace_id, user_id));
    alter table public.workspace_members enable row level security;
    create table public.assets (id uuid primary key default gen_random_uuid(), workspace_id uuid not null, storage_path text,
      tags text[], labels text[], deleted_at timestamptz);
    insert into auth.users (id) values ('{USER}');
    insert into public.workspaces values ('{WORKSPACE}');
    insert into public.workspace_members values ('{WORKSPACE}', '{USER}', 'invited');
    insert into public.assets (workspace_id, storage_path, deleted_at)
      values ('{WORKSPACE}', '{WORKSPACE}/a.jpg', null), ('{WORKSPACE}', '{WORKSPACE}/b.jpg', now());"""
FIRST = Choices(
    members_table="workspace_members", members_where="status = 'active'", where="deleted_at is null", editors="members"
)

CREW = Choices(members_table="crew", members_where="status = 'active'")


@pytest.fixture(scope="module")
def installed(postgres: LocalPostgres) -> Iterator[str]:
    """A database with an adapter, whose owner has changed one function."""
    with copied_database(postgres, BARE_TEMPLATE) as name:
        url = postgres.url(database=name)
        run(url, SCHEMA)
        apply_migrations(url, host=look(url, FIRST).host)
        run(url, "create or replace function autotag.is_editor(p_workspace_id autotag.workspace_id) returns boolean"
                 " language sql stable security definer set search_path = pg_catalog as $$ select false /* ours */ $$")  # fmt: skip
        yield url


def run(url: str, statement: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


def look(url: str, choices: Choices, folder: Path | None = None) -> Survey:
    return survey(url, choices, refuse_to_ask, may_ask=False, folder=folder)


def test_the_adapter_records_what_it_was_told_and_wrote(installed: str) -> None:
    bodies = {
        match["name"]: hash_body(match["body"]) for match in FUNCTION.finditer(render(TEMPLATE.read_text(), Host()))
    }
    assert len(bodies) == TEMPLATE.read_text().count("create or replace function")
    [(answers,)] = run(installed, "select autotag.adapter_answers()")
    assert answers["choices"]["where"] == "deleted_at is null"
    assert set(answers["functions"]) == set(bodies) - {"adapter_answers"}
    stored = dict(
        run(installed, "select proname, md5(prosrc) from pg_proc where pronamespace = 'autotag'::regnamespace")
    )
    assert {name for name, one in answers["functions"].items() if stored[name] != one} == {"is_editor"}


def test_new_answers_change_what_they_are_about_and_nothing_else(installed: str, tmp_path: Path) -> None:
    """The table of members is renamed. The other answers to init stay, and so does the function that the project has
    changed."""
    assert look(installed, FIRST).change is None, "nothing new"
    run(installed, "alter table public.workspace_members rename to crew")
    with pytest.raises(HostError, match="Set --members-where"):  # autotag cannot know that it is the same table
        look(installed, Choices(members_table="crew"), tmp_path)
    found = look(installed, CREW, tmp_path)
    assert str(found.host.members) == "public.crew (workspace_id, user_id) where status = 'active'"
    assert found.change
    assert [match["name"] for match in FUNCTION.finditer(found.change.sql)] == ["is_member", "adapter_answers"]
    before = run(
        installed, "select proname, prosrc from pg_proc where pronamespace = 'autotag'::regnamespace order by 1, 2"
    )
    [example] = show_examples(installed, found) or []
    assert example["who"] == f"nobody: workspace {WORKSPACE} has no members"
    assert before == run(
        installed, "select proname, prosrc from pg_proc where pronamespace = 'autotag'::regnamespace order by 1, 2"
    ), "it was only tried"

    def write(now: Survey) -> dict[str, str]:
        assert now.change
        told = write_migrations(tmp_path, now.host, now.facts.applied, adapter=now.facts.adapter, extra=[now.change])
        return {name: state for name, state in told.items() if "_change_" in name}

    [(name, state)] = write(found).items()
    assert state == "written"
    assert name == max(path.name for path in tmp_path.glob("*.sql"))
    assert write(look(installed, CREW, tmp_path)) == {name: "there"}
    with pytest.raises(HostError, match="is not applied yet"):
        look(installed, replace(CREW, where="true"), tmp_path)

    run(installed, f"begin; {(tmp_path / name).read_text()}; commit")
    run(installed, "insert into supabase_migrations.schema_migrations (version, name) values"
                   f" ('{name[:14]}', '{name[15:].removesuffix('.sql')}')")  # fmt: skip
    assert look(installed, Choices(members_table="crew"), tmp_path).change is None, (
        "the same table: its condition stays"
    )
    next_one = look(installed, Choices(where="true"), tmp_path)
    assert next_one.change
    assert next_one.change.name == "adapter_change_2"
    assert len(show_examples(installed, next_one) or []) == 2
    assert apply_migrations(installed, extra=[next_one.change]) == ["adapter_change_2"]
    [(images, editor)] = run(
        installed,
        f"select cardinality(autotag.list_assets('{WORKSPACE}', true, null, 9)), prosrc from pg_proc where proname = 'is_editor'",
    )
    assert (images, editor) == (2, " select false /* ours */ ")


def test_rows_decide_about_files_only_where_files_are_asked_about(installed: str) -> None:
    """Users write the rows. So rows must not widen the file rule when another answer changes."""
    before = look(installed, Choices(editors="members")).host
    with psycopg.connect(installed) as connection:
        connection.execute("update public.assets set storage_path = 'raw/' || storage_path")
        connection.commit()
        try:
            assert look(installed, Choices(where="true")).host.files == before.files
            again = look(installed, Choices(file_rule="workspace-folder")).host.files
            assert (again.prefix, again.depth) == ("raw/", 2)
        finally:
            connection.execute("update public.assets set storage_path = substr(storage_path, 5)")
            connection.commit()


@pytest.mark.parametrize(
    ("choices", "sentence"),
    [
        (Choices(editors="none"), "has changed autotag.is_editor since autotag wrote it"),
        (Choices(tags="labels"), "the tags cannot move to labels"),
        (Choices(table="workspaces", workspace="id", path="name"), "."),
        (Choices(members_claim="org_ids", members_table="crew"), "exclude each other"),
    ],
)
def test_what_would_undo_the_projects_own_work_is_refused(installed: str, choices: Choices, sentence: str) -> None:
    with pytest.raises(HostError, match=sentence) as told:
        look(installed, choices)
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize("where", ["true", "user_id <> workspace_id"])
@pytest.mark.parametrize(
    "column", ["", "status text", "deleted_at timestamptz", "banned boolean", "left_at timestamptz"]
)
def test_another_table_of_members_is_asked_about_like_a_first_one(
    installed: str, where: str, column: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Conditions and names of columns of the former table do not apply to the new one, and no condition is dropped
    silently."""
    told = {
        "members_table": "public.crew",
        "members_user": "person",
        "members_workspace": "team",
        "members_where": where,
    }

    def read(url: str) -> Facts:
        facts = read_facts(url)
        assert facts.answers
        return replace(facts, answers={**facts.answers, "choices": {**facts.answers["choices"], **told}})

    monkeypatch.setattr("autotag.install.survey.read_facts", read)
    run(
        installed,
        "create table public.staff (workspace_id uuid references public.workspaces, user_id uuid references auth.users,"
        f" primary key (workspace_id, user_id){column and f', {column}'})",
    )
    try:
        if column or where != "true":
            with pytest.raises(HostError, match="Set --members-where"):
                look(installed, Choices(members_table="staff"))
            condition = "true"
        else:
            condition = None
        named = look(installed, Choices(members_table="staff", members_where=condition))
        assert str(named.host.members) == "public.staff (workspace_id, user_id)"
    finally:
        run(installed, "drop table public.staff")


#: Option -> another value than the adapter's.
OTHER: dict[str, Any] = {
    "table": "workspaces", "id": "workspace_id", "workspace": "id", "owner": "workspace_id", "path": "id", "bucket": "other",
    "full_paths": True, "object": "workspace_id", "url": "storage_path", "project_url": "https://img.shop.example",
    "tags": "labels", "where": "id is not null", "members_table": "workspaces", "members_workspace": "user_id",
    "members_user": "workspace_id", "members_where": "user_id is not null", "members_claim": "orgs",
    "members_function": "private.f", "caller_claim": "sub", "file_rule": "any", "editors": "none",
}  # fmt: skip


#: What `init` says of those that this project cannot have.
REFUSED = {
    "table": "Set --workspace-column", "id": "not unique by itself", "workspace": "set --members-table",
    "path": "autotag needs text", "tags": "Rename tags instead", "members_table": "(--members-table)",
    "members_function": "There is no function private.f(uuid)", "editors": "The project has changed autotag.is_editor",
}  # fmt: skip


@pytest.mark.parametrize("option", CHOICES)
def test_no_option_is_ignored(installed: str, option: str) -> None:
    """An option with another value than in the installed adapter changes the adapter, or `init` stops and gives the
    reason."""
    choices = Choices(**{option: OTHER[option]})
    if option in REFUSED:
        with pytest.raises(HostError, match=re.escape(REFUSED[option])):
            look(installed, choices)
        return
    change = look(installed, choices).change
    assert change
    told = recorded_answers(change.sql)
    assert told
    recorded = {
        **told["choices"],
        "file_rule": told["files"]["name"],
        "project_url": "https://" + "".join(told["storage_hosts"]),
    }
    assert recorded[option] == OTHER[option]


def test_a_host_that_the_environment_names_is_said(installed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment's URL may be another project's, so `init` only mentions it. A host from an option is added to the
    others."""
    monkeypatch.setenv("SUPABASE_URL", "https://img.shop.example")
    for choices in (Choices(), Choices(where="id is not null")):
        found = look(installed, choices)
        assert [note for note in found.notes if "autotag init --project-url https://img.shop.example adds it" in note]
    monkeypatch.delenv("SUPABASE_URL")
    before = look(installed, Choices(where="true")).host
    added = look(installed, Choices(project_url="https://img.shop.example")).host
    assert (added.storage_hosts, added.files) == ((*before.storage_hosts, "img.shop.example"), before.files)
