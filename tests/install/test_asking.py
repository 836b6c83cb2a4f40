"""`init` asks a person only what matters, and accepts corrections."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from typer.testing import CliRunner, Result

from autotag.cli.app import app
from conftest import BARE_TEMPLATE, ROOT, copied_database
from lab.postgres import LocalPostgres

#: As Prisma makes it, with ids of Supabase's users as text.
SCHEMA = """
    create table public."User" (id text primary key);
    create table public."Workspace" (id text primary key);
    create table public."WorkspaceMember" ("workspaceId" text references public."Workspace", "userId" text references public."User",
      "createdAt" timestamp(3) not null default current_timestamp, primary key ("workspaceId", "userId"));
    create table public.assets (id text primary key, "workspaceId" text not null, image_url text, deleted_at timestamptz);
    insert into public."User" values ('00000000-0000-4000-8000-0000000000b1');
    insert into public."Workspace" values ('w1');
    insert into public."WorkspaceMember" values ('w1', '00000000-0000-4000-8000-0000000000b1');
    insert into public.assets values ('a1', 'w1', 'https://example.com/1.jpg');"""


@pytest.fixture(scope="module")
def url(postgres: LocalPostgres) -> Iterator[str]:
    """A database for tests that install nothing."""
    with copied_database(postgres, BARE_TEMPLATE) as name:
        with psycopg.connect(postgres.url(database=name), autocommit=True) as connection:
            connection.execute(SCHEMA.encode())
        yield postgres.url(database=name)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "supabase").mkdir()
    (tmp_path / "supabase" / "config.toml").write_text('project_id = "test"\n')
    return tmp_path


def answer(url: str, project: Path, monkeypatch: pytest.MonkeyPatch, *answers: str) -> Result:
    monkeypatch.setattr("autotag.cli.init.on_terminal", lambda: True)
    return CliRunner().invoke(
        app, ["init", str(project), "--database-url", url], input="".join(f"{a}\n" for a in answers)
    )


def test_only_what_a_row_can_be_is_asked(url: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing foreign key and ids that are texts are no reason to ask which rows are members."""
    done = answer(url, project, monkeypatch, "WorkspaceMember", "deleted_at is null", "0")
    assert done.exit_code == 0, done.output
    assert "Which of its rows are members" not in done.output
    assert "public.WorkspaceMember" in done.output
    assert "and has" not in done.output


def test_a_wrong_answer_is_asked_for_again_and_costs_no_other(
    url: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = ("Memebers", "WorkspaceMember", "nothing at all", "deleted_at is null", "0")
    done = answer(url, project, monkeypatch, *answers)
    assert done.exit_code == 0, done.output
    assert done.output.count("There is no table public.Memebers") == 1
    assert done.output.count("Postgres does not accept --where") == 1
    assert [done.output.count(f"\n{option}: ") for option in ("where", "members-table")] == [2, 2], (
        "not the others again"
    )
    adapter = next((project / "supabase" / "migrations").glob("*_autotag_host_adapter.sql")).read_text()
    assert "(deleted_at is null)" in adapter


def test_without_a_person_everything_that_is_missing_is_named_at_once(url: str, project: Path) -> None:
    named = ["init", str(project), "--database-url", url, "--yes"]
    for options, missing in (((), ["--members-table", "--where"]), (("--members-table", "WorkspaceMember"), ["--where"]),
                             (("--where", "true"), ["--members-table"]), (("--table", "User"), ["--workspace-column"])):  # fmt: skip
        done = CliRunner().invoke(app, [*named, *options])
        assert (done.exit_code, re.findall(r" Set (--[\w-]+)", done.stderr)) == (2, missing), done.output
    assert not list((project / "supabase").rglob("*autotag*"))
    path = CliRunner().invoke(app, [*named, "--editors", "everybody"])
    assert ("Set --members-table" in path.stderr, "--editors is none or members" in path.stderr) == (True, True)


PARENTS = """
    create table public.teams (id uuid primary key); create table public.albums (id uuid primary key, team_id uuid references public.teams);
    create table public.photos (id uuid primary key, album_id uuid not null references public.albums);
    create table public.users (id bigint primary key, auth_id uuid); create table public.org_users (org_id uuid, user_id bigint);
    insert into public.teams values ('00000000-0000-4000-8000-0000000000a1'), ('00000000-0000-4000-8000-0000000000a2');
    insert into public.albums select id, id from public.teams; insert into public.photos select id, id from public.teams"""


def test_the_recipes_of_the_documentation_work(url: str) -> None:
    text = (
        (ROOT / "docs" / "install.md")
        .read_text()
        .partition("### Users with keys of your own")[2]
        .partition("## Other")[0]
    )
    with psycopg.connect(url) as connection:
        connection.execute(PARENTS.encode())
        for block in re.findall(r"```sql\n(.*?)```", text, re.DOTALL):
            connection.execute(block.encode())
        one, two = "00000000-0000-4000-8000-0000000000a1", "00000000-0000-4000-8000-0000000000a2"
        connection.execute(
            "insert into public.photos values (gen_random_uuid(), %s, %s)", (one, two)
        )  # not their album's team
        teams = "select array_agg(distinct team_id::text) from public.photos where album_id = %s"
        assert connection.execute(teams, (one,)).fetchone() == ([one],)
        connection.execute("update public.albums set team_id = %s where id = %s", (two, one))
        connection.execute("update public.photos set team_id = %s", (one,))
        assert connection.execute(teams, (one,)).fetchone() == ([two],)
        assert connection.execute("select count(*) from private.members").fetchone() == (0,)
        connection.rollback()


INIT = ("--yes", "--members-table", "WorkspaceMember", "--where", "true")


def test_what_is_not_shown_has_a_reason(url: str, project: Path) -> None:
    with psycopg.connect(url) as other:
        other.execute("lock table public.assets in share mode")
        done = CliRunner().invoke(app, ["init", str(project), "--database-url", url, *INIT, "--json"])
    told = json.loads(done.stdout)
    assert (told["examples"], "another session holds public.assets" in told["no_examples"]) == (None, True)


def test_images_are_looked_for_in_other_schemas_and_a_view_is_said_to_be_one(url: str, project: Path) -> None:
    init = ["init", str(project), "--database-url", url, *INIT]
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("alter table public.assets rename to pictured; create view public.images as select 1")
        done = CliRunner().invoke(app, init)
        connection.execute("drop view public.images; create schema app; alter table public.pictured rename to photos;"
                           "alter table public.photos set schema app")  # fmt: skip
        found = CliRunner().invoke(app, [*init, "--json"])
        connection.execute("alter table app.photos set schema public; drop schema app;"
                           "alter table public.photos rename to assets")  # fmt: skip
    assert "Which table holds the images (public.images is a view, so name the table behind it)" in done.stderr
    assert json.loads(found.stdout)["host"]["images"].startswith("app.photos")


def test_ctrl_c_while_it_starts_is_no_traceback(tmp_path: Path) -> None:
    """Imports take most of a second, so people press Ctrl-C then, too."""
    hook = tmp_path / "sitecustomize.py"
    hook.write_text("import signal, sys\n"
                    "class Stop:\n"
                    "    def find_spec(self, name, *_):\n"
                    "        if name == 'autotag.cli.app':\n"
                    "            signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
                    "            signal.raise_signal(signal.SIGINT)\n"
                    "sys.meta_path.insert(0, Stop())\n")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "autotag", "--version"], capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (130, "")
