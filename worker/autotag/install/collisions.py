"""Refuses objects of a project that have names which autotag needs, before anything is written or applied."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import psycopg
from psycopg import Connection

from autotag.install.answers import HostError
from autotag.install.keys import RESULT_COLUMN, RESULT_TYPES, STAGE_COLUMNS
from autotag.install.quoting import quote, table_name
from autotag.texts import name_some, printable

#: The beginning of the comment that autotag puts on the columns that it adds. The values in them are its own.
MARK = "autotag: "
#: For each of these columns, the types that can hold all of autotag's values, as Postgres prints them.
_FITTING = {**STAGE_COLUMNS, RESULT_COLUMN: RESULT_TYPES}
#: Every result of autotag has these keys (autotag.remember_tags), even if the row's tags were left as they are.
_OWN_RESULT = (
    f"jsonb_typeof({RESULT_COLUMN} -> 'given') = 'array' and {RESULT_COLUMN} ?& '{{model,caption,confidence}}'"
)
_CREATED = re.compile(r"^create (?:or replace )?(?P<kind>\w+) public\.(?P<name>\w+)", re.MULTILINE)
_TAKEN = """
    select case c.relkind when 'v' then 'view' when 'm' then 'materialized view' when 'S' then 'sequence'
      when 'c' then 'type' when 'f' then 'foreign table' else 'table' end
      || ' ' || c.relname
    from pg_class c where c.relnamespace = %(schema)s::regnamespace and c.relkind not in ('i', 'I', 't')
      and (%(names)s::text[] is null or c.relname = any (%(names)s))
    union all
    select 'function ' || p.proname || '(' || pg_get_function_identity_arguments(p.oid) || ')'
    from pg_proc p where p.pronamespace = %(schema)s::regnamespace
      and (%(names)s::text[] is null or p.proname = any (%(names)s))
    union all
    select 'type ' || t.typname from pg_type t where t.typnamespace = %(schema)s::regnamespace and t.typrelid = 0
      and t.typelem = 0 and (%(names)s::text[] is null or t.typname = any (%(names)s))
    order by 1"""
_COLUMNS = """
    select a.attname::text, format_type(a.atttypid, a.atttypmod), a.attnotnull, pg_get_expr(d.adbin, d.adrelid),
      array(select k.conname::text from pg_constraint k where k.conrelid = a.attrelid and a.attnum = any (k.conkey)
            order by 1)
      || array(select i.indexrelid::regclass::text from pg_index i
               where i.indrelid = a.attrelid and i.indisunique and a.attnum = any (i.indkey)
                 and not exists (select from pg_constraint k where k.conindid = i.indexrelid)),
      coalesce(col_description(a.attrelid, a.attnum), '')
    from pg_attribute a left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
    where a.attrelid = %s::regclass and a.attname = any (%s) and a.attnum > 0 and not a.attisdropped
    order by a.attnum"""


def check_names(connection: Connection[Any], missing: Sequence[str], present: Sequence[str]) -> None:
    """Refuses objects in ``public`` that have names of autotag's objects.

    Args:
        connection: of the database's owner.
        missing: the SQL of migrations that are not applied yet.
        present: the SQL of migrations that are applied.

    Raises:
        HostError: there are such objects. (A function with other arguments counts, too, because autotag grants rights
            by name.)
    """
    names, own = (
        {found["name"] for text in texts for found in _CREATED.finditer(text)} for texts in (missing, present)
    )
    taken = _taken(connection, "public", sorted(names - own))
    if taken:
        raise HostError(
            f"The schema public has {name_some(taken)}, and autotag needs {'these names' if taken[1:] else 'this name'}"
            " for its own; rename yours (alter … rename to …) or move it to another schema, then run this again."
            " Nothing was changed. (If an autotag that somebody removed by hand left it: autotag uninstall drops it.)"
        )


def check_schema(connection: Connection[Any]) -> None:
    """Refuses a schema ``autotag`` with objects if autotag is not installed.

    Raises:
        HostError: there is such a schema.
    """
    taken = _taken(connection, "autotag", None)
    if taken:
        raise HostError(
            f"The schema autotag has {name_some(taken)}, which no installation of autotag made, and autotag needs this"
            " schema for itself; rename yours (alter schema autotag rename to …), then run this again. Nothing was"
            " changed."
        )


def _taken(connection: Connection[Any], schema: str, names: Sequence[str] | None) -> list[str]:
    row = connection.execute("select to_regnamespace(%s) is not null", (schema,)).fetchone()
    if row != (True,):
        return []
    return [found for (found,) in connection.execute(_TAKEN.encode(), {"schema": schema, "names": names})]


def check_columns(connection: Connection[Any], table: str) -> list[str]:
    """Refuses the project's own columns in the table of images that have names of autotag's columns.

    autotag uses an existing column only if nothing can depend on its contents: it has the right type, no value, no
    default and no constraint. Results of an earlier installation may stay.

    Returns:
        Notes for a person.

    Raises:
        HostError: there is such a column.
    """
    taken = []
    names = [*_FITTING]
    for column, kind, required, default, rules, comment in connection.execute(
        _COLUMNS.encode(), (table_name(table), names)
    ).fetchall():
        kind = re.sub(r"^timestamp\(\d\)", "timestamp", kind)
        if comment.startswith(MARK):
            continue
        if kind not in _FITTING[column]:
            kinds = _FITTING[column]
            to = f"alter table {table_name(table)} alter column {column} type {kinds[0]};"
            raise HostError(
                f"{table}.{column} is {kind}; autotag needs a column of this name that is {kinds[0]}. If nothing else"
                f" of yours uses it: {to} otherwise rename it (alter table {table_name(table)} rename column {column}"
                " to …), then run this again."
            )
        has = (
            f"the default {printable(default, 100)}" if default else
            name_some([f"the constraint {rule}" for rule in rules]) if rules else
            "no nulls" if required else _values(connection, table, column)
        )  # fmt: skip
        if has:
            raise HostError(
                f"{table} has a column {column} of its own ({has}), and autotag would write its own values there;"
                f" rename yours (alter table {table_name(table)} rename column {column} to …), or empty it if nothing"
                " of yours needs it, then run this again."
            )
        if column != RESULT_COLUMN:
            taken.append(column)
    return [f"{table} has {name_some(taken)} already. As it is empty, autotag uses it."] if taken else []


def _values(connection: Connection[Any], table: str, column: str) -> str:
    """The values in a column that autotag has not written, as text; empty: there are none."""
    foreign = f"({_OWN_RESULT}) is not true" if column == RESULT_COLUMN else "true"
    try:
        with connection.transaction():
            connection.execute("set local row_security = off")  # an error is better than missing rows
            row = connection.execute(
                f"select left({quote(column)}::text, 100) from {table_name(table)}"  # noqa: S608 - quoted
                f" where {quote(column)} is not null and {foreign} limit 1".encode()
            ).fetchone()
    except psycopg.errors.InsufficientPrivilege:
        return "with rows that this login may not see"
    return f"with values such as {printable(row[0], 60)}" if row else ""
