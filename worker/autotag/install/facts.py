"""What a project's database says about its tables."""

from __future__ import annotations

from dataclasses import dataclass, field

import psycopg
from psycopg import Connection


@dataclass(frozen=True)
class Table:
    """One table: its columns with their types as Postgres prints them, its key, its policies' expressions."""

    name: str
    columns: dict[str, str]
    primary_key: list[str] = field(default_factory=list)
    policies: list[str] = field(default_factory=list)

    def texts(self) -> list[str]:
        """The columns that hold text."""
        return [name for name, kind in self.columns.items() if kind in ("text", "character varying")]


@dataclass(frozen=True)
class StoragePolicy:
    """What a policy of ``storage.objects`` says for signed-in users; ``reads``: it lets them see files."""

    text: str
    reads: bool


@dataclass(frozen=True)
class Facts:
    """A project's own tables by qualified name, its Storage, and which of autotag's migrations it has."""

    tables: dict[str, Table]
    buckets: list[str]
    #: name of a migration (without ``autotag_``) -> the version under which it was applied
    applied: dict[str, str] = field(default_factory=dict)
    storage_policies: list[StoragePolicy] = field(default_factory=list)
    #: whether signed-in users may select from storage.objects at all
    users_read_objects: bool = False
    #: functions (uuid, text, text) -> boolean of the project: they could say whose a file is
    file_functions: list[str] = field(default_factory=list)
    #: the rule that an adapter which is there has
    file_rule: str | None = None
    adapter: int | None = None  #: and its version


def look(url: str) -> Facts:
    """Reads the schema of a project.

    Args:
        url: connection URL of the database's owner.

    Raises:
        psycopg.OperationalError: the database cannot be reached.
    """
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        tables = {
            name: Table(name, dict(columns), key or [], policies or [])
            for name, columns, key, policies in connection.execute("""
                select n.nspname || '.' || c.relname,
                  (select array_agg(array[a.attname, format_type(a.atttypid, null)] order by a.attnum)
                   from pg_attribute a where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped),
                  (select array_agg(a.attname::text order by a.attnum) from pg_index i
                   join pg_attribute a on a.attrelid = c.oid and a.attnum = any (i.indkey)
                   where i.indrelid = c.oid and i.indisprimary),
                  (select array_agg(coalesce(p.qual, p.with_check)) from pg_policies p
                   where p.schemaname = n.nspname and p.tablename = c.relname and p.permissive = 'PERMISSIVE')
                from pg_class c join pg_namespace n on n.oid = c.relnamespace
                where c.relkind in ('r', 'p') and n.nspname not in ('autotag', 'auth', 'storage', 'realtime',
                  'extensions', 'supabase_migrations', 'vault', 'cron', 'net', 'graphql', 'graphql_public', 'pgsodium',
                  'information_schema', 'supabase_functions', '_realtime', '_analytics') and n.nspname not like 'pg\\_%'
                  and c.relname <> 'workspace_rate_limits'""")
            if columns
        }
        buckets = _column(connection, "storage.buckets", "select id from storage.buckets order by id")
        policies = [
            StoragePolicy(text, reads)
            for text, reads in connection.execute("""
                select concat_ws(' ', qual, with_check), cmd in ('SELECT', 'ALL') from pg_policies
                where schemaname = 'storage' and tablename = 'objects' and permissive = 'PERMISSIVE'
                  and roles && '{public,authenticated}'""")
        ]
        readable = _column(
            connection, "storage.objects",
            "select 1 from pg_roles where rolname = 'authenticated' and has_schema_privilege(oid, 'storage', 'usage')"
            " and has_table_privilege(oid, 'storage.objects', 'select')",
        )  # fmt: skip
        functions = connection.execute("""
            select pronamespace::regnamespace::text || '.' || proname from pg_proc
            where proargtypes = array['uuid'::regtype, 'text'::regtype, 'text'::regtype]::oidvector
              and prorettype = 'boolean'::regtype and prokind = 'f'""")
        rule = connection.execute("select to_regprocedure('autotag.file_rule()') is not null").fetchone()
        stands = rule and rule[0] and connection.execute("select autotag.file_rule()").fetchone()
        return Facts(
            tables, buckets, applied_migrations(connection), policies, bool(readable),
            [str(row[0]) for row in functions], stands[0] if stands else None, adapter_version(connection),
        )  # fmt: skip


def _column(connection: Connection[tuple[str, ...]], table: str, statement: str) -> list[str]:
    """The first column of a table that may not be there."""
    row = connection.execute("select to_regclass(%s)", (table,)).fetchone()
    return [r[0] for r in connection.execute(statement)] if row and row[0] else []


def applied_migrations(connection: Connection[tuple[str, ...]]) -> dict[str, str]:
    """Which of autotag's migrations a database has, and under which version; whoever applied them."""
    recorded = _column(
        connection, "supabase_migrations.schema_migrations",
        "select version || '_' || coalesce(name, '') from supabase_migrations.schema_migrations order by version",
    )  # fmt: skip
    found = {}
    for entry in recorded:
        version, _, name = entry.partition("_")
        if name.startswith("autotag_"):
            found[name.removeprefix("autotag_")] = version
    return found


def adapter_version(connection: Connection[tuple[str, ...]]) -> int | None:
    """The version of the adapter in a database; None: there is none."""
    row = connection.execute("select to_regprocedure('autotag.adapter_version()') is not null").fetchone()
    found = connection.execute("select autotag.adapter_version()").fetchone() if row and row[0] else None
    return int(found[0]) if found else None
