"""Makes typed values of what a call of the database returns.

A reader gets the value of a row with one column, or a row with several columns by name. The constructors `int`, `bool`
and `str` are readers, too. Nothing is checked when it is read: tests/integration/test_messages.py compares the types
with the SQL.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache, partial
from typing import Any, TypeVar, cast

R = TypeVar("R")

#: Any: the only place where what the database says has no type yet.
Reader = Callable[[Any], R]


def make(kind: type[R], payload: Mapping[str, object]) -> R:
    """Makes a dataclass from the database's JSON. Unknown fields are ignored, because patch releases may add some."""
    names = _names(cast("type", kind))
    return kind(**{name: value for name, value in payload.items() if name in names})


def one(kind: type[R]) -> Reader[R]:
    """Reads a dataclass (`make`), or returns a TypedDict or a list of plain values as it is."""
    return partial(make, kind) if is_dataclass(kind) else lambda value: cast("R", value)


def many(kind: type[R]) -> Reader[list[R]]:
    """Reads a list; see `one`."""
    read = one(kind)
    return lambda values: [read(value) for value in values]


def maybe(kind: type[R]) -> Reader[R | None]:
    """Like `one`, for what may be null."""
    read = one(kind)
    return lambda value: None if value is None else read(value)


def nothing(_: object) -> None:
    """Reads what a function returns that returns nothing."""


def row_value(row: Mapping[str, object] | None) -> object:
    """The part of a row that a reader gets: of a row with one column its value, otherwise the row. None: there is no
    row."""
    return next(iter(row.values())) if row is not None and len(row) == 1 else row


@cache
def _names(kind: type) -> frozenset[str]:
    return frozenset(field.name for field in fields(kind))
