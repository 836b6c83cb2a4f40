"""Checks what autotag can work with: types of keys, unique ids, writable columns."""

from __future__ import annotations

from collections.abc import Sequence

from autotag.install.answers import Ask, HostError
from autotag.install.facts import Table
from autotag.install.quoting import table_name
from autotag.texts import name_some

#: The type of a key's column, below its domain -> the base type of autotag's ids.
KEY_TYPES = {
    "uuid": "uuid", "bigint": "bigint", "integer": "integer", "smallint": "integer", "text": "text",
    "character varying": "text",
}  # fmt: skip
_TEXT = ("text", "character varying")
_INTEGERS = ("integer", "smallint", "bigint")
#: The columns that show a state and the column for the answer, each with the types that an existing column may have.
STAGE_COLUMNS = {
    "tagging_stage": _TEXT, "tagging_progress": _INTEGERS, "tagging_eta": ("timestamp with time zone",),
    "tagging_error": _TEXT,
}  # fmt: skip
RESULT_COLUMN, RESULT_TYPES = "tagging_result", ("jsonb",)
#: Names of relations that are not plain tables, by their kind in pg_class.
KINDS = {"v": "a view", "m": "a materialized view", "f": "a foreign table"}


def key_type(table: Table, column: str, option: str) -> str:
    """The base type of the ids in a column: ``uuid``, ``bigint``, ``integer`` or ``text``.

    Raises:
        HostError: autotag does not support ids of the column's type.
    """
    kind = table.base_type(column)
    if kind not in KEY_TYPES:
        raise HostError(
            f"{table.name}.{column} is {kind}; autotag needs uuid, bigint, integer or text there ({option})."
        )
    if column in table.loose:
        raise HostError(
            f"{table.name}.{column} has a collation in which different texts are equal; autotag needs a key with a"
            f" deterministic collation ({option})."
        )
    return KEY_TYPES[kind]


def key_columns(table: Table) -> list[str]:
    """The columns that have a type of keys."""
    return [name for name in table.columns if table.base_type(name) in KEY_TYPES and name not in table.loose]


def find_id(table: Table, wanted: str | None, ask: Ask) -> str:
    """The column that identifies a row by itself.

    Args:
        table: of the images.
        wanted: the choice of the caller.
        ask: called if the primary key has several columns, or if there is none.

    Raises:
        HostError: no column does, the chosen column does not, or ``ask`` raised it.
    """
    if wanted is None and len(table.primary_key) == 1:
        return table.primary_key[0]
    unique = [name for name in key_columns(table) if table.is_unique({name})]
    if wanted is not None:
        if wanted not in table.columns or table.is_unique({wanted}):
            return wanted
        raise HostError(f"{_why_not(table, wanted)} {_what_to_do(table, wanted, unique)}")
    key = f"has the primary key ({', '.join(table.primary_key)})" if table.primary_key else "has no primary key"
    if not unique:
        column = next((name for name in (*table.primary_key[::-1], *table.columns) if name == "id"), None)
        raise HostError(
            f"{table.name} {key}, so no column identifies an image by itself. {_what_to_do(table, column, unique)}"
        )
    answer = ask("--id-column", f"{table.name} {key}. Which column identifies an image by itself?", unique)
    return find_id(table, answer, ask)


def _why_not(table: Table, column: str) -> str:
    if column not in table.required:
        return f"{table.name}.{column} may be null, so it does not identify every image (--id-column)."
    return f"{table.name}.{column} is not unique by itself, so one image's tags would go to several rows (--id-column)."


def _what_to_do(table: Table, column: str | None, unique: Sequence[str]) -> str:
    if unique:
        return f"Set --id-column to {name_some(unique)}."
    if table.kind == "p":
        return (
            "A partitioned table can have such a column only where it is partitioned by it: partition it by hash of the"
            " id, or let its rows refer to a plain table with one row an image, and name that one (--table)."
        )
    if column is None:
        return "Add a column with a unique id, or name another table (--table)."
    required = "" if column in table.required else ", and set it not null"
    return (
        f'Add the constraint unique ("{column}"){required}; where its values repeat, add a column instead: alter table'
        f" {table_name(table.name)} add column image_id uuid not null unique default gen_random_uuid(); (--id-column)."
    )


def check_table(table: Table) -> None:
    """Refuses a table to which autotag cannot add columns, or in which an id may occur twice.

    Raises:
        HostError: it is a view, a foreign table or a partition, or it has child tables.
    """
    if table.kind in KINDS:
        raise HostError(
            f"{table.name} is {KINDS[table.kind]}, which gets no more columns; name the table behind it (--table)."
        )
    if table.partition_of:
        raise HostError(f"{table.name} is a partition of {table.partition_of}; name that table instead (--table).")
    if table.has_children:
        raise HostError(
            f"{table.name} has child tables, in which an id may occur again; name a table without them (--table)."
        )


def check_written(table: Table, tags: str, result: str) -> None:
    """Refuses columns that autotag could not write.

    Raises:
        HostError: a column is generated, or does not have the type of the column that autotag would add.
    """
    for column in (tags, result, *STAGE_COLUMNS):
        if column in table.generated:
            option = "another column for the tags with --tags-column" if column == tags else "it differently"
            raise HostError(f"{table.name}.{column} is generated, so autotag cannot write it; name {option}.")
    blank = next((column for column in STAGE_COLUMNS if column in table.required), None)
    if blank:
        raise HostError(
            f"{table.name}.{blank} is not null, and autotag writes null there; run: alter table"
            f" {table_name(table.name)} alter column {blank} drop not null;"
        )
    for column, kinds in {**STAGE_COLUMNS, result: RESULT_TYPES}.items():
        kind = table.base_type(column)
        if kind is not None and kind not in kinds:
            raise HostError(f"{table.name}.{column} is {kind}; autotag needs a column of this name that is {kinds[0]}.")
