"""The index that makes searching by tag fast. autotag itself does not need it, so `init` only prints the statement.

It cannot be a migration: ``create index concurrently`` cannot run in a transaction, and without ``concurrently``,
nobody could write to the table while the index is built.
"""

from __future__ import annotations

from dataclasses import dataclass

from autotag.install.facts import Facts
from autotag.install.host import Host
from autotag.install.quoting import quote, table_name


@dataclass(frozen=True)
class TagIndex:
    """The offered index.

    Attributes:
        statement: the statement that creates it; None: it exists, or it is impossible.
        note: a note for a person, or None.
    """

    statement: str | None = None
    note: str | None = None


def offer_index(host: Host, facts: Facts) -> TagIndex:
    """The missing index on the column for tags."""
    table = facts.tables.get(host.table)
    if table is None or any(index.complete and host.tags in index.columns for index in table.gin):
        return TagIndex()
    column = f"{host.table}.{host.tags}"
    if host.tags_type == "json":
        return TagIndex(note=f"{column} is json, which has no index for tags. As jsonb it would have one.")
    schema, _, name = host.table.partition(".")
    for index in table.gin:
        if host.tags in index.columns and not index.valid:
            there = f"{quote(schema)}.{quote(index.name)}"
            return TagIndex(
                note=f"The index {there} on {column} is not valid: its build still runs, or has failed. If it has"
                f" failed: drop index concurrently {there}; and run this command again."
            )
    wanted = f"{name}_{host.tags}_idx"
    if wanted in table.indexes:  # an index of another kind
        wanted = f"{name}_{host.tags}_gin_idx"
    # jsonb has two operator classes. This one supports only @>, which is the only one of these operators in PostgREST.
    operators = " jsonb_path_ops" if host.tags_type == "jsonb" else ""
    partitioned = table.kind == "p"
    statement = (
        f"create index {'' if partitioned else 'concurrently '}if not exists {quote(wanted)}"
        f" on {table_name(host.table)} using gin ({quote(host.tags)}{operators});"
    )
    if partitioned:
        return TagIndex(
            statement,
            f"{host.table} is partitioned, so nobody can write to it while the index is built. If it is large, create"
            " the index concurrently on each partition first.",
        )
    return TagIndex(statement)
