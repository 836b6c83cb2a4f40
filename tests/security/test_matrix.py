"""Every function, table, sequence and topic × every kind of caller, against the decisions in decisions.toml."""

from __future__ import annotations

import asyncio
import json
import re
import tomllib
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row
from websockets.asyncio.client import connect

from lab.stack import WORKER_ROLE, Stack
from support import PATIENCE, Library, worker

DECISIONS = tomllib.loads((Path(__file__).parent / "decisions.toml").read_text())
ROLES = ("anon", "authenticated", "service_role", "autotag_worker", "autotag_operator")
MAY_CALL = {
    "users_server_and_operators": {"authenticated", "service_role", "autotag_operator"},
    "users_and_server": {"authenticated", "service_role"}, "users": {"authenticated"}, "server": {"service_role"},
    "server_and_workers": {"service_role", "autotag_worker"}, "workers": {"autotag_worker"}, "operators": {"autotag_operator"},
    "server_workers_and_operators": {"service_role", "autotag_worker", "autotag_operator"},
    "workers_and_operators": {"autotag_worker", "autotag_operator"}, "nobody": set(),
}  # fmt: skip
CALLERS = ("anon", "member", "stranger", "service", "worker")


def rows(stack: Stack, statement: str) -> list[dict[str, Any]]:
    with psycopg.connect(stack.database_url(), row_factory=dict_row) as connection:
        return connection.execute(statement).fetchall()  # type: ignore[arg-type]


def test_functions(stack: Stack) -> None:
    """Every function has a decision, and every decision a function. Overloads share a decision."""
    found: dict[str, set[str]] = {}
    for row in rows(stack, """
        select n.nspname || '.' || p.proname as name, array_remove(array[
          case when has_function_privilege('anon', p.oid, 'execute') then 'anon' end,
          case when has_function_privilege('authenticated', p.oid, 'execute') then 'authenticated' end,
          case when has_function_privilege('service_role', p.oid, 'execute') then 'service_role' end,
          case when has_function_privilege('autotag_worker', p.oid, 'execute') then 'autotag_worker' end,
          case when has_function_privilege('autotag_operator', p.oid, 'execute') then 'autotag_operator' end], null) as may
        from pg_proc p join pg_namespace n on n.oid = p.pronamespace
        where n.nspname in ('autotag', 'public')"""):  # fmt: skip
        found.setdefault(row["name"], set()).update(row["may"])
    decided = {name: MAY_CALL[group] for group, names in DECISIONS["functions"].items() for name in names}
    assert set(found) == set(decided), "functions without a decision, or decisions without a function"
    assert found == decided


def test_users_reach_autotag_only_by_the_wrappers(stack: Stack) -> None:
    """In the schema autotag, users may execute only functions that a public wrapper calls, and functions in policies."""
    wrapped: set[str] = set()
    for row in rows(stack, """select p.prosrc, p.prosecdef, has_function_privilege('authenticated', p.oid, 'execute') as users
                              from pg_proc p where p.pronamespace = 'public'::regnamespace"""):  # fmt: skip
        assert not row["prosecdef"], "a security definer in an exposed schema"
        if row["users"]:
            wrapped |= set(re.findall(r"\bautotag\.\w+", row["prosrc"]))
    # What one of these does as its caller, the caller has to be allowed.
    for row in rows(stack, """select 'autotag.' || p.proname as name, p.prosrc from pg_proc p
                              where p.pronamespace = 'autotag'::regnamespace and not p.prosecdef"""):  # fmt: skip
        if row["name"] in wrapped:
            wrapped |= set(re.findall(r"\bautotag\.\w+", row["prosrc"]))
    wrapped -= {"autotag.asset_id", "autotag.workspace_id", "autotag.user_id"}  # types
    groups = ("users_server_and_operators", "users_and_server", "users")
    allowed = {n for group in groups for n in DECISIONS["functions"][group] if "autotag." in n}
    assert allowed == wrapped | set(DECISIONS["functions"]["users"])


def test_tables_and_sequences(stack: Stack) -> None:
    found = rows(stack, """
        select c.oid::regclass::text as name, c.relkind::text as kind,
          c.relrowsecurity or 'security_invoker=true' = any (c.reloptions) as secured, n.nspname as schema,
          coalesce((select jsonb_object_agg(x.role, x.rights) from (
            select r.rolname as role, array_agg(distinct lower(a.privilege_type)) as rights
            from aclexplode(c.relacl) a join pg_roles r on r.oid = a.grantee
            where r.rolname = any (array['anon', 'authenticated', 'service_role', 'autotag_worker', 'autotag_operator']) group by 1) x), '{}') as may,
          (select count(*) from aclexplode(c.relacl) a where a.grantee = 0) as to_public
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where n.nspname in ('autotag', 'public') and c.relkind in ('r', 'p', 'v', 'm', 'S', 'f')""")  # fmt: skip
    tables = DECISIONS["tables"]
    for row in found:
        name = row["name"] if "." in row["name"] else f"public.{row['name']}"
        expected: dict[str, set[str]] = {}
        if name in tables["users_read"]:
            expected["authenticated"] = {"select"} | ({"delete"} if name in tables["users_delete"] else set())
        else:
            assert name in tables["nobody"], f"{name} has no decision"
        may = {role: set(rights) for role, rights in row["may"].items()}
        if name in tables["server_all"]:
            assert {"select", "insert", "update", "delete"} <= may.pop("service_role")
        assert may == expected, name
        assert row["to_public"] == 0, name
        assert row["secured"] or row["kind"] == "S", f"{name} has no row level security"
    names = {row["name"] if "." in row["name"] else f"public.{row['name']}" for row in found}
    assert names == set(tables["users_read"]) | set(tables["nobody"]), "a decision without its object"
    columns = rows(stack, """
        select c.relname, a.attname, r.rolname as role, x.privilege_type as right
        from pg_class c join pg_attribute a on a.attrelid = c.oid, aclexplode(a.attacl) x join pg_roles r on r.oid = x.grantee
        where c.relnamespace in ('public'::regnamespace, 'autotag'::regnamespace)""")  # fmt: skip
    assert {(f"public.{c['relname']}.{c['attname']}", c["role"], c["right"]) for c in columns} == {
        (name, "authenticated", right)
        for right, names in (("INSERT", tables["users_insert"]), ("UPDATE", tables["users_update"]))
        for name in names
    }


# -- and what really happens when each of them calls


def act_as(stack: Stack, caller: str, member: str, stranger: str) -> psycopg.Connection[Any]:
    """A connection with the role and claims of a caller, as PostgREST (or a worker) would have it."""
    if caller == "worker":
        return psycopg.connect(stack.database_url(WORKER_ROLE))
    connection = psycopg.connect(stack.database_url("authenticator"))
    role = {"anon": "anon", "service": "service_role"}.get(caller, "authenticated")
    claims = {"role": role, **({"sub": member if caller == "member" else stranger} if role == "authenticated" else {})}
    connection.execute(
        "select set_config('request.jwt.claims', %s, false), set_config('role', %s, false)", (json.dumps(claims), role)
    )
    return connection


DENIED = "42501"
#: RPC -> arguments of the member's own, and what each caller gets: ok, or an sqlstate.
RPCS: dict[str, tuple[Callable[[dict[str, str]], tuple[str, tuple[object, ...]]], dict[str, str]]] = {
    "public.enqueue_tagging": (lambda of: ("%s::uuid[]", ([of["asset"]],)),
                               {"member": "ok", "stranger": "PT404", "service": "ok"}),
    "public.cancel_tagging": (lambda of: ("%s", (of["job"],)), {"member": "ok", "stranger": "PT404", "service": "ok"}),
    "public.retry_tagging": (lambda of: ("%s", (of["failed"],)), {"member": "ok", "stranger": "PT404", "service": "ok"}),
    "public.tagging_job": (lambda of: ("%s", (of["job"],)), {"member": "ok", "stranger": "PT404", "service": "ok"}),
    "public.tagging_jobs": (lambda of: ("%s", (of["workspace"],)), {"member": "ok", "stranger": "PT403", "service": "ok"}),
    "public.tagging_strategy": (lambda of: ("5", ()), {"member": "ok", "stranger": "ok", "service": "ok"}),
    "public.check_rate_limit": (lambda of: ("%s, 'realtime', 1", (of["workspace"],)),
                                {"member": "PT403", "stranger": "PT403", "service": "ok"}),
    "public.peek_rate_limit": (lambda of: ("%s, 'realtime', 1", (of["workspace"],)),
                               {"member": "ok", "stranger": "PT403", "service": "ok"}),
    "public.tagging_usage": (lambda of: ("%s", (of["workspace"],)),
                             {"member": "ok", "stranger": "PT403", "service": "ok"}),
    "public.tagging_vocabulary": (lambda of: ("%s", (of["workspace"],)),
                                  {"member": "ok", "stranger": "PT403", "service": "ok"}),
    "public.set_tagging_vocabulary": (lambda of: ("%s, '[]'", (of["workspace"],)),
                                      {"member": "PT403", "stranger": "PT403", "service": "ok"}),
    "public.edit_tagging_vocabulary": (lambda of: ("%s", (of["workspace"],)),
                                       {"member": "PT403", "stranger": "PT403", "service": "ok"}),
    "public.tagging_profile": (lambda of: ("%s", (of["workspace"],)),
                               {"member": "ok", "stranger": "PT403", "service": "ok"}),
    "public.set_tagging_profile": (lambda of: ("%s, '{}'", (of["workspace"],)),
                                   {"member": "PT403", "stranger": "PT403", "service": "ok"}),
    "public.openai_webhook": (lambda of: ("'wh_1', 'batch.completed', 'batch_1'", ()), {"service": "ok"}),
}  # fmt: skip


@pytest.mark.parametrize("function", RPCS)
def test_each_rpc_for_each_caller(library: Library, function: str) -> None:
    stack = library.stack
    stranger = stack.add_member("stranger")
    [asset, other] = library.insert(["a.jpg", "b.jpg"])
    job = library.enqueue([other])["job_id"]
    failed = library.enqueue(library.insert(["c.jpg"]))["job_id"]
    library.rpc("public.cancel_tagging", failed)
    of = {"asset": asset, "job": job, "failed": failed, "workspace": library.member.workspace}
    arguments, expected = RPCS[function]
    for caller in CALLERS:
        places, values = arguments(of)
        with act_as(stack, caller, library.member.user, stranger.user) as connection:
            try:
                connection.execute(f"select {function}({places})", values)  # type: ignore[arg-type]
                outcome = "ok"
            except psycopg.Error as error:
                outcome = str(error.sqlstate)
            connection.rollback()
        assert outcome == expected.get(caller, DENIED), f"{function} by {caller}"


def test_every_rpc_is_in_the_list_above(stack: Stack) -> None:
    called = (names for group, names in DECISIONS["functions"].items() if group != "nobody")
    assert {name for names in called for name in names if name.startswith("public.")} == set(RPCS)


@pytest.mark.parametrize("table", DECISIONS["tables"]["users_read"])
def test_rows_of_a_workspace_are_its_members(library: Library, table: str) -> None:
    stack = library.stack
    stranger = stack.add_member("stranger")
    library.insert(["a.jpg"])
    library.sql("select public.check_rate_limit(%s, 'realtime', 1)", library.member.workspace)
    seen: dict[str, Any] = {}
    for caller in CALLERS:
        key = "id" if table == "public.workspaces" else "workspace_id"
        with act_as(stack, caller, library.member.user, stranger.user) as connection:
            try:
                row = connection.execute(
                    f"select count(*) from {table} where {key} = %s",  # type: ignore[arg-type]
                    (library.member.workspace,),
                ).fetchone()
                seen[caller] = row[0] if row else None
            except psycopg.Error as error:
                seen[caller] = error.sqlstate
    assert seen == {"anon": DENIED, "member": 1, "stranger": 0, "service": 1, "worker": DENIED}


def test_a_member_adds_only_rows_that_name_their_own_folder(library: Library, stack: Stack) -> None:
    other = stack.add_member("other")
    own = library.member.workspace
    for workspace, path, works in (
        (own, f"{own}/a.jpg", True), (own, f"{other.workspace}/theirs.jpg", False), (own, f"{own}/../x.jpg", False),
        (other.workspace, f"{other.workspace}/a.jpg", False),
    ):  # fmt: skip
        with act_as(stack, "member", library.member.user, other.user) as connection:
            try:
                connection.execute(
                    "insert into public.assets (workspace_id, storage_path) values (%s, %s)", (workspace, path)
                )
                assert works, path
            except psycopg.errors.InsufficientPrivilege:
                assert not works, path
            connection.rollback()


def test_the_workers_login_is_nothing_but_autotag_worker(stack: Stack) -> None:
    """The login with which every test of this suite runs workers has only the role autotag_worker."""
    [login] = rows(stack, f"""
        select r.rolsuper, r.rolcreaterole, r.rolcreatedb, r.rolbypassrls, array(
          select m.roleid::regrole::text from pg_auth_members m where m.member = r.oid) as roles
        from pg_roles r where r.rolname = '{WORKER_ROLE}'""")  # fmt: skip
    assert login == {
        "rolsuper": False, "rolcreaterole": False, "rolcreatedb": False, "rolbypassrls": False, "roles": ["autotag_worker"],
    }  # fmt: skip
    assert WORKER_ROLE in stack.worker_environment()["DATABASE_URL"]


# -- topics


async def join(stack: Stack, token: str, topic: str, *, private: bool) -> tuple[Any, str]:
    """Joins a topic. Returns the websocket, and the status of the join."""
    base = stack.supabase_url.replace("http", "ws")
    socket = await connect(f"{base}/realtime/v1/websocket?apikey={stack.anon_key}&vsn=2.0.0")
    config = {"private": private, "broadcast": {"ack": True, "self": False}}
    payload = {"config": config, **({"access_token": token} if token else {})}
    await socket.send(json.dumps(["1", "1", f"realtime:{topic}", "phx_join", payload]))
    return socket, json.loads(await socket.recv())[4]["status"]


async def test_each_topic_for_each_caller(library: Library) -> None:
    stack = library.stack
    stranger = stack.add_member("stranger")
    tokens = {"anon": "", "member": library.member.token, "stranger": stranger.token, "service": stack.secret_key}
    own, nobodys = f"tagging:{library.member.workspace}", f"tagging:{uuid.uuid4()}"
    expected = {
        ("batch-updates", False): {"anon", "member", "stranger", "service"},
        (own, True): {"member", "service"},
        (nobodys, True): {"service"},
        ("tagging:not-a-uuid", True): {"service"},
        ("batch-updates", True): {"service"},
    }
    for (topic, private), welcome in expected.items():
        for caller, token in tokens.items():
            socket, status = await join(stack, token, topic, private=private)
            await socket.close()
            assert (status == "ok") == (caller in welcome), f"{topic} (private: {private}) by {caller}"


async def test_members_cannot_speak_in_autotags_name(library: Library) -> None:
    """A member may listen to the private topic, but messages that they send there reach nobody."""
    stack, topic = library.stack, f"tagging:{library.member.workspace}"
    listener, _ = await join(stack, library.member.token, topic, private=True)
    speaker, _ = await join(stack, library.member.token, topic, private=True)
    forged = {"type": "broadcast", "event": "job-complete", "payload": {"job_id": "forged"}}
    await speaker.send(json.dumps(["1", "2", f"realtime:{topic}", "broadcast", forged]))
    await speaker.send(json.dumps([None, "3", "phoenix", "heartbeat", {}]))
    async with asyncio.timeout(PATIENCE):
        while json.loads(await speaker.recv())[1] != "3":
            pass
        rows(stack, "select 1")
        library.sql("""select realtime.send('{"job_id": "real"}'::jsonb, 'job-complete', %s, true)""", topic)
        told = await listener.recv()
    assert isinstance(told, bytes)
    assert b'"real"' in told
    await listener.close()
    await speaker.close()


async def test_the_main_job_works_with_the_workers_login_alone(library: Library) -> None:
    """Single calls and batches work with no other privileges than those of autotag_worker."""
    assets = await library.upload(55)
    async with worker(library.stack):
        await library.finished(library.enqueue(assets))
    library.check_tags()


@pytest.mark.parametrize("caller", ["member", "service"])
def test_too_many_images_are_refused_before_anything_looks_at_them(library: Library, caller: str) -> None:
    stack = library.stack
    job = library.enqueue(library.insert([f"{library.member.workspace}/{n}.jpg" for n in range(3)]))["job_id"]
    library.rpc("public.cancel_tagging", job)
    stack.configure(
        realtime_max_images=1, chunk_max_images=1, chunk_size=1, express_images=0, batch_max_images=2, job_max_images=2
    )
    with psycopg.connect(stack.database_url("supabase_admin"), autocommit=True) as owner:
        owner.execute("""create or replace function autotag.hidden_files(p_asset_ids autotag.asset_id[]) returns uuid[] language plpgsql
                         set search_path = pg_catalog, pg_temp as 'begin raise exception ''looked at''; end'""")
    ids = [str(uuid.uuid4()) for _ in range(3)]
    for statement, value in (("public.enqueue_tagging(%s::uuid[])", ids), ("public.retry_tagging(%s)", job)):
        with act_as(stack, caller, library.member.user, str(uuid.uuid4())) as connection:
            with pytest.raises(psycopg.Error) as refused:
                connection.execute(f"select {statement}", (value,))  # type: ignore[arg-type]
            connection.rollback()
        assert refused.value.sqlstate == "PT413"
