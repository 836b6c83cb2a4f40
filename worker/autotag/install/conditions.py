"""Checks the conditions that a project's owner gives (``--where``, ``--members-where``) for the adapter.

They are the owner's own code. But a slip must be one sentence before anything is written, and a condition must stay
one: it cannot end its parenthesis or the function around it, and it has no comment that swallows what follows.
"""

from __future__ import annotations

import re
from typing import Any

import psycopg

from autotag.install.answers import HostError
from autotag.install.quoting import table_name

MAX_LENGTH = 2000  # characters
#: A string or a quoted name is one token. A string of the form E'…' may escape its quote.
TOKEN = re.compile(
    r"""[eE]'(?:[^'\\]|\\.|'')*' | [eE]' | '(?:[^']|'')*' | "(?:[^"]|"")*" | \w+ | --|/\*|. """, re.VERBOSE | re.DOTALL
)
FORBIDDEN = {
    ";": "a semicolon", "--": "a comment", "/*": "a comment", "$": "a dollar sign", "'": "a string without an end",
    "E'": "a string without an end", "e'": "a string without an end",
    '"': "a name without an end", "\\": "a backslash", "\0": "a zero byte",
}  # fmt: skip


def check_form(condition: str, option: str) -> str:
    """Returns the condition without white space around it.

    Raises:
        HostError: it is empty or too long, it ends a parenthesis that it did not begin, or it has a comment, a
            semicolon or a dollar sign outside a string, or ``$$`` anywhere.
    """
    text = condition.strip()
    if not text or len(text) > MAX_LENGTH:
        raise HostError(f"{option} is a condition of 1 to {MAX_LENGTH} characters, such as deleted_at is null.")
    depth = 0
    for token in TOKEN.findall(text):
        if token in FORBIDDEN or "$$" in token:
            raise HostError(f"{option} cannot have {FORBIDDEN.get(token, '$$')}; give one condition, as behind where.")
        depth += {"(": 1, ")": -1}.get(token, 0)
        if depth < 0:
            break
    if depth != 0:
        raise HostError(f"The parentheses of {option} do not match; give one condition, as behind where.")
    return text


def check_condition(url: str, table: str, alias: str, condition: str, option: str) -> None:
    """Lets Postgres parse a condition on the rows of a table.

    Args:
        url: connection URL of the database's owner.
        table: qualified name.
        alias: the name of the row in the adapter.
        condition: the condition.
        option: that gave it.

    Raises:
        HostError: it is no condition on this table.
        psycopg.OperationalError: the database cannot be reached.
    """
    text = check_form(condition, option)
    with (
        psycopg.connect(url, autocommit=True, connect_timeout=10) as connection,
        connection.transaction(force_rollback=True),
    ):
        connection.execute("set transaction read only")
        connection.execute("set local search_path = pg_catalog, public, extensions, pg_temp")
        try:
            _parse(connection, f"select from {table_name(table)} {alias} where ({text})")
        except psycopg.OperationalError:
            raise
        except psycopg.Error as error:
            reason = (error.diag.message_primary or str(error)).splitlines()[0]
            raise HostError(f"Postgres does not accept {option} for {table}: {reason}.") from None


def _parse(connection: psycopg.Connection[Any], statement: str) -> None:
    connection.execute(f"explain {statement}".encode())
