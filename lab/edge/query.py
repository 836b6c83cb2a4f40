"""PostgREST's query strings and errors. Unsupported features get a 501."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from psycopg import sql

OPERATORS = {"eq": "=", "neq": "<>", "gt": ">", "gte": ">=", "lt": "<", "lte": "<=", "like": "like", "ilike": "ilike"}
RESERVED = {"select", "order", "limit", "offset", "columns", "on_conflict"}
LOGICAL = {"or", "and", "not.or", "not.and"}
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
            raise unsupported(f"the filter {name}")
        elif name not in RESERVED:
            _filter(query, name, value, table)
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


def _filter(query: Query, name: str, value: str, table: str | None) -> None:
    column = _identifier(name, table)
    operator, _, operand = value.partition(".")
    negate = operator == "not"
    if negate:
        operator, _, operand = operand.partition(".")
    if operator in OPERATORS:
        if operator in ("like", "ilike"):
            operand = operand.replace("*", "%")
        clause = sql.SQL("{} " + OPERATORS[operator] + " %s").format(column)
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
    query.where.append(sql.SQL("not (") + clause + sql.SQL(")") if negate else clause)
