"""autotag installs itself into projects that look different, and tags their images there."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.rows import dict_row
from typer.testing import CliRunner

from autotag.cli.app import app
from autotag.images.files import Download, ImageFile
from autotag.install.answers import HostError
from autotag.install.facts import read_facts
from autotag.install.host import Choices, FileRule, propose
from autotag.install.migrations import migrations, write_migrations
from cli_tools import supabase
from lab.pictures import Drawing, draw
from lab.postgres import LocalPostgres
from lab.stack import Stack, local_stack
from support import rpc, store_file, until, worker

HOSTS = {
    "paths": """
        create table public.workspaces (id uuid primary key);
        create table public.workspace_members (
          workspace_id uuid references public.workspaces, user_id uuid references auth.users, primary key (workspace_id, user_id));
        alter table public.workspace_members enable row level security;
        create table public.assets (id uuid primary key default gen_random_uuid(), workspace_id uuid not null,
          storage_path text, uploaded_by uuid, tags text[] not null default '{}');
        insert into storage.buckets (id, name, public) values ('library', 'library', false);""",
    "urls and organisations": """
        create table public.organizations (id uuid primary key default gen_random_uuid());
        create table public.organization_members (
          org_id uuid references public.organizations, user_id uuid references auth.users, primary key (org_id, user_id));
        alter table public.organization_members enable row level security;
        create table public.photos (photo_id uuid primary key default gen_random_uuid(),
          org_id uuid not null references public.organizations, image_url text not null, labels jsonb);""",
    "claims": """
        create table public.assets ("assetId" uuid primary key default gen_random_uuid(), tenant_id uuid not null,
          bucket text, file_path text);
        alter table public.assets enable row level security;
        create policy "own tenant" on public.assets to authenticated
          using (tenant_id = ((select auth.jwt()) -> 'app_metadata' ->> 'tenant_id')::uuid);
        insert into storage.buckets (id, name, public) values ('a', 'a', false), ('b', 'b', false);""",
}


@pytest.fixture(scope="module")
def new_project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new project of the Supabase CLI, to copy, because the CLI takes half a second to make one."""
    path = tmp_path_factory.mktemp("project")
    supabase("init", "--workdir", str(path))
    return path


@pytest.fixture
def project(new_project: Path, tmp_path: Path) -> Path:
    """A project of the Supabase CLI with a migration of its own."""
    shutil.copytree(new_project, tmp_path, dirs_exist_ok=True)
    folder = tmp_path / "supabase" / "migrations"
    folder.mkdir()
    (folder / "20250101000000_mine.sql").write_text("-- the project's own\n")
    return tmp_path


def url_of(postgres: LocalPostgres, database: str, statements: str) -> str:
    with psycopg.connect(postgres.url(database=database), autocommit=True) as connection:
        connection.execute(statements)  # type: ignore[arg-type]
    return postgres.url(database=database)


def run(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


async def test_paths_a_bucket_and_a_table_of_members(postgres: LocalPostgres, bare: str, project: Path) -> None:
    url = url_of(postgres, bare, HOSTS["paths"])
    told = run("init", str(project), "--database-url", url, "--yes")
    assert told["host"]["where an image is"] == "bucket library, path storage_path"
    supabase("db", "push", f"--remote={url}", "--yes", "--workdir", str(project))
    async with local_stack(postgres, bare) as stack:
        quicken(stack)
        workspace, user = str(uuid.uuid4()), str(uuid.uuid4())
        run_sql(url, "insert into public.workspaces values (%s)", workspace)
        run_sql(url, "insert into auth.users (id) values (%s)", user)
        run_sql(url, "insert into public.workspace_members values (%s, %s)", workspace, user)
        drawings = list(draw(8))
        ids = []
        for drawing in drawings:
            await store(stack, "library", f"{workspace}/{drawing.name}", drawing)
            [row] = run_sql(url, "insert into public.assets (workspace_id, storage_path) values (%s, %s) returning id::text",
                            workspace, f"{workspace}/{drawing.name}")  # fmt: skip
            ids.append(row["id"])
        await tag(stack, user, ids)
        rows = run_sql(url, "select id::text, tags, tagging_stage from public.assets")
        assert {row["id"]: set(row["tags"]) for row in rows} == dict(zip(ids, (d.tags for d in drawings), strict=True))


async def test_urls_and_organisations(
    postgres: LocalPostgres, bare: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = url_of(postgres, bare, HOSTS["urls and organisations"])
    told = run("init", str(project), "--database-url", url, "--yes")
    assert told["host"]["images"] == "public.photos (id photo_id, workspace org_id)"
    assert told["host"]["members"] == "public.organization_members (org_id, user_id)"
    supabase("db", "push", f"--remote={url}", "--yes", "--workdir", str(project))
    async with local_stack(postgres, bare) as stack:
        quicken(stack)
        user = str(uuid.uuid4())
        [org] = run_sql(url, "insert into public.organizations default values returning id::text")
        run_sql(url, "insert into auth.users (id) values (%s)", user)
        run_sql(url, "insert into public.organization_members values (%s, %s)", org["id"], user)
        [drawing] = draw(1)
        [row] = run_sql(url, "insert into public.photos (org_id, image_url) values (%s, %s) returning photo_id::text as id",
                        org["id"], "https://pictures.example.com/1.jpg")  # fmt: skip

        async def fetch(self: Any, address: str, download: Download) -> ImageFile:  # the network is not what is tested
            assert address == "https://pictures.example.com/1.jpg"
            await download.begin(len(drawing.data))
            await download.write(drawing.data)
            return download.finish()

        monkeypatch.setattr("autotag.images.urls.Urls.fetch", fetch)
        await tag(stack, user, [row["id"]])
        [photo] = run_sql(url, "select labels, tagging_result, tagging_stage from public.photos")
        assert set(photo["labels"]) == drawing.tags
        assert photo["tagging_stage"] == "completed"
        [told] = run_sql(url, "select autotag.comparison_sample(%s, 5) as sample", org["id"])
        assert [(one["asset_id"], set(one["tags"]), one["url"]) for one in told["sample"]] == [
            (row["id"], drawing.tags, "https://pictures.example.com/1.jpg")
        ]


async def test_membership_in_claims(postgres: LocalPostgres, bare: str, project: Path) -> None:
    url = url_of(postgres, bare, HOSTS["claims"])
    told = run("init", str(project), "--database-url", url, "--yes")
    assert told["host"]["members"] == "claim app_metadata.tenant_id"
    assert "added: tags, tagging_result" in told["host"]["tags go to"]
    supabase("db", "push", f"--remote={url}", "--yes", "--workdir", str(project))
    async with local_stack(postgres, bare) as stack:
        quicken(stack)
        tenant = str(uuid.uuid4())
        [drawing] = draw(1)
        await store(stack, "b", f"{tenant}/1.png", drawing)
        [row] = run_sql(url, "insert into public.assets (tenant_id, bucket, file_path) values (%s, 'b', %s)"
                        ' returning "assetId"::text as id', tenant, f"{tenant}/1.png")  # fmt: skip
        stranger = {"sub": str(uuid.uuid4()), "app_metadata": {"tenant_id": str(uuid.uuid4())}}
        with pytest.raises(psycopg.Error) as refused:
            rpc(stack, stranger, "public.enqueue_tagging", [row["id"]])
        assert refused.value.sqlstate == "PT404"
        await tag(stack, {"sub": str(uuid.uuid4()), "app_metadata": {"tenant_id": tenant}}, [row["id"]])
        [asset] = run_sql(url, "select tags from public.assets")
        assert set(asset["tags"]) == drawing.tags


def quicken(stack: Stack) -> None:
    stack.simulator.plan.latency = (0.01, 0.05)
    stack.configure(chunk_delay="0.1 s", broadcast_interval="0")


def run_sql(url: str, statement: str, *arguments: object) -> list[dict[str, Any]]:
    with psycopg.connect(url, autocommit=True, row_factory=dict_row) as connection:
        cursor = connection.execute(statement, arguments)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []


async def store(stack: Stack, bucket: str, path: str, drawing: Drawing) -> None:
    await store_file(stack.storage(), bucket, path, drawing)


async def tag(stack: Stack, user: str | dict[str, Any], ids: list[str]) -> None:
    """Tags these images as a signed-in user of this host, from the call to the end of the job."""
    async with worker(stack, image_hosts=frozenset({"pictures.example.com"})):
        job = rpc(stack, user, "public.enqueue_tagging", ids)
        await until(lambda: rpc(stack, user, "public.tagging_job", job["job_id"])["finished_at"], "the job to finish")
    ended = rpc(stack, user, "public.tagging_job", job["job_id"])
    assert (ended["completed"], ended["failed"]) == (len(ids), 0), ended


def test_migrations_come_behind_the_projects_own_in_order(postgres: LocalPostgres, bare: str, project: Path) -> None:
    url = url_of(postgres, bare, HOSTS["paths"])
    (project / "supabase" / "migrations" / "20991231235959_late.sql").write_text("-- ahead of its time\n")
    answer = run("init", str(project), "--database-url", url, "--yes")
    index = "create index concurrently if not exists assets_tags_idx on public.assets using gin (tags);"
    assert answer["tag_index"] == {"statement": index, "note": None}
    files = list(answer["files"])
    assert not any(
        path.read_text().count("concurrently") for path in (project / "supabase" / "migrations").glob("*.sql")
    ), "it cannot run in a migration"
    assert [re.sub(r"^\d+_autotag_", "", name) for name in files] == [f"{m.name}.sql" for m in migrations()]
    assert files == sorted(files)
    assert all(name > "20991231235959_late.sql" for name in files)
    assert not any("host_baseline" in name for name in files)


def test_init_twice_writes_nothing_and_keeps_an_edited_adapter(
    postgres: LocalPostgres, bare: str, project: Path
) -> None:
    url = url_of(postgres, bare, HOSTS["paths"])
    first = run("init", str(project), "--database-url", url, "--yes")["files"]
    assert set(first.values()) == {"written"}
    adapter = next((project / "supabase" / "migrations").glob("*_autotag_host_adapter.sql"))
    adapter.write_text(adapter.read_text() + "-- edited\n")
    again = run("init", str(project), "--database-url", url, "--yes")["files"]
    assert again == {name: "differs" if name == adapter.name else "there" for name in first}
    assert adapter.read_text().endswith("-- edited\n")


def test_migrate_and_the_cli_know_of_each_other(postgres: LocalPostgres, bare: str, project: Path) -> None:
    """After `migrate`, `init` writes the files with the applied versions, so `db push` finds nothing to do."""
    url = url_of(postgres, bare, HOSTS["urls and organisations"])
    assert run("migrate", "--database-url", url, "--yes")["applied"] == [m.name for m in migrations()]
    assert run("migrate", "--database-url", url, "--yes")["applied"] == []
    run("init", str(project), "--database-url", url, "--yes")
    (project / "supabase" / "migrations" / "20250101000000_mine.sql").unlink()
    said = supabase("db", "push", f"--remote={url}", "--yes", "--workdir", str(project))
    assert "up to date" in said


def test_what_cannot_be_seen_is_asked_for(postgres: LocalPostgres, bare: str, project: Path) -> None:
    url = url_of(
        postgres, bare,
        "create table public.assets (id uuid primary key, workspace_id uuid, image_url text)",
    )  # fmt: skip
    done = CliRunner().invoke(app, ["init", str(project), "--database-url", url, "--yes"])
    assert done.exit_code == 2
    assert "--members-claim" in done.output
    assert list((project / "supabase" / "migrations").glob("*autotag*")) == []
    told = run("init", str(project), "--database-url", url, "--yes", "--members-claim", "org_ids")
    assert told["host"]["members"] == "claim org_ids"


def test_on_a_terminal_it_asks(postgres: LocalPostgres, bare: str, project: Path) -> None:
    """`init` asks a person only what it cannot find out, and writes the answer into the adapter."""
    url = url_of(postgres, bare, "create table public.assets (id uuid primary key, workspace_id uuid, image_url text)")
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "autotag", "init", str(project), "--database-url", url], stdin=theirs,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    os.write(ours, b"app_metadata.teams\n12.5\n")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert out.count("Which") == 1
    limit = next((project / "supabase" / "migrations").glob("*_autotag_spending_limit.sql")).read_text()
    assert "values ('workspace', 'month', 12.50)" in limit
    adapter = next((project / "supabase" / "migrations").glob("*_autotag_host_adapter.sql")).read_text()
    assert "'{app_metadata,teams}'" in adapter


def test_a_spending_limit_goes_in_behind_everything_else(postgres: LocalPostgres, bare: str, project: Path) -> None:
    url = url_of(postgres, bare, HOSTS["paths"])
    files = list(run("init", str(project), "--database-url", url, "--yes", "--spending-limit", "20")["files"])
    assert files[-1] == max(files)
    assert files[-1].endswith("_autotag_spending_limit.sql")
    supabase("db", "push", f"--remote={url}", "--yes", "--workdir", str(project))
    [quota] = run_sql(url, "select scope, period, max_cost, workspace_id from autotag.quotas")
    assert quota == {"scope": "workspace", "period": "month", "max_cost": 20, "workspace_id": None}
    # Again, with another number: what is there stays, and the command says how to change it.
    for command in (("init", str(project)), ("migrate",)):
        done = CliRunner().invoke(app, [*command, "--database-url", url, "--yes", "--spending-limit", "5"])
        assert (done.exit_code, "update autotag.quotas set max_cost = 5.00" in done.stderr) == (2, True), done.output
    with psycopg.connect(url) as connection:
        told = connection.execute("select autotag.diagnose() -> 'findings'").fetchone()
    assert told is not None
    assert next(f for f in told[0] if f["check"] == "spending")["level"] == "ok"


def test_migrate_takes_a_spending_limit_too_and_says_what_a_person_should_know(
    postgres: LocalPostgres, bare: str
) -> None:
    url = url_of(postgres, bare, HOSTS["paths"] + "alter table public.workspace_members disable row level security")
    told = run("migrate", "--database-url", url, "--members-table", "workspace_members", "--spending-limit", "7.5")
    assert told["applied"][-1] == "spending_limit"
    assert [note for note in told["notes"] if "they can add themselves" in note]
    assert run_sql(url, "select max_cost from autotag.quotas") == [{"max_cost": 7.5}]
    assert run("migrate", "--database-url", url, "--yes")["applied"] == []


def test_no_negative_spending_limit(postgres: LocalPostgres, bare: str, project: Path) -> None:
    url = url_of(postgres, bare, HOSTS["paths"])
    done = CliRunner().invoke(app, ["init", str(project), "--database-url", url, "--yes", "--spending-limit", "-1"])
    assert done.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--table", "nope"], "There is no table public.nope"),
        (["--path-column", "nope"], "has no column nope"),
        (["--path-column", "uploaded_by"], "is uuid; autotag needs text"),
        (["--workspace-column", "tags"], "is text[]; autotag needs uuid, bigint, integer or text"),
        (["--members-table", "assets"], "needs the uuid columns workspace_id and one of"),
        (["--tags-column", "uploaded_by"], "tags go into a text[], varchar[]"),
    ],
)
def test_a_wrong_option_is_one_sentence(
    postgres: LocalPostgres, bare: str, project: Path, arguments: list[str], sentence: str
) -> None:
    url = url_of(postgres, bare, HOSTS["paths"])
    done = CliRunner().invoke(app, ["init", str(project), "--database-url", url, "--yes", *arguments])
    assert done.exit_code == 2
    assert sentence in done.output
    assert "Traceback" not in done.output


def test_no_project_and_no_database_are_said(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["init", str(tmp_path), "--yes"])
    assert (done.exit_code, "no Supabase project" in done.output) == (2, True)
    supabase("init", "--workdir", str(tmp_path))
    done = CliRunner().invoke(
        app, ["init", str(tmp_path), "--yes", "--database-url", "postgresql://nobody@127.0.0.1:1/x"]
    )
    assert (done.exit_code, "cannot be reached" in done.output) == (1, True)


def test_hostile_names_stay_names(postgres: LocalPostgres, bare: str, tmp_path: Path) -> None:
    """Names and strings of the host are quoted, so none of them becomes SQL."""
    nasty = 'x"; drop table public.assets; --'
    with psycopg.connect(postgres.url(database=bare), autocommit=True) as connection:
        connection.execute(
            sql.SQL("create table public.assets (id uuid primary key, workspace_id uuid, {} text, tags text[]);"
                    "create table public.workspaces (id uuid primary key); create table public.members (workspace_id uuid"
                    " references public.workspaces, user_id uuid references auth.users, primary key (workspace_id, user_id));"
                    "alter table public.members enable row level security").format(sql.Identifier(nasty))
        )  # fmt: skip
    url = postgres.url(database=bare)

    def nobody(option: str, question: str, answers: Any) -> str:
        raise HostError(question)

    host = propose(read_facts(url), Choices(path=nasty, bucket="it's"), nobody)
    host = replace(host, files=FileRule("workspace-folder", ("it's",), "a'b/", 2))
    assert (host.path, host.bucket) == (nasty, "it's")
    write_migrations(tmp_path, host, {})
    adapter = next(tmp_path.glob("*host_adapter.sql")).read_text()
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(adapter.encode())
        connection.execute(
            "insert into public.assets select gen_random_uuid(), w, 'a''b/' || w || '/p' from gen_random_uuid() w"
        )
        row = connection.execute(
            "select bucket, path from autotag.describe_assets(array(select id from public.assets))"
        ).fetchone()
    assert row is not None
    assert (row[0], row[1][:4], row[1][-2:]) == ("it's", "a'b/", "/p")


# -- a newer release on a project that has an adapter


STEP = """-- What version 2 of the adapter needs.
create or replace function autotag.new_question() returns text language sql stable
set search_path = pg_catalog, pg_temp as $$ select '{{ table }}'::text $$;
create or replace function autotag.adapter_version() returns integer
language sql immutable set search_path = pg_catalog, pg_temp as $$ select 2 $$;
"""


def test_a_newer_adapter_is_a_step_beside_the_projects_own(
    postgres: LocalPostgres, bare: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter that the project has edited stays. The new version's additions are a migration of their own."""
    url = url_of(postgres, bare, HOSTS["urls and organisations"])
    run("init", str(project), "--database-url", url, "--yes")
    folder = project / "supabase" / "migrations"
    [adapter] = folder.glob("*_autotag_host_adapter.sql")
    adapter.write_text(adapter.read_text() + "-- the project's own words\n")
    supabase("db", "push", f"--remote={url}", "--yes", "--workdir", str(project))

    monkeypatch.setattr("autotag.install.migrations.ADAPTER_STEPS", {2: STEP})
    files = run("init", str(project), "--database-url", url, "--yes")["files"]
    [step] = folder.glob("*_autotag_host_adapter_2.sql")
    assert [name for name, state in files.items() if state == "written"] == [step.name]
    assert adapter.read_text().endswith("-- the project's own words\n")
    assert "'public.photos'" in step.read_text()
    assert step.name == max(path.name for path in folder.glob("*.sql"))
    supabase("db", "push", f"--remote={url}", "--yes", "--workdir", str(project))
    assert run_sql(url, "select autotag.adapter_version() as v, autotag.new_question() as q") == [
        {"v": 2, "q": "public.photos"}
    ]
    assert "written" not in run("init", str(project), "--database-url", url, "--yes")["files"].values()
    assert run("migrate", "--database-url", url, "--yes")["applied"] == []


def test_a_new_project_gets_the_newest_adapter_alone(
    postgres: LocalPostgres, bare: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autotag.install.migrations.ADAPTER_STEPS", {2: STEP})
    url = url_of(postgres, bare, HOSTS["paths"])
    assert not any(
        "host_adapter_2" in name for name in run("init", str(project), "--database-url", url, "--yes")["files"]
    )


def test_migrate_brings_the_step_before_what_needs_it(
    postgres: LocalPostgres, bare: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = url_of(postgres, bare, HOSTS["paths"])
    run("migrate", "--database-url", url, "--yes")
    monkeypatch.setattr("autotag.install.migrations.ADAPTER_STEPS", {2: STEP})
    assert run("migrate", "--database-url", url, "--yes")["applied"] == ["host_adapter_2"]
    assert run_sql(url, "select autotag.adapter_version() as v") == [{"v": 2}]


# -- who is a member is not guessed


MEMBERS = {
    "requests to join": "create table public.join_requests (workspace_id uuid, user_id uuid, id uuid primary key);",
    "invitations": "create table public.member_invitations (workspace_id uuid, user_id uuid, id bigint primary key);",
    "a status": "create table public.workspace_members (workspace_id uuid, user_id uuid, status text, primary key (workspace_id, user_id));",
    "a moment of leaving": "create table public.workspace_members (workspace_id uuid, user_id uuid, deleted_at timestamptz, primary key (workspace_id, user_id));",
    "no key": "create table public.workspace_members (workspace_id uuid, user_id uuid);",
    "two of them": """create table public.workspace_members (workspace_id uuid, user_id uuid, primary key (workspace_id, user_id));
        create table public.team_members (workspace_id uuid, user_id uuid, primary key (workspace_id, user_id));""",
    "what users write themselves": """alter table public.assets enable row level security;
        create policy p on public.assets using (workspace_id = ((auth.jwt() -> 'user_metadata' ->> 'workspace'))::uuid);""",
    "a policy that only takes away": """alter table public.assets enable row level security;
        create policy p on public.assets as restrictive using (workspace_id = ((auth.jwt() -> 'app_metadata' ->> 'workspace'))::uuid);""",
}  # fmt: skip


@pytest.mark.parametrize("name", MEMBERS)
def test_who_is_a_member_is_not_guessed(postgres: LocalPostgres, bare: str, project: Path, name: str) -> None:
    url = url_of(
        postgres, bare, "create table public.assets (id uuid primary key, workspace_id uuid, image_url text);" + MEMBERS[name]
    )  # fmt: skip
    done = CliRunner().invoke(app, ["init", str(project), "--database-url", url, "--yes"])
    assert done.exit_code == 2
    assert "--members-" in done.output
    assert list((project / "supabase" / "migrations").glob("*autotag*")) == []
