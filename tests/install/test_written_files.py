"""The files that `init` has written belong to the project, and are applied as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner, Result

from autotag.cli.app import app
from autotag.install.adapter import FUNCTION
from autotag.install.migrations import migrations
from autotag.install.quoting import literal, read_literal
from cli_tools import supabase
from conftest import BARE_TEMPLATE, copied_database
from forked import run_command
from lab.postgres import LocalPostgres

WORKSPACE = "00000000-0000-4000-8000-0000000000a1"
READER, EDITOR = "00000000-0000-4000-8000-0000000000b1", "00000000-0000-4000-8000-0000000000b2"
SCHEMA = f"""
    create schema private;
    create function private.is_org_member(uuid) returns boolean language sql stable security definer set search_path = '' as
      $$ select auth.uid() in ('{READER}', '{EDITOR}') $$;
    create function private.can_edit(uuid) returns boolean language sql stable security definer set search_path = '' as
      $$ select auth.uid() = '{EDITOR}' $$;
    create table public.media_items (id bigint primary key, org_id uuid not null, image_url text, tags text[]);
    insert into public.media_items values (1, '{WORKSPACE}', 'https://example.com/1.jpg');"""
READERS, EDITORS = ("--members-function", "private.is_org_member"), ("--members-function", "private.can_edit")


@pytest.fixture(scope="module")
def url(postgres: LocalPostgres) -> Iterator[str]:
    """A database for tests that install nothing."""
    with copied_database(postgres, BARE_TEMPLATE) as name:
        yield prepared(postgres, name)


@pytest.fixture
def own_url(postgres: LocalPostgres, bare: str) -> str:
    """A database for a test that installs autotag."""
    return prepared(postgres, bare)


def prepared(postgres: LocalPostgres, database: str) -> str:
    with psycopg.connect(postgres.url(database=database), autocommit=True) as connection:
        connection.execute(SCHEMA.encode())
    return postgres.url(database=database)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The migrations of a project, in whose folder every command runs."""
    (tmp_path / "supabase" / "migrations").mkdir(parents=True)
    (tmp_path / "supabase" / "config.toml").write_text('project_id = "test"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path / "supabase" / "migrations"


def invoke(command: str, url: str, *options: str) -> Result:
    return CliRunner().invoke(app, [command, "--database-url", url, "--yes", *options])


def init(url: str, *options: str) -> dict[str, Any]:
    done = invoke("init", url, "--table", "media_items", "--json", *options)
    assert done.exit_code == 0, done.output
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def members(url: str) -> tuple[bool, bool]:
    """Whether the reader and the editor are members, by the installed adapter."""
    found = []
    with psycopg.connect(url) as connection:
        for user in (READER, EDITOR):
            connection.execute("select set_config('request.jwt.claims', %s, true)", (json.dumps({"sub": user}),))
            found += connection.execute("select autotag.is_member(%s)", (WORKSPACE,)).fetchone() or ()
    return found[0], found[1]


def adapter_of(folder: Path) -> Path:
    [found] = folder.glob("*_autotag_host_adapter.sql")
    return found


def test_answers_that_a_waiting_file_does_not_have_stop_init(url: str, folder: Path) -> None:
    init(url, *READERS, "--editors", "members", "--spending-limit", "20")
    before = {path: path.read_text() for path in folder.glob("*.sql")}
    for options in (EDITORS, ("--members-claim", "orgs"), ("--where", "id > 1"), ("--editors", "none"),
                    ("--tags-column", "ai_tags"), ("--spending-limit", "5"), ("--full-paths",)):  # fmt: skip
        for form in ((), ("--json",)):
            done = invoke("init", url, *options, *form)
            assert (done.exit_code, "delete" in done.stderr) == (2, True), (options, done.output)
            assert "Nothing to write" not in done.output
    assert "private.is_org_member in the file, private.can_edit now" in invoke("init", url, *EDITORS).stderr
    assert before == {path: path.read_text() for path in folder.glob("*.sql")}

    told = init(url, "--project-url", "https://img.shop.example")
    assert [note for note in told["notes"] if "No rule fits the files of img.shop.example" in note]

    again = init(url)  # what is not named stays as the file has it
    assert again["host"]["members"] == "whom private.is_org_member(workspace) accepts"
    assert set(again["files"].values()) == {"there"}

    adapter_of(folder).unlink()  # as the message says; what needs the adapter is in the folder already
    assert init(url, *EDITORS)["files"][adapter_of(folder).name] == "written"
    assert adapter_of(folder).name == min(path.name for path in folder.glob("*.sql"))


def test_the_examples_are_what_an_edited_file_answers(url: str, folder: Path) -> None:
    told = init(url, *READERS)
    path = adapter_of(folder)
    path.write_text(path.read_text().replace("select d.id, d.workspace", "select  d.id, d.workspace"))
    again = init(url)
    assert (told["examples"][0]["image"], again["examples"][0]["image"]) == ("https://example.com/1.jpg",) * 2
    assert [note for note in again["notes"] if "has changed autotag." in note]
    path.write_text(path.read_text() + "create table public.media_items (n integer);\n")
    done = invoke("init", url)
    assert (done.exit_code, "does not fit public.media_items" in done.stderr) == (2, True), done.output


#: What git and editors make of a file. Without a word of which: it is read as it was.
DAMAGE = {
    "a merge of two branches": (lambda path: path.with_name("20990101000000" + path.name[14:]).write_text(path.read_text()),
                                "are both autotag's host_adapter"),
    "another encoding": (lambda path: path.write_bytes(path.read_bytes() + "\n-- Prüfung\n".encode("latin-1")), "is not UTF-8"),
    "a byte order mark": (lambda path: path.write_text(path.read_text(), "utf-8-sig"), None),
    "line ends of Windows": (lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")), None),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_files_that_git_or_an_editor_has_changed(own_url: str, folder: Path, damage: str) -> None:
    init(own_url, *READERS)
    change, says = DAMAGE[damage]
    change(adapter_of(folder))
    for command, options in (("init", ("--table", "media_items")), ("migrate", ())):
        done = invoke(command, own_url, *options)
        assert (done.exit_code, says in done.stderr if says else "") == (2 if says else 0, bool(says) or ""), (
            done.output
        )
    if says is None:
        assert members(own_url) == (True, True)


@pytest.mark.parametrize("place", ["around", "middle"])
def test_a_file_with_transactions_of_its_own_changes_nothing_when_it_is_tried(
    own_url: str, folder: Path, place: str
) -> None:
    """`supabase db push` accepts such a file. `init` runs it to show examples, and must be able to roll it back."""
    init(own_url, *READERS)
    path = adapter_of(folder)
    text = path.read_text()
    path.write_text(f"begin;\n{text}\ncommit;\n" if place == "around"
                    else text.replace("-- Functions that use the host", "commit;\n-- Functions that use the host", 1))  # fmt: skip
    assert "commit;" in path.read_text()
    assert "transactions of its own" in init(own_url)["no_examples"]
    with psycopg.connect(own_url) as connection:
        assert connection.execute("select to_regnamespace('autotag')").fetchone() == (None,)


async def test_files_are_utf_8_whatever_the_locale_is(own_url: str, folder: Path) -> None:
    """The engine's functions contain a final sigma and a typographic apostrophe."""
    for command in (("init", "--yes", "--table", "media_items", *READERS), ("migrate",)):
        environment = {"DATABASE_URL": own_url, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        code, _, err = await run_command(*command, environment=environment)
        assert code == 0, err
    with psycopg.connect(own_url) as connection:
        assert connection.execute("select autotag.tag_key('men’s')").fetchone() == ("mens",)


def test_migrate_applies_the_projects_files_as_they_stand(own_url: str, folder: Path) -> None:
    """Edited files are applied with their edits, and `supabase db push` recognises each of them, including that of a
    change."""
    url = own_url
    init(url, *READERS)
    path = adapter_of(folder)
    strict = f"private.is_org_member(p_workspace_id) and auth.uid() <> '{READER}'"
    text = path.read_text()
    assert text.count("private.is_org_member(p_workspace_id)") == 1
    path.write_text(text.replace("private.is_org_member(p_workspace_id)", strict))
    refused = invoke("migrate", url, *READERS)
    assert (refused.exit_code, "give the options to autotag init" in refused.stderr) == (2, True), refused.output
    done = invoke("migrate", url)
    assert done.exit_code == 0, done.output
    assert str(folder) in done.stdout
    assert members(url) == (False, True)
    with psycopg.connect(url, autocommit=True) as connection:  # as the CLI applies a file in which git has put CRLF
        for found in FUNCTION.finditer(path.read_text()):
            connection.execute(found[0].replace("\n", "\r\n").encode())

    init(url, "--where", "id > 0")
    waiting = invoke("init", url)
    assert "adapter_change_1.sql is not applied yet" in waiting.stdout
    back = invoke("init", url, "--where", "true")
    assert (back.exit_code, "is not applied yet" in back.stderr) == (2, True), "the file has another answer"
    told = invoke("migrate", url, "--json")
    assert json.loads(told.stdout)["applied"] == ["adapter_change_1"]
    assert members(url) == (False, True), "the project's own function stays"
    assert json.loads(invoke("migrate", url, "--json").stdout)["applied"] == []
    init(url, "--spending-limit", "20")
    assert invoke("migrate", url).exit_code == 0
    assert invoke("init", url, "--spending-limit", "20").exit_code == 0
    other = invoke("init", url, "--spending-limit", "5")
    assert (other.exit_code, "update autotag.quotas set max_cost = 5.00" in other.stderr) == (2, True), other.output
    root = str(folder.parent.parent)
    assert "up to date" in supabase("db", "push", f"--remote={url}", "--yes", "--workdir", root)


def test_what_the_cli_would_refuse_is_said_before(own_url: str, folder: Path) -> None:
    """A folder that lacks a migration, or has it under another version, is refused."""
    url = own_url
    init(url, *READERS)
    [engine] = folder.glob("*_autotag_0_1_0.sql")
    kept = engine.read_text()
    engine.unlink()
    done = invoke("migrate", url)
    assert (done.exit_code, "lacks 0_1_0; run autotag init" in done.stderr) == (2, True), done.output
    engine.write_text(kept)
    assert invoke("migrate", url).exit_code == 0
    engine.rename(folder / "20991231000000_autotag_0_1_0.sql")
    for command in ("migrate", "init"):
        done = invoke(command, url)
        assert (done.exit_code, f"rename the file to {engine.name}" in done.stderr) == (2, True), done.output


def test_elsewhere_migrate_applies_what_init_would_write(
    own_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("migrate", own_url, "--table", "media_items", *EDITORS, "--json")
    assert json.loads(done.stdout)["applied"] == [one.name for one in migrations()]
    assert members(own_url) == (False, True)
    missing = CliRunner().invoke(app, ["migrate", str(tmp_path), "--database-url", own_url, "--yes"])
    assert (missing.exit_code, "no Supabase project" in missing.stderr) == (2, True)


RIGHTS = """
    select p.oid::regprocedure::text, p.prosrc, pg_get_function_result(p.oid), p.proconfig, p.prosecdef,
      p.proowner::regrole::text, array(
        select concat_ws(' ', a.grantor::regrole, nullif(a.grantee, 0)::regrole, a.privilege_type, a.is_grantable)
        from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a order by 1)
    from pg_proc p where p.pronamespace = 'autotag'::regnamespace order by 1"""


def test_the_caller_can_change_while_no_user_is_stored(own_url: str, folder: Path) -> None:
    """The type of users' ids changes with the caller, there and back. Functions, their owners and rights, and the
    columns stay the same."""
    url = own_url
    init(url, *READERS)
    assert invoke("migrate", url).exit_code == 0
    with psycopg.connect(url, autocommit=True) as connection:
        for claim, kind in (("sub", "text"), ("auth.uid()", "uuid")):
            before = connection.execute(RIGHTS.encode()).fetchall()
            init(url, "--caller-claim", claim)
            assert invoke("migrate", url).exit_code == 0
            after = connection.execute(RIGHTS.encode()).fetchall()
            assert [row[0] for row in after] == [row[0] for row in before]
            changed = {old[0] for old, new in zip(before, after, strict=True) if old != new}
            assert changed == {"autotag.caller()", "autotag.nobody()", "autotag.adapter_answers()"}
            assert [(old[2:]) for old in before] == [(new[2:]) for new in after], "types, settings, owner and rights"
            found = connection.execute(
                "select distinct format_type(t.typbasetype, null) from pg_attribute a join pg_type t on t.oid = a.atttypid"
                " where t.typname = 'user_id'"
            ).fetchall()
            assert found == [(kind,)]
            assert connection.execute("select autotag.diagnose() -> 'findings'").fetchone()
        with connection.transaction():
            connection.execute("select set_config('request.jwt.claims', %s, true)", (json.dumps({"sub": READER}),))
            connection.execute("set local role authenticated")
            connection.execute("select public.enqueue_tagging(array[1]::bigint[])")
    done = invoke("init", url, "--caller-claim", "sub")
    assert (done.exit_code, "has stored ids" in done.stderr) == (2, True), done.output


@pytest.mark.parametrize("text", ["", "it's", "a$b", "a\\b", "a\\044", "'$'", "\\$\\\\'"])
def test_a_literal_is_read_as_it_was_written(text: str) -> None:
    assert read_literal(literal(text)) == text
