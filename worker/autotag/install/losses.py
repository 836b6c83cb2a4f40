"""Data that only autotag's schema has, which is lost when autotag is uninstalled."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from psycopg import Connection

SHOWN = 3  # commands, one for each workspace


@dataclass(frozen=True)
class Loss:
    """Data that is dropped with the schema.

    Attributes:
        what: the kind of data and its number.
        keep: the commands that save it, one for each workspace if there are few; empty: it cannot be saved.
    """

    what: str
    keep: list[str]


#: Table -> the name of its rows, and the command that saves the rows of one workspace. (A null workspace: rows for
#: all.)
_KEPT: dict[str, tuple[str, Callable[[str | None], str]]] = {
    "vocabulary": ("tag{s} of the vocabulary", lambda workspace: (
        f"autotag vocabulary export{_option(workspace)} > vocabulary{_suffix(workspace)}.csv")),
    "profiles": ("version{s} of profiles", lambda workspace: (
        f"autotag profile show {_option(workspace).strip() or '--all'} --json > profile{_suffix(workspace)}.json")),
    "quotas": ("quota{s}", lambda _: "psql \"$DATABASE_URL\" -c '\\copy autotag.quotas to quotas.csv csv header'"),
    "usage": ("row{s} of usage, with the cost", lambda _: (
        "psql \"$DATABASE_URL\" -c '\\copy autotag.usage to usage.csv csv header'")),
}  # fmt: skip
_RUNNING = "select count(*) from autotag.jobs where finished_at is null"
_PAID = "select count(*) from autotag.unstored where result is not null"


def find_losses(connection: Connection[tuple[Any, ...]]) -> list[Loss]:
    """The data that would be lost. A schema of another version may lack a table, which then counts as empty."""
    found = []
    for table, (what, command) in _KEPT.items():
        if not _exists(connection, table):
            continue
        statement = f"select workspace_id::text, count(*) from autotag.{table} group by 1 order by 1 nulls first"  # noqa: S608 - ours
        rows = connection.execute(statement.encode()).fetchall()
        if rows:
            commands = list(dict.fromkeys(command(workspace) for workspace, _ in rows[:SHOWN]))
            more = len(rows) - SHOWN
            commands += [f"and so on for {more} more workspaces"] if more > 0 and len(commands) > 1 else []
            found.append(Loss(_count(sum(count for _, count in rows), what), commands))
    for table, what, statement in (
        ("jobs", "running upload{s}", _RUNNING),
        ("unstored", "paid answer{s} without a row yet", _PAID),
    ):
        row = connection.execute(statement.encode()).fetchone() if _exists(connection, table) else None
        if row and row[0]:
            found.append(Loss(_count(row[0], what), []))
    return found


def _exists(connection: Connection[tuple[Any, ...]], table: str) -> bool:
    row = connection.execute("select to_regclass(%s) is not null", (f"autotag.{table}",)).fetchone()
    return bool(row and row[0])


def _count(number: int, what: str) -> str:
    return f"{number:,} {what.format(s='' if number == 1 else 's')}"


def _option(workspace: str | None) -> str:
    return f" --workspace {shlex.quote(workspace)}" if workspace else ""


def _suffix(workspace: str | None) -> str:
    return "-" + re.sub(r"[^\w-]+", "_", workspace)[:100] if workspace else ""
