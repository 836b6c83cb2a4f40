"""Writes autotag's migrations into a project's folder for the Supabase CLI, or applies them without it."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import MAXYEAR, UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from autotag.install.adapter import TEMPLATE, render
from autotag.install.answers import HostError
from autotag.install.collisions import check_columns, check_names, check_schema
from autotag.install.facts import EVERY_WORKSPACE, adapter_version, applied_migrations, check_supabase
from autotag.install.host import Host
from autotag.install.quoting import quote, table_name
from autotag.install.written import (
    HOST_ADAPTER,
    HOST_BASELINE,
    MIGRATION_FILE,
    Written,
    check_versions,
    recorded_answers,
    written_migrations,
)
from autotag.texts import name_some

SPENDING_LIMIT = "spending_limit"
#: Version of the adapter -> the template for the changes of that version. An existing adapter belongs to its project
#: and is never written again, so each newer version is a separate migration.
ADAPTER_STEPS: dict[int, str] = {}
_PACKAGED = Path(__file__).parent.parent / "migrations"
#: In the installed package, or in a checkout.
MIGRATIONS = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "supabase" / "migrations"
MAX_LOCK_TRIES = 10  # each try waits one second for a lock, so that no session of the project queues behind it for long
#: The lock that `autotag migrate` holds while it looks up and applies migrations, so that a second one waits. It
#: belongs to a transaction, because a pooler may give the session to other clients afterwards.
ONE_AT_A_TIME = "select pg_advisory_xact_lock(hashtextextended('autotag migrate', 0))"
SPENDING_LIMIT_SQL = """\
-- What a workspace may spend in a month, in dollars. To change it, or to give one workspace another limit:
--   update autotag.quotas set max_cost = 50 where scope = 'workspace' and period = 'month' and workspace_id is null;
--   insert into autotag.quotas (workspace_id, scope, period, max_cost) values ('…', 'workspace', 'month', 100);
insert into autotag.quotas (scope, period, max_cost)
values ('workspace', 'month', DOLLARS) on conflict do nothing;
"""
PROFILE_VERSIONS = "profile_versions"
PROFILE_VERSIONS_SQL = """\
-- Images have results of an earlier installation, which name the versions of its profiles. The new versions go on
-- behind them, so that autotag enqueue --outdated finds these images.
set local statement_timeout = '10min';
select setval('autotag.profile_versions', max(v.version)::integer)
from {table} a
cross join lateral (
  select case when jsonb_typeof(a.{result} -> 'profile') = 'number' then (a.{result} -> 'profile')::numeric end
) v (version)
where v.version between 1 and 1000000   -- users may be able to write results
having max(v.version) is not null;
"""
VERSION = "%Y%m%d%H%M%S"
#: The name of a migration file of the Supabase CLI. The files in autotag's package have simpler names.
PROJECT_FILE = re.compile(r"(\d{14})_.*\.sql")
_ADAPTER_VERSION = re.compile(r"autotag\.adapter_version\(\).*?select (\d+)", re.DOTALL)


@dataclass(frozen=True)
class Migration:
    """One migration.

    Attributes:
        version: 14 digits that define the order.
        name: without ``autotag_``.
        sql: for the adapter a template with the host's ``{{ names }}``.
    """

    version: str
    name: str
    sql: str

    def text(self, host: Host) -> str:
        """The SQL for a host."""
        return render(self.sql, host) if self.name.startswith(HOST_ADAPTER) else self.sql


def migrations(*, with_host_baseline: bool = False) -> list[Migration]:
    """All migrations in order; ``with_host_baseline`` includes the host's own tables, for a stand-alone stack."""
    found = []
    for path in sorted(MIGRATIONS.glob("*.sql")):
        match = MIGRATION_FILE.fullmatch(path.name)
        if match is None:
            continue
        name = match["name"].removeprefix("autotag_")
        if name == HOST_ADAPTER:
            found.append(Migration(match["version"], name, TEMPLATE.read_text("utf-8")))
        elif with_host_baseline or name != HOST_BASELINE:
            found.append(Migration(match["version"], name, path.read_text("utf-8")))
    return found


def _planned(adapter: int | None, extra: Sequence[Migration], *, with_host_baseline: bool = False) -> list[Migration]:
    """All migrations for a project, in order.

    Args:
        adapter: the version of the project's adapter; None: it has no adapter yet, and gets the newest.
        extra: further migrations, applied last.
        with_host_baseline: include the host's own tables.
    """
    planned = migrations(with_host_baseline=with_host_baseline)
    behind = next((i for i, m in enumerate(planned) if m.name == HOST_ADAPTER), -1) + 1
    # The engine's migrations may need new parts of the adapter, so the adapter's steps come before them.
    steps = [
        Migration(f"202611280001{version:02}", f"{HOST_ADAPTER}_{version}", sql)
        for version, sql in sorted(ADAPTER_STEPS.items())
        if adapter is not None and version > adapter
    ]
    return [*planned[:behind], *steps, *planned[behind:], *extra]


def spending_limit(dollars: float) -> Migration:
    """The migration that limits what each workspace may spend in a month. It is applied last."""
    return Migration("20261128999999", SPENDING_LIMIT, SPENDING_LIMIT_SQL.replace("DOLLARS", f"{dollars:.2f}"))


def how_to_limit(dollars: float, limits: Sequence[float | None]) -> str:
    """Advice if the database has or had another spending limit: the limit is data, so a migration must not change
    it."""
    cost = f"{dollars:.2f}" if dollars else "null"
    change = (
        f"update autotag.quotas set max_cost = {cost} where {EVERY_WORKSPACE};"  # noqa: S608 - for people
        if limits
        else f"insert into autotag.quotas (scope, period, max_cost) values ('workspace', 'month', {cost});"  # noqa: S608
    )
    has = f"a spending limit of {limits[0]:g} dollars" if limits and limits[0] is not None else "no spending limit"
    return f"The database has {has} now, and init does not change it (--spending-limit); run: {change}"


def profile_versions(host: Host) -> Migration:
    """The migration that continues the version numbers of profiles if an earlier installation has left results."""
    text = PROFILE_VERSIONS_SQL.format(table=table_name(host.table), result=quote(host.result))
    return Migration("20261128999998", PROFILE_VERSIONS, text)


def apply_migrations(
    url: str, *, host: Host | None = None, with_host_baseline: bool = False, extra: Sequence[Migration] = ()
) -> list[str]:
    """Applies the missing migrations, each in its own transaction, and records them as the Supabase CLI does.

    Args:
        url: connection URL of the database's owner.
        host: the project's tables (default: those of the stand-alone stack).
        with_host_baseline: also create the host's own tables.
        extra: further migrations, applied last.

    Returns:
        The names of the migrations that this call applied.

    Raises:
        psycopg.errors.LockNotAvailable: another session kept the host's table locked for all tries.
        psycopg.Error: a migration failed and was rolled back. Earlier migrations stay applied.
    """
    with _one_at_a_time(url), psycopg.connect(url, autocommit=True) as connection:
        check_supabase(connection, stand_alone=with_host_baseline)
        planned = _planned(adapter_version(connection), extra, with_host_baseline=with_host_baseline)
        check_free(connection)
        return _apply_missing(connection, [replace(one, sql=one.text(host or Host())) for one in planned])


def apply_written(url: str, written: Mapping[str, Written]) -> list[str]:
    """Applies the files of a project that its database lacks, unchanged and in order, as `supabase db push` does.

    Args:
        url: connection URL of the database's owner.
        written: the files of autotag in the project's folder.

    Returns:
        The names of the migrations that this call applied.

    Raises:
        HostError: the folder lacks a migration, or the database has one under another version.
        psycopg.Error: as in `apply_migrations`.
    """
    with _one_at_a_time(url), psycopg.connect(url, autocommit=True) as connection:
        applied = applied_migrations(connection)
        check_versions(written, applied)
        adapter = _version_of(written[HOST_ADAPTER]) if HOST_ADAPTER in written else adapter_version(connection)
        missing = [one.name for one in _planned(adapter, ()) if one.name not in {*written, *applied}]
        if missing:
            raise HostError(
                f"The project's folder has files of autotag, but lacks {name_some(missing)}; run autotag init, which"
                " writes that, and then this again."
            )
        check_free(connection)
        if HOST_ADAPTER in written and HOST_ADAPTER not in applied:
            _check_image_table(connection, written[HOST_ADAPTER])
        done = _apply_missing(connection, [Migration(one.version, one.name, one.sql) for one in written.values()])
        if PROFILE_VERSIONS not in written:  # the files are from an earlier installation
            _continue_profile_versions(connection)
        return done


def _continue_profile_versions(connection: psycopg.Connection[Any]) -> None:
    """Continues the version numbers of profiles after those in the results of an earlier installation, if there is no
    new profile yet."""
    if connection.execute("select is_called from autotag.profile_versions").fetchone() == (True,):
        return
    with connection.transaction():
        for (table,) in connection.execute("select autotag.image_table()::text").fetchall():
            connection.execute(PROFILE_VERSIONS_SQL.format(table=table, result=quote(Host().result)).encode())


@contextmanager
def _one_at_a_time(url: str) -> Iterator[None]:
    """Waits for other `autotag migrate` commands, then makes others wait. A separate connection holds the lock."""
    with psycopg.connect(url) as guard:
        guard.execute("set local idle_in_transaction_session_timeout = 0")
        guard.execute(ONE_AT_A_TIME)
        yield


def check_free(connection: psycopg.Connection[Any]) -> None:
    """Refuses a database that is not Supabase's (`check_supabase`), and objects of the project that have the names of
    what the missing migrations create. The caller holds `ONE_AT_A_TIME`, because what another session is
    applying is not the project's.

    Raises:
        HostError: there are such objects.
    """
    check_supabase(connection)
    engine = [one for one in migrations() if one.name != HOST_ADAPTER]
    applied = applied_migrations(connection)
    if adapter_version(connection) is None:
        check_schema(connection)
    elif not any(one.name in applied for one in engine) and _has_engine(connection):
        return  # another tool has applied the files
    missing, present = ([one.sql for one in engine if (one.name in applied) is there] for there in (False, True))
    check_names(connection, missing, present)


def _has_engine(connection: psycopg.Connection[Any]) -> bool:
    """Whether the database has a release of autotag."""
    return connection.execute("select to_regprocedure('autotag.schema_version()') is not null").fetchone() == (True,)


def _check_image_table(connection: psycopg.Connection[Any], adapter: Written) -> None:
    """Refuses an unapplied adapter's table if the project has columns in it that autotag cannot use
    (`check_columns`)."""
    answers = recorded_answers(adapter.sql)
    table = answers["choices"].get("table") if answers else None
    if table and connection.execute("select to_regclass(%s)", (table_name(table),)).fetchone() != (None,):
        check_columns(connection, table)


def _apply_missing(connection: psycopg.Connection[tuple[str, ...]], planned: Sequence[Migration]) -> list[str]:
    """Applies the migrations that are not in the history, and returns their names."""
    connection.execute(
        "create schema if not exists supabase_migrations;"
        "create table if not exists supabase_migrations.schema_migrations"
        " (version text primary key, statements text[], name text)"
    )
    existing = applied_migrations(connection)
    missing = [migration for migration in planned if migration.name not in existing]
    try:
        for migration in missing:
            _apply(connection, migration)
        return [migration.name for migration in missing]
    except psycopg.errors.LockNotAvailable as error:
        error.add_note(_who_locks(connection))
        raise


@retry(
    retry=retry_if_exception_type(psycopg.errors.LockNotAvailable),
    stop=stop_after_attempt(MAX_LOCK_TRIES), wait=wait_random_exponential(0.5, max=5), reraise=True,
)  # fmt: skip
def _apply(connection: psycopg.Connection[tuple[str, ...]], migration: Migration) -> None:
    with connection.transaction():
        connection.execute(migration.sql.encode())
        connection.execute(
            "insert into supabase_migrations.schema_migrations (version, name) values (%s, %s)",
            (migration.version, f"autotag_{migration.name}"),
        )


def _who_locks(connection: psycopg.Connection[Any]) -> str:
    """The sessions that still lock the project's tables, as text for a person."""
    held = connection.execute("""
        select format('session %s%s locks %s', l.pid, ' (' || nullif(s.application_name, '') || ')',
          string_agg(distinct l.relation::regclass::text, ', '))
        from pg_locks l join pg_class c on c.oid = l.relation and c.relkind in ('r', 'p')
        left join pg_stat_activity s on s.pid = l.pid
        where l.granted and l.pid <> pg_backend_pid()
          and l.database = (select oid from pg_database where datname = current_database())
          and c.relnamespace::regnamespace::text not in ('pg_catalog', 'information_schema', 'pg_toast')
        group by l.pid, s.application_name, s.xact_start order by s.xact_start nulls last limit 3""").fetchall()
    return name_some([text for (text,) in held]) or "another session locked a table"


def project_folder(start: Path) -> Path:
    """The migrations folder of the Supabase project that contains ``start``.

    Raises:
        HostError: neither ``start`` nor a folder above it is a project.
    """
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / "supabase" / "config.toml").exists():
            return folder / "supabase" / "migrations"
    raise HostError(
        f"There is no Supabase project in {start.resolve()} (no supabase/config.toml); run supabase init there first."
    )


def write_migrations(
    folder: Path, host: Host, applied: dict[str, str], *, adapter: int | None = None, now: datetime | None = None,
    extra: Sequence[Migration] = (),
) -> dict[str, str]:  # fmt: skip
    """Writes the missing migrations into a project's folder, with versions later than the project's own.

    Never overwrites a file, because it may have been applied, and the adapter may have been edited.

    Args:
        folder: the project's ``supabase/migrations``.
        host: the project's tables.
        applied: the migrations in the database, name -> version. Their files get the same versions, so that the
            Supabase CLI recognises them.
        adapter: the version of the adapter in the database; None: there is none.
        now: the time that new versions start from.
        extra: further migrations, written last.

    Returns:
        File name -> ``written``, ``there`` or ``differs`` (it exists, but this version of autotag would write another).

    Raises:
        OSError: a file cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    present = written_migrations(folder)
    check_versions(present, applied)
    versions = {match[1] for path in folder.glob("*.sql") if (match := PROJECT_FILE.fullmatch(path.name))}
    newest = _behind(versions, now or datetime.now(UTC))
    result = {}
    if there := present.get(HOST_ADAPTER):
        adapter = _version_of(there)
    planned = _planned(adapter, extra)
    for number, migration in enumerate(planned):
        text = migration.text(host)
        if there := present.get(migration.name):
            result[there.path.name] = "there" if there.sql == text else "differs"
            continue
        behind = [present[one.name].version for one in planned[number:] if one.name in {*present} - {*applied}]
        version = applied.get(migration.name) or _free(newest + timedelta(seconds=number), behind, versions)
        versions.add(version)
        path = folder / f"{version}_autotag_{migration.name}.sql"
        path.write_text(text, "utf-8")
        result[path.name] = "written"
    return result


def _behind(versions: Collection[str], now: datetime) -> datetime:
    """A time for new versions: now, or a time after the project's own versions.

    Raises:
        HostError: there is no later version.
    """
    newest = max(map(version_time, versions), default=datetime.min)
    if newest.year == MAXYEAR:
        raise HostError(
            f"The project's last migration has the version {newest.strftime(VERSION)}, which leaves none behind it;"
            " rename that file (and its version in the history, if it is applied), then run this again."
        )
    return max(now.replace(tzinfo=None), newest + timedelta(seconds=1))


def _free(time: datetime, behind: Sequence[str], taken: Collection[str]) -> str:
    """A free version for a new file: at this time, or just before ``behind``, the versions of files that need the new
    one."""
    first = min(map(version_time, behind), default=datetime.min)
    if first != datetime.min:
        time = min(time, first - timedelta(seconds=1))
        while time.strftime(VERSION) in taken:
            time -= timedelta(seconds=1)
    return time.strftime(VERSION)


def _version_of(adapter: Written) -> int:
    """The version of the adapter in a project's file."""
    match = _ADAPTER_VERSION.search(adapter.sql)
    return int(match[1]) if match else 0


def version_time(version: str) -> datetime:
    """The time in a version; the earliest time if the version is not a date, as in some hand-made files."""
    try:
        return datetime.strptime(version, VERSION)
    except ValueError:
        return datetime.min
