"""PostgREST's query strings and errors. Unsupported features get a 501."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from psycopg import sql

OPERATORS = {"eq": "=", "neq": "<>", "gt": ">", "gte": ">=", "lt": "<", "lte": "<=", "like": "like", "ilike": "ilike"}
CONTAINERS = {"cs": "@>", "cd": "<@", "ov": "&&"}
RESERVED = {"select", "order", "limit", "offset", "columns", "on_conflict"}
LOGICAL = {"or", "and", "not.or", "not.and"}
#: Max rows of one answer, as in hosted projects (PostgREST's db-max-rows).
MAX_ROWS = 1000
DEEPEST = 50  # max depth of nested groups of conditions
IDENTIFIER = re.compile(r"\w+", re.ASCII)


class RestError(Exception):
    """An error response: the status and PostgREST's four fields."""

    def __init__(
        self, status: int, code: str, message: str, details: str | None = None, hint: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"code": code, "details": details, "hint": hint, "message": message}


def unsupported(feature: str) -> RestError:
    return RestError(501, "LOCAL501", f"The local edge does not support {feature}.", hint="Use a real Supabase stack.")


@dataclass
class Query:
    """A parsed query string."""

    select: list[sql.Composable] = field(default_factory=list)
    where: list[sql.Composable] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    order: list[sql.Composable] = field(default_factory=list)
    limit: int | None = None
    offset: int = 0

    def clauses(self) -> sql.Composed:
        parts: list[sql.Composable] = []
        if self.where:
            parts.append(sql.SQL(" where ") + sql.SQL(" and ").join(self.where))
        if self.order:
            parts.append(sql.SQL(" order by ") + sql.SQL(", ").join(self.order))
        if self.limit is not None:
            parts.append(sql.SQL(" limit {}").format(sql.Literal(self.limit)))
        if self.offset:
            parts.append(sql.SQL(" offset {}").format(sql.Literal(self.offset)))
        return sql.Composed(parts)

    def columns(self) -> sql.Composable:
        return sql.SQL(", ").join(self.select) if self.select else sql.SQL("*")


def parse_query(items: list[tuple[str, str]], table: str | None = None) -> Query:
    """Parses a query string. With ``table``, column names are qualified by it.

    Raises:
        RestError: 501 for unsupported features, 400 for what cannot be parsed.
    """
    query = Query()
    for name, value in items:
        if name == "select":
            if value not in ("", "*"):
                query.select = [_column(column, table) for column in value.split(",")]
        elif name == "order":
            query.order = [_order(term, table) for term in value.split(",")]
        elif name in ("limit", "offset"):
            if not value.isdigit():
                raise RestError(400, "PGRST100", f'"failed to parse {name} ({value})"')
            setattr(query, name, int(value))
        elif name in LOGICAL:
            query.where.append(_group(query, f"{name}{value}", table))
        elif name not in RESERVED:
            query.where.append(_filter(query, name, value, table))
    return query


def _identifier(name: str, table: str | None = None) -> sql.Identifier:
    name = name.strip().strip('"')
    if not IDENTIFIER.fullmatch(name):
        raise unsupported(f"the expression {name[:60]!r} in a query")
    return sql.Identifier(table, name) if table else sql.Identifier(name)


def _column(term: str, table: str | None) -> sql.Composable:
    alias, _, name = term.rpartition(":") if "::" not in term else ("", "", term)
    column = _identifier(name, table)
    return sql.SQL("{} as {}").format(column, _identifier(alias)) if alias else column


def _order(term: str, table: str | None) -> sql.Composable:
    name, *modifiers = term.split(".")
    allowed = {"asc": "asc", "desc": "desc", "nullsfirst": "nulls first", "nullslast": "nulls last"}
    if any(modifier not in allowed for modifier in modifiers):
        raise RestError(400, "PGRST100", f'"failed to parse order ({term})"')
    return sql.SQL("{} " + " ".join(allowed[modifier] for modifier in modifiers)).format(_identifier(name, table))


def _group(query: Query, text: str, table: str | None, depth: int = 0) -> sql.Composable:
    """The conditions of ``or(…)`` or ``and(…)``, which may contain further groups."""
    head, _, rest = text.partition("(")
    if not rest.endswith(")") or depth > DEEPEST:
        raise RestError(400, "PGRST100", f'"failed to parse logic tree ({text[:60]})"')
    clauses = []
    for part in _parts(rest[:-1]):
        if part.split("(")[0] in LOGICAL:
            clauses.append(_group(query, part, table, depth + 1))
            continue
        name, _, value = part.partition(".")
        if not value:
            raise RestError(400, "PGRST100", f'"failed to parse logic tree ({text[:60]})"')
        clauses.append(_filter(query, name, value, table, quoted=True))
    joined = sql.SQL("({})").format(sql.SQL(f" {head.removeprefix('not.')} ").join(clauses))
    return sql.SQL("not ") + joined if head.startswith("not.") else joined


def _parts(text: str) -> list[str]:
    """Splits at commas outside of quotes and brackets."""
    parts, depth, quoted, escaped = [""], 0, False, False
    for character in text:
        if character == "," and not depth and not quoted:
            parts.append("")
            continue
        parts[-1] += character
        if not escaped and character == '"':
            quoted = not quoted
        elif not quoted:
            depth += (character in "({") - (character in ")}")
        escaped = character == "\\" and not escaped
    return parts


def _unquoted(value: str) -> str:
    """A value of a group of conditions, without its quotes."""
    return re.sub(r"\\(.)", r"\1", value[1:-1]) if len(value) > 1 and value[0] == value[-1] == '"' else value


def _filter(query: Query, name: str, value: str, table: str | None, *, quoted: bool = False) -> sql.Composable:
    column = _identifier(name, table)
    operator, _, operand = value.partition(".")
    negate = operator == "not"
    if negate:
        operator, _, operand = operand.partition(".")
    operand = _unquoted(operand) if quoted else operand
    if operator in OPERATORS:
        if operator in ("like", "ilike"):
            operand = operand.replace("*", "%")
        clause = sql.SQL("{} " + OPERATORS[operator] + " %s").format(column)
        query.values.append(operand)
    elif operator in CONTAINERS:
        clause = sql.SQL("{} " + CONTAINERS[operator] + " %s").format(column)
        query.values.append(operand)
    elif operator == "is" and operand in ("null", "true", "false", "unknown"):
        clause = sql.SQL("{} is " + operand).format(column)
    elif operator == "in" and operand.startswith("(") and operand.endswith(")"):
        members = [m.strip('"') for m in re.findall(r'"[^"]*"|[^,]+', operand[1:-1])]
        clause = sql.SQL("{} in (").format(column) + sql.SQL(", ").join([sql.SQL("%s")] * len(members)) + sql.SQL(")")
        query.values += members
        if not members:
            clause = sql.SQL("{} is null and false").format(column)
    else:
        raise unsupported(f"the filter {operator[:30]!r}")
    return sql.SQL("not (") + clause + sql.SQL(")") if negate else clause
