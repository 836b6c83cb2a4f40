"""Nothing of a caller's runs as anybody else.

Whoever may create temporary objects can put types of their own, with a CHECK that calls their function, where a function
looks for jsonb or uuid. This calls every function that a role may call, with every type of Postgres shadowed, and listens
for a CHECK that ran as somebody else. New functions and types are included by themselves.

A function that stops at its first line shows nothing of its body, so here a share of them has to return. What proves it for
every line of every function is tests/sql/test_sql.py: each has a fixed search_path in which pg_temp comes last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from psycopg import sql

from lab.stack import OPERATOR_ROLE, WORKER_ROLE
from support import Library

SPY = "ran as another"
SHARE = 0.7  # of the functions of each role that have to return
#: How each role comes in: the login, and the role that it becomes.
ROLES = {
    "a worker's login": (WORKER_ROLE, None), "an operator's login": (OPERATOR_ROLE, None), "anon": ("authenticator", "anon"),
    "a signed-in user": ("authenticator", "authenticated"), "the service role": ("authenticator", "service_role"),
}  # fmt: skip
#: Types that cannot be the base of a domain or stand for nothing in particular.
LEFT_OUT = "typtype in ('b', 'r', 'm') and typname !~ '^_|^any|unknown|^pg_|^reg|internal|trigger|handler'"


@contextmanager
def caller(library: Library, login: str, role: str | None) -> Iterator[psycopg.Connection[Any]]:
    """A connection as the role, with the claims of the library's member."""
    with psycopg.connect(library.stack.database_url(login), autocommit=True) as connection:
        claims = {"sub": library.member.user, "role": role or "authenticated"}
        if role:
            connection.execute("select set_config('request.jwt.claims', %s, false)", (json.dumps(claims),))
            connection.execute(sql.SQL("set role {}").format(sql.Identifier(role)))
        yield connection


def shadow_everything(connection: psycopg.Connection[Any]) -> list[str]:
    """A domain in pg_temp in the place of each type; the types that could be shadowed."""
    connection.execute("""
        create function pg_temp.spy(p_type text) returns boolean language plpgsql as $$
        begin
          if current_user <> coalesce(nullif(current_setting('role'), 'none'), session_user) then
            raise warning 'ran as another: % by %', current_user, p_type;
          end if;
          return true;
        end $$""")
    names = [row[0] for row in connection.execute(
        f"select typname from pg_catalog.pg_type where typnamespace = 'pg_catalog'::regnamespace and {LEFT_OUT}".encode())]  # fmt: skip
    shadowed = []
    for name in names:
        try:
            connection.execute(
                sql.SQL("create domain pg_temp.{0} as pg_catalog.{0} check (pg_temp.spy({1}))").format(
                    sql.Identifier(name), sql.Literal(name)
                )
            )
            shadowed.append(name)
        except psycopg.Error:
            continue
    return shadowed


def callable_functions(connection: psycopg.Connection[Any]) -> list[tuple[str, list[str]]]:
    """The functions that this role may call, with the types of what they take."""
    rows = connection.execute("""
        select p.oid::pg_catalog.regproc::pg_catalog.text, array(
          select pg_catalog.format_type(t, null) from pg_catalog.unnest(p.proargtypes) with ordinality a (t, i) order by i)
        from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
        where n.nspname in ('autotag', 'public') and p.prorettype <> 'pg_catalog.trigger'::pg_catalog.regtype
          and pg_catalog.has_function_privilege(p.oid, 'execute')""")
    return [(str(name), list(types)) for name, types in rows]


def arguments(library: Library, asset: str, task: dict[str, Any], kind: str) -> list[Any]:
    """Values that get a function to do something, for a type."""
    result = {"tags": ["x"], "confidence": {"x": 1}, "caption": "c", "model": "m"}
    usage = {"input": 10, "cached": 0, "output": 5}
    report = {**task, "result": result, "usage": usage, "called": True}
    error = {"kind": "transient", "code": "x", "message": "m", "retry_after": 1}
    seen = {"requests_limit": 500, "requests_left": 400, "retry_after": 1, "sent": 1, "sent_age": 0.1}
    values: dict[str, list[Any]] = {
        "uuid": [library.member.workspace, asset, WORKER], "uuid[]": [[asset]], "bigint[]": [[1]], "text[]": [["x"]],
        "integer": [1], "bigint": [1], "boolean": [True], "double precision": [0.1], "text": ["realtime", "preparing", "0.1.0"],
        "date": ["2026-01-01"], "jsonb": [json.dumps([report]), json.dumps([{**task, "stage": "processing", "error": error}]),
                                          json.dumps(error), json.dumps(seen)],
    }  # fmt: skip
    return values.get(kind, [None])


WORKER = "00000000-0000-4000-8000-00000000000a"


def call_everything(
    library: Library, connection: psycopg.Connection[Any], asset: str, task: dict[str, Any]
) -> tuple[int, set[str]]:
    """Calls each function a few times with values that fit; how many functions there were, and which of them returned."""
    functions = callable_functions(connection)
    returned: set[str] = set()
    for name, types in functions:
        choices = [arguments(library, asset, task, kind) for kind in types]
        for turn in range(max([len(choice) for choice in choices], default=1)):
            values = [choice[turn % len(choice)] for choice in choices]
            places = ", ".join(f"%s::{kind if '[]' in kind else f'pg_catalog.{quoted(kind)}'}" for kind in types)
            try:
                connection.execute(f"select {name}({places})".encode(), values)
                returned.add(name)
            except psycopg.Error:
                continue  # it was refused
    return len(functions), returned


def quoted(kind: str) -> str:
    """A type's own name, which nobody can shadow."""
    own = {"integer": "int4", "bigint": "int8", "boolean": "bool", "double precision": "float8",
           "timestamp with time zone": "timestamptz"}  # fmt: skip
    return f'"{own.get(kind, kind)}"'


def spied(library: Library, login: str, role: str | None) -> tuple[list[str], int, int, set[str]]:
    """What the spy saw, of how many types and functions, and the functions that returned."""
    library.stack.prove()
    [asset] = library.insert([f"{library.member.workspace}/a.jpg"])
    library.enqueue([asset])
    with psycopg.connect(library.stack.database_url(WORKER_ROLE)) as connection:
        connection.execute("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", (WORKER,))
        [[[task]]] = connection.execute("select tasks from autotag.claim(%s, 1)", (WORKER,)).fetchall()
    seen: list[str] = []
    with caller(library, login, role) as connection:
        connection.add_notice_handler(lambda notice: seen.append(notice.message_primary or ""))
        types = shadow_everything(connection)
        functions, returned = call_everything(library, connection, asset, {"task": task["task"], "attempt": task["attempt"]})
    return [line for line in seen if SPY in line], len(types), functions, returned


@pytest.mark.parametrize("who", ROLES)
def test_no_shadowed_type_runs_anything_as_somebody_else(library: Library, who: str) -> None:
    found, types, functions, returned = spied(library, *ROLES[who])
    print(functions, sorted(returned))
    assert found == []
    assert types > 60, "nearly every type of Postgres is shadowed"
    assert functions == 0 if who == "anon" else functions > 10
    assert len(returned) >= SHARE * functions, f"only these did anything: {sorted(returned)}"


def test_the_spy_sees_a_function_that_looks_in_pg_temp_first(library: Library) -> None:
    """With the search_path that was there before, the same calls run the caller's code as the owner."""
    functions = library.sql(
        "select p.oid::regprocedure::text as name from pg_proc p where pronamespace = 'autotag'::regnamespace"
    )
    for function in functions:
        library.sql(f"alter function {function['name']} set search_path = ''")
    found, _, _, _ = spied(library, *ROLES["a worker's login"])
    assert any(line.startswith(f"{SPY}: ") and line.endswith(" by jsonb") for line in found), found[:5]
