"""Writes names and strings of a project as SQL, so that none of them becomes code."""

from __future__ import annotations

import re

#: Words of SQL that need quotes as names (pg_get_keywords, catcode R and T; Postgres 15 to 18).
RESERVED = frozenset(
    """
    all analyse analyze and any array as asc asymmetric authorization binary both case cast check collate
    collation column concurrently constraint create cross current_catalog current_date current_role current_schema
    current_time current_timestamp current_user default deferrable desc distinct do else end except false fetch
    for foreign freeze from full grant group having ilike in initially inner intersect into is isnull join lateral
    leading left like limit localtime localtimestamp natural not notnull null offset on only or order outer
    overlaps placing primary references returning right select session_user similar some symmetric system_user
    table tablesample then to trailing true union unique user using variadic verbose when where window with
    """.split()  # noqa: SIM905 - a list would have a line for each
)


def table_name(name: str) -> str:
    """A qualified name as SQL writes it."""
    return ".".join(quote(part) for part in name.split(".", 1))


def quote(name: str) -> str:
    """An identifier as SQL writes it."""
    plain = re.fullmatch(r"[a-z_][a-z0-9_]*", name) and name not in RESERVED
    return name if plain else '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """A string as SQL writes it. It contains no ``$``, so it can be in the ``$$`` body of a function."""
    if "$" not in text and "\\" not in text:  # a plain constant with a backslash depends on standard_conforming_strings
        return "'" + text.replace("'", "''") + "'"
    return "E'" + text.replace("\\", "\\\\").replace("'", "''").replace("$", "\\044") + "'"


def read_literal(code: str) -> str:
    """The string that `literal` wrote as ``code``.

    Raises:
        ValueError: `literal` did not write it.
    """
    text = code.removeprefix("E")[1:-1].replace("''", "'")
    if code.startswith("E"):
        text = re.sub(r"\\(044|\\)", lambda match: "$" if match[1] == "044" else "\\", text)
    if literal(text) != code:
        raise ValueError(f"not as literal() writes it: {code[:100]}")
    return text
