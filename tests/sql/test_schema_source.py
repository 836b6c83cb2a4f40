"""``supabase/schemas`` is the only source. The migrations are generated from it, and a released one never changes."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import psycopg
import pytest

import autotag
from autotag.db import VersionsDiffer
from autotag.worker.run import Worker
from autotag.worker.wake import Wake
from lab import release, schema
from lab.catalog import catalog
from lab.postgres import LocalPostgres
from support import PATIENCE, Library, answered_pictures, audit, until, worker, worker_settings

#: The packages of the npm workspace: the client, and the examples that depend on it.
NPM_PACKAGES = [str(path.relative_to(schema.ROOT)) for folder in json.loads((schema.ROOT / "package.json").read_text())["workspaces"]
                for path in schema.ROOT.glob(f"{folder}/package.json")]  # fmt: skip


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the source and its migrations, for tests that change them."""
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)  # there, git has to find tags
    shutil.copytree(schema.SUPABASE, tmp_path / "supabase", ignore=shutil.ignore_patterns("node_modules", "seed"))
    for name in ("worker/autotag/__init__.py", "package-lock.json", "examples/plain/app.js", *NPM_PACKAGES):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(schema.ROOT / name, tmp_path / name)
    supabase = tmp_path / "supabase"
    for name, value in {
        "ROOT": tmp_path, "SUPABASE": supabase, "SCHEMAS": supabase / "schemas", "MIGRATIONS": supabase / "migrations",
        "RELEASES": supabase / "releases", "CHANGES": supabase / "schemas" / "changes.sql",
    }.items():  # fmt: skip
        monkeypatch.setattr(schema, name, value)
    schema.releases.cache_clear()
    if not schema.releases() or schema.next_migration(schema.UNRELEASED):  # what is not released yet is, in the copy
        release.release("8.0.0")
    yield supabase
    schema.releases.cache_clear()


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, f"{old!r} is {text.count(old)} times in {path.name}"
    path.write_text(text.replace(old, new))


def files_of(tree: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in tree.parent.rglob("*") if path.is_file()}


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def catalog_of(url: str) -> dict[str, str]:
    with psycopg.connect(url) as connection:
        return catalog(connection)


def build(url: str, script: str) -> dict[str, str]:
    """The catalog of a database in which a script has run."""
    with psycopg.connect(url) as connection:
        connection.execute("set check_function_bodies = off")
        connection.execute(script.encode())
    return catalog_of(url)


def differing(one: dict[str, str], other: dict[str, str]) -> list[str]:
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


def test_the_migrations_are_what_the_source_says() -> None:
    assert release.differences() == []


def test_source_and_migrations_make_the_same_database(postgres: LocalPostgres, bare: str, database: str) -> None:
    source = build(postgres.url(database=bare), schema.source(host=True))
    assert len(source) > 600
    assert differing(source, catalog_of(postgres.url(database=database))) == []


def test_what_is_changed_in_one_place_only_is_found(
    postgres: LocalPostgres, bare: str, database: str, tree: Path
) -> None:
    change(
        tree / "schemas" / "scheduling" / "claim.sql",
        "-- The only function that releases",
        "-- The function that releases",
    )
    change(tree / "schemas" / "basics" / "clock.sql", "create or replace function autotag.speed()",
           "create or replace function autotag.speed(p_more integer default 1)")  # fmt: skip
    assert any("run scripts/release" in told for told in release.differences())
    source = build(postgres.url(database=bare), schema.source(host=True))
    found = differing(source, catalog_of(postgres.url(database=database)))
    # The copy's version may be another one (see tree).
    assert [name for name in found if name != "functions: autotag.schema_version()"] == [
        "functions: autotag.speed()", "functions: autotag.speed(integer)",
    ]  # fmt: skip


def test_the_source_may_run_again_where_it_runs_already(postgres: LocalPostgres, database: str) -> None:
    """A release repeats functions, grants and seed. That changes nothing."""
    url = postgres.url(database=database)
    before = catalog_of(url)
    parts = [f"{s.text};" for s in schema.engine() if s.is_function]
    parts += [path.read_text() for path in schema.schema_files() if path.name in schema.REPEATED]
    assert differing(before, build(url, "\n".join(parts))) == []


# -- releases


def test_a_released_migration_never_changes(tree: Path) -> None:
    released = schema.releases()[-1]
    path = tree / "migrations" / released.file
    path.write_text(path.read_text() + " ")
    assert release.differences() == [f"supabase/migrations/{released.file} was released and has changed: restore it."]
    with pytest.raises(schema.ReleaseError, match="Restore"):
        release.write()
    with pytest.raises(schema.ReleaseError, match="Restore"):
        release.release("9.0.0")
    path.unlink()
    assert release.differences()[0].startswith(f"supabase/migrations/{released.file} ")


def test_a_tag_has_what_was_released(tree: Path) -> None:
    """Released files that differ from their tag are reported, even if somebody has edited the migration and its
    hash."""
    released = schema.releases()[-1]
    git(tree.parent, "init", "-q")
    git(tree.parent, "add", "-A")
    git(tree.parent, "commit", "-qm", "release")
    assert release.differences() == [], "nothing is tagged"
    git(tree.parent, "tag", f"v{released.version}")
    assert release.differences() == []
    path = tree / "migrations" / released.file
    path.write_text(path.read_text() + " ")
    record = tree / "releases" / f"{released.version}.json"
    record.write_text(record.read_text().replace(released.sha256, schema.sha256(path.read_text())))
    schema.releases.cache_clear()
    names = [f"supabase/releases/{released.version}.json", f"supabase/migrations/{released.file}"]
    assert release.differences() == [f"{name} is not what its tag has: restore it." for name in names]
    with pytest.raises(schema.ReleaseError, match=f"have changed: {', '.join(names)}"), next_release(tree):
        pass
    record.unlink()  # as if nothing had ever been released
    schema.releases.cache_clear()
    assert release.differences()[:2] == [f"{name} is not what its tag has: restore it." for name in names]


def test_on_github_a_release_without_tags_is_an_error(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shallow clone has none, and would hide an edited migration."""
    git(tree.parent, "init", "-q")
    assert release.differences() == []
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    with pytest.raises(schema.ReleaseError, match="git finds no tags"):
        release.differences()


def test_before_the_first_release_all_of_the_schema_is_one_migration(tree: Path) -> None:
    """There is no installation to upgrade, so no table needs a step in changes.sql."""
    shutil.rmtree(tree / "releases")
    schema.releases.cache_clear()
    [path] = tree.glob("migrations/*_autotag_8_0_0.sql")
    change(
        tree / "schemas" / "tables" / "errors.sql",
        "  meaning text not null,",
        "  meaning text not null,\n  more integer,",
    )
    assert release.differences() == [f"supabase/migrations/{path.name} is out of date: run scripts/release."]
    assert release.write() == [path]
    assert release.differences() == []
    with pytest.raises(schema.ReleaseError, match="earlier than the version of the source"):
        release.release("7.9.9")
    assert release.release("8.0.0") == path
    assert [each.version for each in schema.releases()] == ["8.0.0"]
    with pytest.raises(schema.ReleaseError, match="later"):
        release.release("8.0.0")


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("0.0.1", "later"),
        ("1.0", "not a version"),
        ("0.1.0", "later"),
        ("1.0.0rc1", "not a version"),
        ("09.0.0", "not a version"),
        ("٩.٠.٠", "not a version"),
        ("9.0.0", "Nothing has changed"),
    ],
)
def test_a_release_that_is_refused_changes_nothing(tree: Path, version: str, said: str) -> None:
    before = files_of(tree)
    with pytest.raises(schema.ReleaseError, match=said):
        release.release(version)
    assert files_of(tree) == before


def test_only_what_is_committed_is_released(tree: Path) -> None:
    git(tree.parent, "init", "-q")
    git(tree.parent, "add", "-A")
    git(tree.parent, "commit", "-qm", "all")
    path = tree / "schemas" / "views" / "eta.sql"
    path.write_text(path.read_text() + "-- a comment alone\n")
    with pytest.raises(schema.ReleaseError, match=r"Commit your changes first.*: supabase/schemas/views/eta\.sql\."):
        release.release("9.0.0")


@pytest.mark.parametrize(
    ("file", "added", "said"),
    [
        (
            "schemas/views/eta.sql",
            b"create tabel x (a int);",
            r"^supabase/schemas/views/eta\.sql, line \d+: syntax error at .*tabel",
        ),
        (
            "schemas/changes.sql",
            b"alter tabel x;",
            r"^supabase/schemas/changes\.sql, line \d+: syntax error at .*tabel",
        ),
        ("schemas/host/baseline.sql", b"-- more", r"host/baseline\.sql was released and has changed"),
        ("schemas/views/eta.sql", b"do $$ begin", "unterminated dollar-quoted string"),
        ("schemas/views/eta.sql", b"-- \xff", "a file cannot be read or written: .*utf-8"),
        ("config.toml", b"x = [", "a file cannot be read or written: "),
        ("releases/9.0.0.json", b"", r"^supabase/releases/9\.0\.0\.json is not a record"),
        ("releases/9.0.0.json", b"null", "is not a record"),
        ("releases/9.0.0.json", b'{"version": "9.0.0"}', "is not a record"),
        ("releases/9.0.0.json", b"<<<<<<< HEAD", "is not a record"),
    ],
)
@pytest.mark.parametrize("arguments", [[], ["--check"], ["9.9.9"]], ids=["write", "check", "release"])
def test_a_damaged_file_is_one_sentence_and_nothing_is_written(
    tree: Path, file: str, added: bytes, said: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "schemas" / "changes.sql").write_text("update autotag.settings set lease = lease where id;\n")
    path = tree / file
    path.write_bytes((path.read_bytes() if path.exists() else b"") + added)
    schema.releases.cache_clear()
    before = files_of(tree)
    assert release.main(arguments) == 1
    assert files_of(tree) == before
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert re.search(said, captured.err.removeprefix("release: "))


def test_a_file_that_the_config_does_not_name_is_found_before_its_objects_are_dropped(tree: Path) -> None:
    added = tree / "schemas" / "tables" / "added.sql"
    added.write_text("create table autotag.added (id integer);\n")
    with pytest.raises(schema.ReleaseError, match=r"schemas/tables/added\.sql: name each file"):
        release.write()
    added.unlink()
    change(tree / "config.toml", '  "./schemas/views/metrics.sql",\n', "")
    with pytest.raises(schema.ReleaseError, match=r"schemas/views/metrics\.sql: name each file"):
        release.differences()


def test_an_object_is_defined_once(tree: Path) -> None:
    cron, status = tree / "schemas" / "cron.sql", tree / "schemas" / "views" / "status.sql"
    status.write_text(status.read_text() + cron.read_text())
    with pytest.raises(schema.ReleaseError, match=r"Defined more than once: .*autotag\.tick"):
        release.write()


def test_a_step_alone_is_a_migration(tree: Path) -> None:
    """A step that repairs data, and changes no object, is a migration, too."""
    (tree / "schemas" / "changes.sql").write_text("update autotag.settings set lease = lease where id;\n")
    [path] = release.write()
    assert "set lease = lease" in path.read_text()
    assert release.release("9.0.0")
    assert release.differences() == []


@pytest.mark.parametrize(
    "step",
    [
        "-- more_jobs",
        "/* more_jobs */",
        "select 'more_jobs'",
        "alter table autotag.jobs add more integer; -- more_jobs",
    ],
)
def test_only_a_statement_that_names_the_object_is_its_step(tree: Path, step: str) -> None:
    path = tree / "schemas" / "tables" / "jobs.sql"
    path.write_text(path.read_text() + "create index more_jobs on autotag.jobs (id);\n")
    for text in (step, "do $$ begin create index if not exists more_jobs on autotag.jobs (id); end $$"):
        (tree / "schemas" / "changes.sql").write_text(text)
        with (
            nullcontext()
            if text.startswith("do")
            else pytest.raises(schema.ReleaseError, match="create index more_jobs")
        ):
            assert release.write()


def test_a_function_that_a_policy_uses_is_dropped_by_a_step(tree: Path) -> None:
    """Postgres refuses to drop it, and the migration would stop."""
    broadcast = tree / "schemas" / "results" / "broadcast.sql"
    broadcast.write_text(
        re.sub(
            r"may_listen\(p_topic text\).*?\$\$;",
            lambda found: found[0].replace("p_topic", "p_name"),
            broadcast.read_text(),
            flags=re.S,
        )
    )
    with pytest.raises(schema.ReleaseError, match=r"autotag\.may_listen\(text\) cannot be replaced"):
        release.write()


def test_a_changed_table_needs_a_step(tree: Path) -> None:
    change(
        tree / "schemas" / "tables" / "errors.sql",
        "  meaning text not null,",
        "  meaning text not null,\n  more integer,",
    )
    with pytest.raises(schema.ReleaseError, match=r"(?s)changes\.sql.*errors\.sql: create table autotag\.error_kinds"):
        release.write()


STEPS = "alter table autotag.error_kinds add column if not exists more integer;  -- jobs\n"


@pytest.mark.parametrize(
    ("file", "old", "new", "missing"),
    [
        ("tables/jobs.sql", r"(?m)^create index jobs_\w+ [^;]*;", "", "removed from tables/jobs.sql: create index jobs_"),
        ("tables/jobs.sql", r"create table autotag.jobs \(", "create table autotag.jobs (more integer,",
         "tables/jobs.sql: create table autotag.jobs"),
        ("host/baseline.sql", r"create table public.assets \(", "create table public.assets (more integer,", "baseline"),
    ],
)  # fmt: skip
def test_each_changed_object_needs_a_step_of_its_own(tree: Path, file: str, old: str, new: str, missing: str) -> None:
    (tree / "schemas" / "changes.sql").write_text(STEPS)
    change(
        tree / "schemas" / "tables" / "errors.sql",
        "  meaning text not null,",
        "  meaning text not null,\n  more integer,",
    )
    release.write()
    path = tree / "schemas" / file
    text, changes = re.subn(old, new, path.read_text(), count=1)
    assert changes
    path.write_text(text)
    with pytest.raises(schema.ReleaseError, match=missing):
        release.write()


def test_a_function_whose_parameter_has_another_name_is_dropped_first(tree: Path) -> None:
    """Postgres refuses to replace it."""
    change(tree / "schemas" / "basics" / "clock.sql", "function autotag.real_epoch(p_time timestamptz)",
           "function autotag.real_epoch(p_when timestamptz)")  # fmt: skip
    release.write()
    [path] = tree.glob("migrations/*unreleased*")
    assert "drop function if exists autotag.real_epoch(timestamptz);" in path.read_text()


def test_only_what_has_changed_is_in_a_migration(tree: Path) -> None:
    change(
        tree / "schemas" / "scheduling" / "release.sql",
        "Called by release_in_turn(), which holds the locks.",
        "release_in_turn() calls it, which holds the locks.",
    )
    release.write()
    assert list(tree.glob("migrations/*unreleased*")) == [], "a comment beside a function is no change of the schema"
    change(
        tree / "schemas" / "uploads" / "retry.sql",
        "This upload has no failed image that can be tagged now.",
        "None.",
    )
    release.write()
    [path] = tree.glob("migrations/*unreleased*")
    assert path.read_text().count("create or replace function") == 2, "the function, and the version"
    assert release.differences() == []
    change(
        tree / "schemas" / "uploads" / "retry.sql",
        "None.",
        "This upload has no failed image that can be tagged now.",
    )
    release.write()
    assert not path.exists(), "and nothing, when it is as before"


STEPS_OF_NEXT = """\
alter table autotag.settings add column if not exists new_one integer not null default 7;
drop policy if exists "autotag: members listen to their workspaces" on realtime.messages;
drop function if exists autotag.may_listen(text) -- without a semicolon
"""


@contextmanager
def next_release(tree: Path, version: str = "9.0.0") -> Iterator[str]:
    """The tree of a later version.

    It has a new column, a function that returns another type, a new function, a new trigger with its function, a trigger that calls
    another function, and a function with a renamed parameter that a policy uses.
    """
    change(tree / "schemas" / "tables" / "settings.sql", "create table autotag.settings (",
           "create table autotag.settings (\n  new_one integer not null default 7,")  # fmt: skip
    change(tree / "schemas" / "basics" / "clock.sql", "create or replace function autotag.real_epoch(p_time timestamptz) returns double precision",
           "create or replace function autotag.real_epoch(p_time timestamptz) returns numeric")  # fmt: skip
    path = tree / "schemas" / "basics" / "checks.sql"
    path.write_text(
        path.read_text()
        + """
-- New.
create or replace function autotag.is_new(p_number integer) returns boolean
language sql immutable set search_path = pg_catalog, pg_temp
as $$ select p_number > (select s.new_one from autotag.settings s) $$;

create or replace function autotag.keep_jobs() returns trigger
language plpgsql set search_path = pg_catalog, pg_temp
as $$ begin return new; end $$;
create or replace trigger autotag_keep_jobs before insert on autotag.jobs for each row execute function autotag.keep_jobs();
"""
    )
    words = tree / "schemas" / "vocabulary" / "words.sql"
    words.write_text(words.read_text().replace("autotag.clean_vocabulary", "autotag.tidy_vocabulary"))
    broadcast = tree / "schemas" / "results" / "broadcast.sql"
    broadcast.write_text(
        re.sub(
            r"may_listen\(p_topic text\).*?\$\$;",
            lambda found: found[0].replace("p_topic", "p_name"),
            broadcast.read_text(),
            flags=re.S,
        )
    )
    (tree / "schemas" / "changes.sql").write_text(STEPS_OF_NEXT)
    yield release.release(version).read_text()


def test_a_release_brings_an_installation_to_what_the_source_says(
    postgres: LocalPostgres, bare: str, database: str, tree: Path
) -> None:
    with next_release(tree) as script:
        assert "drop function if exists autotag.real_epoch(timestamptz);" in script
        upgraded = build(postgres.url(database=database), script)
        source = build(postgres.url(database=bare), schema.source(host=True))
    assert differing(upgraded, source) == []
    assert release.differences() == []
    assert (tree / "schemas" / "changes.sql").read_text() == schema.NO_CHANGES, "the steps are used up"
    assert '__version__ = "9.0.0"' in (tree.parent / "worker" / "autotag" / "__init__.py").read_text()


def test_npm_finds_the_released_client_in_its_workspace(tree: Path) -> None:
    """If the lock or a dependency had another version, `npm install` would ask the registry for the client."""
    with next_release(tree, "9.1.0"):
        root = tree.parent
    locked = json.loads((root / "package-lock.json").read_text())["packages"]
    ranges = []
    for name in NPM_PACKAGES:
        package = json.loads((root / name).read_text())
        entry = locked[str(Path(name).parent)]
        assert entry.get("version") == package.get("version")
        for kind in ("dependencies", "devDependencies"):
            assert entry.get(kind) == package.get(kind)
            ranges += [
                wanted for dependency, wanted in package.get(kind, {}).items() if dependency == "supabase-autotag"
            ]
    assert json.loads((root / "clients/js/package.json").read_text())["version"] == "9.1.0"
    assert ranges == ["^9.1.0"] * 2
    assert "npm/supabase-autotag@9.1.0/dist/index.js" in (root / "examples" / "plain" / "app.js").read_text()


async def test_an_upgrade_from_the_last_release_with_work_in_flight(
    library: Library, postgres: LocalPostgres, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A database under load is upgraded: the old worker finishes its work and stops, and the new one does the rest."""
    stack = library.stack
    last = schema.releases()[-1]
    stack.configure(chunk_delay="0.5 s", realtime_requests_per_minute=1000, realtime_tokens_per_minute=10**8)
    stack.simulator.plan.latency = (0.2, 0.4)
    jobs = [library.enqueue(await library.upload(30)), library.enqueue(await library.upload(60, seed=2))]
    old = asyncio.create_task(Worker(worker_settings(stack), Wake()).run())
    await until(lambda: library.job(jobs[0]["job_id"])["completed"] >= 5, "the first tags")
    with next_release(tree) as script, psycopg.connect(stack.database_url()) as owner:
        owner.execute(script.encode())
    with pytest.raises(VersionsDiffer, match=r"of autotag 9\.0\.0"):
        async with asyncio.timeout(PATIENCE):
            await old
    monkeypatch.setattr(autotag, "__version__", "9.0.0")
    async with worker(stack):
        await library.finished(*jobs)
    library.check_tags()
    audit(stack)
    assert len(answered_pictures(stack)) == len(set(answered_pictures(stack))) == 90, "nothing was asked twice"
    assert last.version != "9.0.0"
