"""Finds autotag's objects in a database: only those that its own migrations have created there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import psycopg

from autotag.install.adapter import CHECK_MARK, MARKS
from autotag.install.answers import HostError
from autotag.install.facts import is_own_name
from autotag.install.keys import KEY_TYPES, RESULT_COLUMN, STAGE_COLUMNS
from autotag.install.own import of_adapter, of_engine
from autotag.texts import name_some

POLICY = "autotag: members listen to their workspaces"  # supabase/schemas/grants.sql
JOBS = {  # supabase/schemas/cron.sql: the name, and the beginning of its command
    "autotag-tick": "select autotag.tick()", "autotag-housekeeping": "select autotag.housekeeping()",
}  # fmt: skip
#: Whether the adapter has created the schema. Without its domains, nothing of autotag works.
_ADAPTER = """
    select exists (select from pg_type t
      where t.typnamespace = to_regnamespace('autotag') and t.typname = 'asset_id' and t.typtype = 'd')"""
_KEYS = """
    select a.attname::text, format_type(a.atttypid, null) from pg_attribute a
    where a.attrelid = to_regclass('autotag.keys') and a.attnum > 0"""
#: Functions, with a signature that does not depend on search_path, and whether the body names the schema autotag.
_FUNCTIONS = """
    select p.oid::bigint, p.oid::regprocedure::text, n.nspname || '.' || p.proname || '(' || coalesce((
      select string_agg(case when e.typnamespace = 'pg_catalog'::regnamespace then format_type(a.kind, null)
        else m.nspname || '.' || e.typname || case when e.oid <> a.kind then '[]' else '' end end, ',' order by a.i)
      from unnest(p.proargtypes::oid[]) with ordinality a (kind, i) join pg_type t on t.oid = a.kind
      join pg_type e on e.oid = case t.typcategory when 'A' then t.typelem else t.oid end
      join pg_namespace m on m.oid = e.typnamespace), '') || ')',
      n.nspname = 'public', strpos(coalesce(pg_get_function_sqlbody(p.oid), p.prosrc), 'autotag.') > 0
    from pg_proc p join pg_namespace n on n.oid = p.pronamespace
    where n.nspname in ('autotag', 'public') and p.prokind = 'f' order by 2"""
_VIEWS = """
    select c.relname::text from pg_class c where c.relnamespace = 'public'::regnamespace and c.relkind = 'v'
      and 'public.' || c.relname = any (%s) order by 1"""
_ENUMS = """
    select t.typname::text, array_agg(e.enumlabel::text order by e.enumsortorder)
    from pg_type t join pg_enum e on e.enumtypid = t.oid
    where t.typnamespace = 'public'::regnamespace and t.typname = any (%s) group by t.typname order by 1"""
#: Other objects in the schema, which belong to the project or an extension. A column's sequence belongs to its table.
_STRANGERS = """
    select pg_describe_object(d.classid, d.objid, 0) from pg_depend d
    where d.refclassid = 'pg_namespace'::regclass and d.refobjid = to_regnamespace('autotag') and d.deptype = 'n'
      and not (d.classid = 'pg_proc'::regclass and d.objid = any (%(functions)s::bigint[]::oid[]))
      and not exists (select from pg_class c where d.classid = 'pg_class'::regclass and c.oid = d.objid
        and (c.relkind in ('r', 'S') and 'autotag.' || c.relname = any (%(relations)s)
          or c.relkind = 'S' and exists (select from pg_depend o where o.classid = 'pg_class'::regclass
            and o.objid = c.oid and o.refclassid = 'pg_class'::regclass and o.refobjsubid > 0)))
      and not exists (select from pg_type t where d.classid = 'pg_type'::regclass and t.oid = d.objid
        and 'autotag.' || t.typname = any (%(types)s))
    order by 1"""
#: Tables with a column that has a name of autotag's, even if this login may not use them; and the columns that autotag
#: has added.
_TABLES = """
    select a.attrelid::regclass::text,
      array_agg(a.attname::text order by array_position(%(names)s::text[], a.attname::text)),
      coalesce(array_agg(a.attname::text order by array_position(%(names)s::text[], a.attname::text))
        filter (where col_description(a.attrelid, a.attnum) = %(marks)s::jsonb ->> a.attname::text), '{}')
    from pg_attribute a join pg_class c on c.oid = a.attrelid
    where c.relkind in ('r', 'p') and not c.relispartition and not a.attisdropped and a.attname = any (%(names)s)
      and c.relnamespace::regnamespace::text not in ('autotag', 'pg_catalog', 'information_schema')
    group by a.attrelid order by 1"""
#: As long as the adapter exists, it names the table of images. A copy of the table may have the same columns and
#: comments.
_IMAGE_TABLE = "select autotag.image_table()::text"
_CHECKS = """
    select c.oid::bigint, quote_ident(c.conname) from pg_constraint c
    where c.conrelid = %s::regclass and c.contype = 'c' and obj_description(c.oid, 'pg_constraint') = %s"""
_HISTORY = "select version, version || '_' || name from supabase_migrations.schema_migrations order by 1"
_JOBS = """
    select j.jobid, j.jobname::text, j.command from cron.job j where j.database = current_database() order by 2"""

Connection = psycopg.Connection[tuple[Any, ...]]


@dataclass(frozen=True)
class Remains:
    """The objects of autotag in a database.

    Attributes:
        adapter: the adapter has been applied: the schema is autotag's.
        engine: so have the migrations after it.
        functions: in ``public``: oid -> name, as Postgres prints it.
        views: in ``public``.
        types: in ``public``.
        policy: the policy of Realtime's topics.
        strangers: objects in autotag's schema that autotag has not created.
        table: the table of images; None: unknown.
        resolved: the adapter still names that table.
        columns: columns with autotag's names, by table.
        made: the columns that autotag has added to ``table``.
        checks: autotag's constraints of ``table``: oid -> name.
        jobs: of pg_cron: id -> name.
        migrations: rows of the migration history.
    """

    adapter: bool
    engine: bool
    functions: dict[int, str]
    views: list[str]
    types: list[str]
    policy: bool
    strangers: list[str]
    jobs: dict[int, str]
    migrations: list[str]
    table: str | None = None
    resolved: bool = False
    columns: dict[str, list[str]] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)
    checks: dict[int, str] = field(default_factory=dict)

    @property
    def any(self) -> bool:
        """Whether anything proves that autotag is or was installed in this database."""
        return bool(self.adapter or self.functions or self.jobs or self.migrations)


def find_remains(connection: Connection) -> Remains:
    """Looks at a database. Changes nothing.

    Raises:
        HostError: the adapter's table is gone, and several others have autotag's columns.
        psycopg.Error: the database cannot be read.
    """
    adapter = bool(one(connection, _ADAPTER))
    schema = bool(one(connection, "select to_regnamespace('autotag') is not null"))
    keys: Sequence[Mapping[str, str]] = [dict(connection.execute(_KEYS).fetchall())] if adapter else _any_keys()
    rows = connection.execute(_FUNCTIONS).fetchall()
    engine = adapter and any(signature == "autotag.schema_version()" for _, _, signature, _, _ in rows)
    known = set(chain(*(of_engine().signatures(types) | of_adapter().signatures(types) for types in keys)))
    by_hand = not schema  # somebody has dropped the schema: what it leaves in public is autotag's only if it is just so
    functions = {
        oid: name for oid, name, signature, public, mentions in rows
        if public and mentions and signature in known and (engine or by_hand)
    }  # fmt: skip
    made = [of_adapter(), of_engine()] if engine else [of_adapter()]
    applied = set(chain(*(own.signatures(types) for own in made for types in keys)))
    strange = {
        "functions": [oid for oid, _, signature, _, _ in rows if signature in applied],
        "relations": [*chain(*(own.relations for own in made))], "types": [*chain(*(own.types for own in made))],
    }  # fmt: skip
    found = Remains(
        adapter, engine, functions,
        views=[row[0] for row in connection.execute(_VIEWS, ([*of_engine().relations],))] if engine else [],
        types=[],
        policy=engine and bool(one(connection, "select exists (select from pg_policies where policyname = %s"
                                   " and schemaname = 'realtime' and tablename = 'messages')", (POLICY,))),
        strangers=[row[0] for row in connection.execute(_STRANGERS, strange)] if adapter else [],
        jobs={jobid: name for jobid, name, command in _rows(connection, "cron.job", _JOBS)
              if name in JOBS and command.startswith(JOBS[name])},
        migrations=[name for _, name in _rows(connection, "supabase_migrations.schema_migrations", _HISTORY)
                    if name and is_own_name(name.partition("_")[2])],
    )  # fmt: skip
    if found.any:
        found = replace(found, types=_types(connection, engine=engine, by_hand=by_hand))
    return _with_table(connection, found)


def _types(connection: Connection, *, engine: bool, by_hand: bool) -> list[str]:
    """autotag's enums in ``public``."""
    enums = of_engine().enums()
    rows = connection.execute(_ENUMS, ([*enums],)).fetchall()
    return [name for name, labels in rows if engine or (by_hand and labels == enums[name])]


def _with_table(connection: Connection, found: Remains) -> Remains:
    """Adds the table of images: the one that the adapter names, or otherwise the only one with columns of autotag."""
    names = [*STAGE_COLUMNS, RESULT_COLUMN]
    rows = connection.execute(_TABLES, {"names": names, "marks": json.dumps(MARKS)}).fetchall()
    columns = {table: present for table, present, made in rows if made or {*STAGE_COLUMNS} <= {*present}}
    marked = {table: made for table, _, made in rows if made}
    table = _named_table(connection) if found.adapter else None
    resolved = table in columns
    if not resolved and found.any:
        if len(marked) > 1:
            raise HostError(
                f"The table that the adapter names is gone, and {name_some(list(marked))} have autotag's columns. Say"
                " which are copies: remove the comments of their columns (comment on column … is null), and run this"
                " again."
            )
        table = next(iter(marked), None)
    if table not in columns:
        return replace(found, columns=columns)
    checks: dict[int, str] = dict(connection.execute(_CHECKS, (table, CHECK_MARK)).fetchall())
    return replace(found, columns=columns, table=table, resolved=resolved, made=marked.get(table, []), checks=checks)


def _named_table(connection: Connection) -> str | None:
    """The table that the adapter names; None: there is no such table."""
    if not one(connection, "select to_regprocedure('autotag.image_table()') is not null"):
        return None
    try:
        with connection.transaction():
            return str(one(connection, _IMAGE_TABLE))
    except (psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return None


def _any_keys() -> list[dict[str, str]]:
    """Every type that a project's ids may have, for each column of `autotag.keys`."""
    names = ("asset_id", "workspace_id", "user_id")
    kinds = sorted(set(KEY_TYPES.values()))
    return [{**dict.fromkeys(names, kind), "asset_ids": f"{kind}[]"} for kind in kinds]


def _rows(connection: Connection, table: str, statement: str) -> list[tuple[Any, ...]]:
    """A statement's rows; none if its table is missing."""
    there = one(connection, "select to_regclass(%s) is not null", (table,))
    return connection.execute(statement.encode()).fetchall() if there else []


def one(connection: Connection, statement: str, values: Sequence[Any] = ()) -> Any:
    """The first column of a statement's first row."""
    row = connection.execute(statement.encode(), values or None).fetchone()
    return row and row[0]
