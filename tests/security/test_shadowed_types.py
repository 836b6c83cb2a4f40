"""No code of a caller runs with another login's rights.

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
from dataclasses import dataclass
from typing import Any

import psycopg
import pytest
from psycopg import sql

import autotag
from lab.stack import OPERATOR_ROLE, WORKER_ROLE
from support import Library, base_type

SPY = "ran as another"
SHARE = 0.8  # of the functions of each role that have to return
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
    """Creates a domain in pg_temp with the name of each type. Returns the types for which that was possible."""
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


def callable_functions(connection: psycopg.Connection[Any]) -> list[tuple[str, dict[str, str]]]:
    """The functions that this role may call: name, and the types of the arguments by their names."""
    rows = connection.execute("""
        select p.oid::pg_catalog.regproc::pg_catalog.text, array(
          -- of an id, the type that its domain is made of
          select pg_catalog.format_type(coalesce(nullif(d.typbasetype, 0), d.oid), null)
          from pg_catalog.unnest(p.proargtypes) with ordinality a (t, i) join pg_catalog.pg_type d on d.oid = a.t order by i),
          coalesce(p.proargnames, '{}')
        from pg_catalog.pg_proc p join pg_catalog.pg_namespace n on n.oid = p.pronamespace
        where n.nspname in ('autotag', 'public') and p.prorettype <> 'pg_catalog.trigger'::pg_catalog.regtype
          and pg_catalog.has_function_privilege(p.oid, 'execute')""")
    # Now that they are shadowed, Postgres names the schema of its own types.
    return [
        (
            str(name),
            {
                n: base_type(kind.removeprefix("pg_catalog.").removeprefix("public."))
                for n, kind in zip(names, types, strict=False)
            },
        )
        for name, types, names in rows
    ]


@dataclass(frozen=True)
class Scene:
    """The things that a worker holds, and an upload that has failed."""

    library: Library
    asset: str
    job: str
    failed: str
    batch: str
    task: dict[str, Any]

    def values(self, name: str, kind: str) -> list[Any]:
        """Values for an argument with which a function does some work."""
        result = {"tags": ["x"], "confidence": {"x": 1}, "caption": "c", "model": "m"}
        report = {**self.task, "result": result, "usage": {"input": 10, "cached": 0, "output": 5}, "called": True}
        error = {"kind": "transient", "code": "x", "message": "m", "retry_after": 1}
        seen = {"requests_limit": 500, "requests_left": 400, "retry_after": 1, "sent": 1, "sent_age": 0.1}
        named = {
            "p_worker": [WORKER], "p_batch": [self.batch], "p_job_id": [self.job, self.failed], "job_id": [self.job, self.failed],
            "p_version": [autotag.__version__], "p_event_type": ["batch.completed"], "p_topic": [f"tagging:{self.library.member.workspace}"],
            "p_state": ["uploading"], "p_visible_marks": [[]], "p_report": [json.dumps({**report, "reserved": 1, "cap": 1})], "topic": [f"tagging:{self.library.member.workspace}"],
            "p_entries": ['[{"tag": "x"}]'], "entries": ['[{"tag": "x"}]'], "p_counts": ['{"x": 1}'],
            "p_model": ["gpt-6-luna"], "p_effort": ["none"], "p_after": [None],
        }  # fmt: skip
        kinds: dict[str, list[Any]] = {
            "uuid": [self.library.member.workspace], "uuid[]": [[self.asset]], "bigint[]": [[1]], "text[]": [["x"]],
            "integer": [1], "bigint": [1], "boolean": [True], "double precision": [0.1], "text": ["realtime", "preparing"], "tagging_request_type": ["realtime"],
            "date": ["2026-01-01"], "jsonb": [json.dumps([report]), json.dumps([{**self.task, "stage": "processing", "error": error}]),
                                              json.dumps(error), json.dumps(seen)],
        }  # fmt: skip
        return named.get(name, kinds.get(kind, [None]))


WORKER = "00000000-0000-4000-8000-00000000000a"


def call_everything(scene: Scene, connection: psycopg.Connection[Any]) -> tuple[int, set[str], list[str]]:
    """Calls each function a few times with fitting values, and undoes each call. Returns the number of functions, the
    functions that returned, and the errors of the others."""
    functions = callable_functions(connection)
    returned: set[str] = set()
    errors: list[str] = []
    for name, types in functions:
        choices = [scene.values(argument, kind) for argument, kind in types.items()]
        for turn in range(max([len(choice) for choice in choices], default=1)):
            values = [choice[turn % len(choice)] for choice in choices]
            places = ", ".join(f"%s::{schema(kind)}.{quoted(kind)}" for kind in types.values())
            try:
                with connection.transaction(force_rollback=True):
                    connection.execute(f"select {name}({places})".encode(), values)
                    returned.add(name)
            except psycopg.Error as error:
                errors.append(f"{name}: {error.sqlstate} {error.diag.message_primary}")
    return len(functions), returned, [error for error in errors if error.split(":")[0] not in returned]


def schema(kind: str) -> str:
    """The schema of a type. The enums of public calls are in an exposed schema, in which users cannot create
    anything."""
    return "public" if kind.startswith("tagging_") else "pg_catalog"


def quoted(kind: str) -> str:
    """A type's own name, which nobody can shadow."""
    own = {"integer": "int4", "bigint": "int8", "boolean": "bool", "double precision": "float8",
           "timestamp with time zone": "timestamptz"}  # fmt: skip
    plain = kind.removesuffix("[]")
    return f'"{own.get(plain, plain)}"{kind.removeprefix(plain)}'


def set_the_scene(library: Library) -> Scene:
    library.stack.prove()
    library.sql("""create or replace function autotag.is_editor(p_workspace_id autotag.workspace_id) returns boolean
      language sql stable security definer set search_path = pg_catalog, public, extensions, pg_temp
      as $$ select autotag.is_member(p_workspace_id) $$""")  # so that members get that far
    folder = library.member.workspace
    [asset] = library.insert([f"{folder}/a.jpg"])
    failed = library.enqueue(library.insert([f"{folder}/b.jpg"]))["job_id"]
    library.rpc("public.cancel_tagging", failed)
    library.enqueue(library.insert([f"{folder}/{n}.jpg" for n in range(60)]))
    job = library.enqueue([asset])["job_id"]
    with psycopg.connect(library.stack.database_url(WORKER_ROLE)) as connection:
        connection.execute("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", (WORKER,))
        [[ids]] = connection.execute("select tasks from autotag.claim(%s, 1, 1)", (WORKER,)).fetchall()
        [[[task]]] = connection.execute("select autotag.describe_tasks(%s, %s)", (WORKER, ids)).fetchall()
        [[[batch]]] = connection.execute("select batches from autotag.claim_batches(%s, 1, 1)", (WORKER,)).fetchall()
    held = {"task": task["task"], "attempt": task["attempt"]}
    return Scene(library, asset, job, failed, batch["batch"], held)


def spied(library: Library, login: str, role: str | None) -> tuple[list[str], int, int, set[str]]:
    """Calls everything. Returns the spy's messages, the number of shadowed types, the number of functions, and the
    functions that returned."""
    scene = set_the_scene(library)
    seen: list[str] = []
    with caller(library, login, role) as connection:
        connection.add_notice_handler(lambda notice: seen.append(notice.message_primary or ""))
        types = shadow_everything(connection)
        functions, returned, errors = call_everything(scene, connection)
    print(f"{len(returned)} of {functions} functions returned", *errors, sep="\n")
    return [line for line in seen if SPY in line], len(types), functions, returned


@pytest.mark.parametrize("who", ROLES)
def test_no_shadowed_type_runs_anything_as_somebody_else(library: Library, who: str) -> None:
    found, types, functions, returned = spied(library, *ROLES[who])
    assert found == []
    assert types > 60, "nearly every type of Postgres is shadowed"
    assert functions == 0 if who == "anon" else functions > 10
    assert len(returned) >= SHARE * functions, f"only these did anything: {sorted(returned)}"


def test_the_spy_sees_a_function_that_looks_in_pg_temp_first(library: Library) -> None:
    """Proves that the spy works: with an empty search_path, the same calls run the caller's code as the owner."""
    functions = library.sql(
        "select p.oid::regprocedure::text as name from pg_proc p where pronamespace = 'autotag'::regnamespace"
    )
    for function in functions:
        library.sql(f"alter function {function['name']} set search_path = ''")
    found, _, _, _ = spied(library, *ROLES["a worker's login"])
    assert any(line.startswith(f"{SPY}: ") and line.endswith(" by jsonb") for line in found), found[:5]
