"""Reads a project's tables, policies and installed migrations from its database."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import psycopg
from psycopg import Connection

from autotag.install.answers import HostError
from autotag.install.details import (
    NOT_THE_PROJECTS,
    Gin,
    Policy,
    read_caller_functions,
    read_details,
    read_indexes,
    read_member_functions,
    read_policies,
)

#: The names of all files that autotag writes: a project may have migrations of its own whose names begin with autotag.
_OWN_NAME = re.compile(
    r"autotag_(host_baseline|host_adapter(_\d+)?|adapter_change_\d+|\d+_\d+_\d+|unreleased|spending_limit|profile_versions)"
)
EVERY_WORKSPACE = "scope = 'workspace' and period = 'month' and workspace_id is null"  # the quota with the limit


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        name: qualified with the schema.
        columns: name -> type, as Postgres prints it.
        primary_key: its columns.
        rules: its rules that change updates.
        kind: what it is: ``r`` (a table), ``p`` (partitioned), ``v``, ``m`` (views) or ``f`` (foreign), as in pg_class.
        required: its columns that are not null.
        keys: its sets of columns that are unique together: the primary key, and unique indexes without a condition on
            plain columns that are not null.
        references: column -> the table and column of its foreign key.
        base_types: column -> its type; for a domain, the type below it.
        labels: column -> the labels of its enum.
        checks: the conditions of its constraints.
        defaults: column -> its default.
        generated: its columns that nobody can write.
        loose: its columns whose collation treats different texts as equal.
        partition_of: the table that it is a partition of.
        has_children: other tables inherit from it.
        indexes: the names of its indexes.
        gin: its GIN indexes.
        domain_checks: column -> the conditions of its domain.
        as_caller: it is a view with the rights of its caller (security_invoker).
        row_policies: its policies for users of the API.
        row_security: row level security is on.
        users_write: its columns that anon or signed-in users may write, as far as privileges go.
        users_read: its columns that signed-in users may read, as far as privileges go.
    """

    name: str
    columns: dict[str, str]
    primary_key: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    kind: str = "r"
    required: frozenset[str] = frozenset()
    keys: list[frozenset[str]] = field(default_factory=list)
    references: dict[str, tuple[str, str]] = field(default_factory=dict)
    base_types: dict[str, str] = field(default_factory=dict)
    labels: dict[str, list[str]] = field(default_factory=dict)
    checks: list[str] = field(default_factory=list)
    defaults: dict[str, str] = field(default_factory=dict)
    generated: frozenset[str] = frozenset()
    loose: frozenset[str] = frozenset()
    partition_of: str | None = None
    has_children: bool = False
    indexes: set[str] = field(default_factory=set)
    gin: list[Gin] = field(default_factory=list)
    domain_checks: dict[str, list[str]] = field(default_factory=dict)
    as_caller: bool = False
    row_policies: list[Policy] = field(default_factory=list)
    row_security: bool = False
    users_write: frozenset[str] = frozenset()
    users_read: frozenset[str] = frozenset()

    def base_type(self, column: str) -> str | None:
        """The type of a column; for a domain, the type below it; None: there is no such column."""
        return self.base_types.get(column, self.columns.get(column))

    def is_unique(self, columns: set[str]) -> bool:
        """Whether exactly these columns are a key."""
        return frozenset(columns) in (frozenset(self.primary_key), *self.keys)

    def texts(self) -> list[str]:
        """The columns that hold text."""
        return [name for name, kind in self.columns.items() if kind in ("text", "character varying")]


@dataclass(frozen=True)
class Facts:
    """What a project's database shows.

    Attributes:
        tables: the project's own tables by qualified name.
        buckets: the ids of its Storage buckets.
        applied: autotag's migrations in the database: name without ``autotag_`` -> version.
        storage_policies: the permissive ones of ``storage.objects``.
        users_read_objects: signed-in users have the privilege to select from ``storage.objects``.
        file_functions: the project's functions (key, text, text) -> boolean, each with the type of its key; one of
            them could be the file rule.
        file_rule: the file rule of the installed adapter; None: there is none.
        adapter: the version of the installed adapter; None: there is none.
        views: the project's views and foreign tables by qualified name.
        member_functions: the project's functions that take one argument and return a boolean: name -> the
            argument's types, each with a sentence why autotag cannot call it (empty: it can).
        caller_functions: the project's functions that read who the caller is: name -> ``uid`` (by auth.uid()) or
            ``sub`` (by the claim of the token).
        spending_limits: the dollars that each workspace may spend in a month, by its row in `autotag.quotas` (None: the
            row limits images only); empty: there is no such row.
        answers: what the installed adapter was told (``autotag.adapter_answers``); None: there is none.
        lacking: schemas of Supabase that the database lacks (`lacking_schemas`).
    """

    tables: dict[str, Table]
    buckets: list[str]
    applied: dict[str, str] = field(default_factory=dict)
    storage_policies: list[Policy] = field(default_factory=list)
    users_read_objects: bool = False
    file_functions: list[tuple[str, str]] = field(default_factory=list)
    file_rule: str | None = None
    adapter: int | None = None
    views: dict[str, Table] = field(default_factory=dict)
    member_functions: dict[str, dict[str, str]] = field(default_factory=dict)
    answers: dict[str, Any] | None = None
    caller_functions: dict[str, str] = field(default_factory=dict)
    spending_limits: list[float | None] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)

    def name_of(self, wanted: str) -> str:
        """The qualified name of a table that a person has named, with or without its schema and quotes."""
        bare = wanted.replace('"', "").strip()
        names = [name for text in (wanted, bare) for name in (text, f"public.{text}")]
        plain = bare if "." in bare else f"public.{bare}"
        return next((name for name in names if name in self.tables or name in self.views), plain)


SPENDING = f"select max_cost::float8 from autotag.quotas where {EVERY_WORKSPACE}"  # noqa: S608 - ours


def read_facts(url: str) -> Facts:
    """Reads the schema of a project.

    Args:
        url: connection URL of the database's owner.

    Raises:
        psycopg.OperationalError: the database cannot be reached.
    """
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        details = read_details(connection)
        views = {name: Table(name, **found) for name, found in details.items() if found["kind"] in "vmf"}
        buckets = _column(connection, "storage.buckets", "select id from storage.buckets order by id")
        policies = read_policies(connection)
        tables = _tables(connection, details, policies)
        of_storage = [policy for policy in policies.get("storage.objects", []) if policy.permissive]
        readable = _column(
            connection, "storage.objects",
            "select 1 from pg_roles where rolname = 'authenticated' and has_schema_privilege(oid, 'storage', 'usage')"
            " and has_any_column_privilege(oid, 'storage.objects', 'select')",
        )  # fmt: skip
        return Facts(
            tables, buckets, applied_migrations(connection), of_storage, bool(readable),
            _file_functions(connection), _of_adapter(connection, "file_rule"), adapter_version(connection),
            views, read_member_functions(connection), _of_adapter(connection, "adapter_answers"),
            read_caller_functions(connection), _column(connection, "autotag.quotas", SPENDING),
            lacking_schemas(connection),
        )  # fmt: skip


USE_SUPABASE = "Set DATABASE_URL to the database of a project; supabase start runs a local one."


def lacking_schemas(connection: Connection[tuple[Any, ...]]) -> list[str]:
    """Schemas of Supabase that the migrations need, and a database lacks. Only the host's own tables for an empty
    project need storage."""
    rows = connection.execute("select s from unnest(array['auth', 'storage']) s where to_regnamespace(s) is null")
    return [name for (name,) in rows]


def read_lacking_schemas(url: str) -> list[str]:
    """The same of the database at this URL."""
    with psycopg.connect(url, connect_timeout=10) as connection:
        return lacking_schemas(connection)


def check_supabase(connection: Connection[tuple[Any, ...]], *, stand_alone: bool = False) -> None:
    """Refuses a database in which the migrations fail. stand_alone: also those of the host's own tables.

    Raises:
        HostError: it lacks what they need.
    """
    lacking = lacking_schemas(connection)
    if "auth" in lacking or (stand_alone and lacking):
        raise HostError(f"{not_supabase(lacking)} {USE_SUPABASE}")


def not_supabase(lacking: Sequence[str]) -> str:
    """What is wrong with a database that lacks schemas of Supabase; `USE_SUPABASE` is the fix."""
    schemas = "schema" if len(lacking) == 1 else "schemas"
    return f"This is not the database of a Supabase project: it lacks the {schemas} {' and '.join(lacking)}."


def _tables(
    connection: Connection[tuple[Any, ...]], details: dict[str, dict[str, Any]], policies: dict[str, list[Policy]]
) -> dict[str, Table]:
    """The project's own tables by qualified name."""
    tables = {
        name: Table(name, {}, key or [], rules or [])
        for name, key, rules in connection.execute(
            """
            select n.nspname || '.' || c.relname,
              (select array_agg(a.attname::text order by a.attnum) from pg_index i
               join pg_attribute a on a.attrelid = c.oid and a.attnum = any (i.indkey)
               where i.indrelid = c.oid and i.indisprimary),
              (select array_agg(r.rulename::text order by r.rulename) from pg_rewrite r
               where r.ev_class = c.oid and r.ev_type = '2' and r.ev_enabled <> 'D')
            from pg_class c join pg_namespace n on n.oid = c.relnamespace
            where c.relkind in ('r', 'p') and n.nspname <> all (%s) and n.nspname not like 'pg\\_%%'""",
            (list(NOT_THE_PROJECTS),),
        )
    }
    indexes = read_indexes(connection)
    return {
        name: replace(table, **details[name], **indexes.get(name, {}), row_policies=policies.get(name, []))
        for name, table in tables.items()
        if name in details  # it has columns
    }


def _file_functions(connection: Connection[tuple[str, ...]]) -> list[tuple[str, str]]:
    """The project's functions (key, text, text) -> boolean, each with the type of its key."""
    rows = connection.execute("""
        select pronamespace::regnamespace::text || '.' || proname, format_type(proargtypes[0], null) from pg_proc
        where pronargs = 3 and proargtypes[1] = 'text'::regtype and proargtypes[2] = 'text'::regtype
          and prorettype = 'boolean'::regtype and prokind = 'f'""")
    return [(str(name), str(kind)) for name, kind in rows]


def _column(connection: Connection[tuple[Any, ...]], table: str, statement: str) -> list[Any]:
    """The first column of a statement; empty if its table does not exist."""
    row = connection.execute("select to_regclass(%s)", (table,)).fetchone()
    return [r[0] for r in connection.execute(statement.encode())] if row and row[0] else []


def is_own_name(name: str) -> bool:
    """Whether a migration is autotag's, by the name of its file without version."""
    return _OWN_NAME.fullmatch(name) is not None


def applied_migrations(connection: Connection[tuple[str, ...]]) -> dict[str, str]:
    """autotag's migrations in a database, applied by any tool: name without ``autotag_`` -> version.

    Raises:
        HostError: they are in the history, but somebody has dropped the schema. The Supabase CLI would skip them for
            ever.
    """
    recorded = _column(
        connection, "supabase_migrations.schema_migrations",
        "select version || '_' || coalesce(name, '') from supabase_migrations.schema_migrations order by version",
    )  # fmt: skip
    found = {}
    for entry in recorded:
        version, _, name = entry.partition("_")
        if is_own_name(name):
            found[name.removeprefix("autotag_")] = version
    row = connection.execute("select to_regnamespace('autotag') is null").fetchone()
    if row and row[0] and set(found) - {"host_baseline"}:
        raise HostError(
            "The migration history says that autotag is installed, but the schema autotag is gone; run autotag"
            " uninstall, which removes these entries and what else is left, and then this command again."
        )
    return found


def adapter_version(connection: Connection[tuple[str, ...]]) -> int | None:
    """The version of the adapter in a database; None: there is no adapter."""
    found = _of_adapter(connection, "adapter_version")
    return None if found is None else int(found)


def _of_adapter(connection: Connection[tuple[Any, ...]], function: str) -> Any:
    """The result of a function of the installed adapter; None: there is no such function."""
    row = connection.execute("select to_regprocedure(%s) is not null", (f"autotag.{function}()",)).fetchone()
    found = connection.execute(f"select autotag.{function}()".encode()).fetchone() if row and row[0] else None
    return found[0] if found else None
