"""autotag's migrations: into a project's folder for the Supabase CLI, or into a database without it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from autotag.install.facts import adapter_version, applied_migrations
from autotag.install.host import Host, HostError, render

HOST_BASELINE = "host_baseline"
HOST_ADAPTER = "host_adapter"
SPENDING_LIMIT = "spending_limit"
TEMPLATE = Path(__file__).parent / "host_adapter.sql"
#: What newer adapters have that older ones lack: version -> the template of what to add. A project's adapter is the
#: project's, so it is never written again.
ADAPTER_STEPS: dict[int, str] = {}
_PACKAGED = Path(__file__).parent.parent / "migrations"
#: In the installed package, or in a checkout.
MIGRATIONS = _PACKAGED if _PACKAGED.is_dir() else Path(__file__).parents[3] / "supabase" / "migrations"
LOCK_TRIES = 10  # the adapter gives up a lock on the host's table after a second instead of holding others up
SPENDING_LIMIT_SQL = """\
-- What a workspace may spend in a month, in dollars. To change it, or to give one workspace another limit:
--   update autotag.quotas set max_cost = 50 where scope = 'workspace' and period = 'month' and workspace_id is null;
--   insert into autotag.quotas (workspace_id, scope, period, max_cost) values ('…', 'workspace', 'month', 100);
insert into autotag.quotas (scope, period, max_cost)
values ('workspace', 'month', DOLLARS) on conflict do nothing;
"""
_FILE = re.compile(r"(?P<version>\d{14})_(?P<name>\w+)\.sql")
_VERSION = "%Y%m%d%H%M%S"
_ADAPTER_VERSION = re.compile(r"autotag\.adapter_version\(\).*?select (\d+)", re.DOTALL)


@dataclass(frozen=True)
class Migration:
    """One step; ``version`` is its place in the order, ``sql`` with ``{{ names }}`` of the host."""

    version: str
    name: str
    sql: str

    def text(self, host: Host) -> str:
        """Its SQL for a host."""
        return render(self.sql, host) if self.name.startswith(HOST_ADAPTER) else self.sql


def migrations(*, with_host_baseline: bool = False) -> list[Migration]:
    """All of them in the order to apply them; the host's own tables only for a stand-alone stack."""
    found = []
    for path in sorted(MIGRATIONS.glob("*.sql")):
        match = _FILE.fullmatch(path.name)
        if match is None:
            continue
        name = match["name"].removeprefix("autotag_")
        if name == HOST_ADAPTER:
            found.append(Migration(match["version"], name, TEMPLATE.read_text()))
        elif with_host_baseline or name != HOST_BASELINE:
            found.append(Migration(match["version"], name, path.read_text()))
    return found


def _planned(adapter: int | None, extra: Sequence[Migration], *, with_host_baseline: bool = False) -> list[Migration]:
    """All migrations for a project whose adapter has this version (None: it has none yet, and the template has it all).

    What the adapter lacks comes before the engine's migrations, which may need it.
    """
    planned = migrations(with_host_baseline=with_host_baseline)
    behind = next((i for i, m in enumerate(planned) if m.name == HOST_ADAPTER), -1) + 1
    steps = [
        Migration(f"202611280001{version:02}", f"{HOST_ADAPTER}_{version}", sql)
        for version, sql in sorted(ADAPTER_STEPS.items())
        if adapter is not None and version > adapter
    ]
    return [*planned[:behind], *steps, *planned[behind:], *extra]


def spending_limit(dollars: float) -> Migration:
    """The migration that limits what every workspace may spend in a month; the newest of all."""
    return Migration("20261128999999", SPENDING_LIMIT, SPENDING_LIMIT_SQL.replace("DOLLARS", f"{dollars:.2f}"))


def apply_migrations(
    url: str, *, host: Host | None = None, with_host_baseline: bool = False, extra: Sequence[Migration] = ()
) -> list[str]:
    """Applies what is missing, each file in a transaction of its own, and records it as the Supabase CLI does.

    Args:
        url: connection URL of the database's owner.
        host: the project's tables (default: those of the stand-alone stack).
        with_host_baseline: also create the host's own tables.
        extra: further ones, behind them.

    Returns:
        The names of the migrations that were applied now.

    Raises:
        psycopg.Error: a migration did not apply; those before it stay, nothing of it does.
    """
    applied: list[str] = []
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute(
            "create schema if not exists supabase_migrations;"
            "create table if not exists supabase_migrations.schema_migrations"
            " (version text primary key, statements text[], name text)"
        )
        known, adapter = applied_migrations(connection), adapter_version(connection)
        for migration in _planned(adapter, extra, with_host_baseline=with_host_baseline):
            if migration.name not in known:
                _apply(connection, migration, host or Host())
                applied.append(migration.name)
    return applied


@retry(
    retry=retry_if_exception_type(psycopg.errors.LockNotAvailable),
    stop=stop_after_attempt(LOCK_TRIES), wait=wait_random_exponential(0.5, max=5), reraise=True,
)  # fmt: skip
def _apply(connection: psycopg.Connection[tuple[str, ...]], migration: Migration, host: Host) -> None:
    with connection.transaction():
        connection.execute(migration.text(host).encode())
        connection.execute(
            "insert into supabase_migrations.schema_migrations (version, name) values (%s, %s)",
            (migration.version, f"autotag_{migration.name}"),
        )


def project_folder(start: Path) -> Path:
    """The folder of migrations of the Supabase project at or above a folder.

    Raises:
        HostError: there is no project.
    """
    for folder in (start.resolve(), *start.resolve().parents):
        if (folder / "supabase" / "config.toml").exists():
            return folder / "supabase" / "migrations"
    raise HostError(
        f"There is no Supabase project in {start} (no supabase/config.toml); run supabase init there first."
    )


def write_migrations(
    folder: Path, host: Host, applied: dict[str, str], *, adapter: int | None = None, now: datetime | None = None,
    extra: Sequence[Migration] = (),
) -> dict[str, str]:  # fmt: skip
    """Copies what is missing into a project's folder, with fresh versions behind the project's own.

    A file that is there stays as it is: it may have been applied, and the adapter may have been edited.

    Args:
        folder: the project's ``supabase/migrations``.
        host: the project's tables.
        applied: what the database has already, name -> version; those keep their version, so that the Supabase
            CLI recognises them.
        adapter: the version of the adapter in the database; None: there is none.
        now: the moment that fresh versions start from.
        extra: further ones, behind autotag's own.

    Returns:
        File name -> ``written``, ``there`` or ``differs`` (there, but not as this version of autotag has it).
    """
    folder.mkdir(parents=True, exist_ok=True)
    present = {}
    newest = (now or datetime.now(UTC)).replace(tzinfo=None)
    for path in sorted(folder.glob("*.sql")):
        match = _FILE.fullmatch(path.name)
        if match and match["name"].startswith("autotag_"):
            present[match["name"].removeprefix("autotag_")] = path
        if match:
            newest = max(newest, _moment(match["version"]) + timedelta(seconds=1))
    result = {}
    if there := present.get(HOST_ADAPTER):
        match = _ADAPTER_VERSION.search(there.read_text())
        adapter = int(match[1]) if match else 0
    for number, migration in enumerate(_planned(adapter, extra)):
        text = migration.text(host)
        if there := present.get(migration.name):
            result[there.name] = "there" if there.read_text() == text else "differs"
            continue
        version = applied.get(migration.name) or (newest + timedelta(seconds=number)).strftime(_VERSION)
        path = folder / f"{version}_autotag_{migration.name}.sql"
        path.write_text(text)
        result[path.name] = "written"
    return result


def _moment(version: str) -> datetime:
    """The moment a version stands for; hand-made ones are not always a date."""
    try:
        return datetime.strptime(version, _VERSION)
    except ValueError:
        return datetime.min
