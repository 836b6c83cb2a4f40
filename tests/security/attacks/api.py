"""Attempts of any holder of a key. They are generated from the catalogue, so they include new functions and tables."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from itertools import cycle
from typing import Any

import jwt

from attacks.attempt import ANY, DENIED, MEANT, REFUSED, UNSEEN, Attempt, http, sql
from attacks.scene import Scene
from support import base_type

INJECTIONS = (
    "'; drop table public.assets; --",
    "$$; select pg_sleep(9); --",
    '") or 1=1 --',
    "%00",
    "\u0000",
    "\x1b[2J\r\n",
)
LONG = "x" * 200_000
#: Values for an argument of a type: what no caller should get anything by.
HOSTILE: dict[str, list[Any]] = {
    "uuid": [None, "", "not-a-uuid", LONG, *INJECTIONS, 7, True, {}, [], {"id": "x"}, str(uuid.uuid4()), "urn:uuid:1"],
    "uuid[]": [
        None, [], [None], "", "{}", "not-a-list", [[str(uuid.uuid4())]], [str(uuid.uuid4()), None], [1], [True], {"a": 1},
        [[[]]], [LONG], *[[text] for text in INJECTIONS], [str(uuid.UUID(int=i)) for i in range(50_001)],
        [str(uuid.UUID(int=i)) for i in range(500)], [str(uuid.UUID(int=5))] * 2000,
    ],
    "integer": [None, 0, -1, -(2**31), 2**31, 2**63, 2**70, 1.5, 1e308, "", "1 or 1=1", LONG, [], {}, True, 50_001,
                "NaN", "Infinity", *INJECTIONS],
    "text": [None, "", LONG, 7, [], {}, "REALTIME", "realtime\u0000", "batch.completed", *INJECTIONS],
    "date": [None, "", "infinity", "-infinity", "now", "tomorrow", "0001-01-01 BC", "5874897-12-31", "5874898-01-01",
             "2026-02-30", 7, [], LONG, *INJECTIONS],
}  # fmt: skip
#: RPCs that tell everybody who is signed in the same, and name nobody.
OPEN = {"tagging_strategy", "describe_strategy", "check_image_count"}
#: Parts of the RPCs that say nothing of others: they answer about the caller, or read as the caller.
HARMLESS = {
    "is_member", "may_listen", "visible_file_marks", "files_to_check", "visible_assets", "has_to_see", "check_caller",
}  # fmt: skip
SCHEMAS = ("autotag", "storage", "auth", "realtime", "cron", "extensions", "pg_catalog", "information_schema",
           "supabase_migrations", "vault", "", "PUBLIC", "public,autotag", "\"autotag\"", "public\x00")  # fmt: skip


KEYS = ("id", "workspace_id")  # a public table without them is a view that stands for the type of a result

WAYS_EACH = 12  # of those below, for each function


def _ways() -> Iterator[tuple[str, dict[str, Any]]]:
    """An endless repetition of unusual forms of a request to PostgREST."""
    more = ("p_workspace_id", "role", "p_user_id", "__proto__", "request_type; drop")
    selects = ("*", "*,workspaces(*)", "auth.users(*)", "tags", "cost::text", "(select 1)", "count()")
    prefers = (
        "tx=rollback",
        "params=single-object",
        "count=exact",
        "return=representation",
        "resolution=merge-duplicates",
    )
    accepts = (
        "text/csv",
        "application/vnd.pgrst.plan+text",
        "application/vnd.pgrst.object+json",
        "application/octet-stream",
    )
    bodies = ("", "[]", "null", "7", "{", '{"a": }', "\x00", "[" * 400 + "]" * 400, '{"asset_ids": ' * 3000)
    headers = ("x-forwarded-for", "traceparent", "request.jwt.claims", "x-client-info", "role", "cookie")
    yield from cycle([
        *((f"with {name} more", {"more": {name: str(uuid.UUID(int=3))}}) for name in more),
        *((f"selecting {select}", {"query": f"select={select}"}) for select in selects),
        *((f"preferring {prefer}", {"headers": {"prefer": prefer}}) for prefer in prefers),
        *((f"accepting {accept}", {"headers": {"accept": accept}}) for accept in accepts),
        *((f"with the body {content[:12]!r}", {"content": content}) for content in bodies),
        *((f"with the header {name}", {"headers": {name: "00-" + "0" * 32 + "-x; role=service_role"}}) for name in headers),
    ])  # fmt: skip


def functions(scene: Scene, schema: str = "public") -> list[tuple[str, dict[str, str]]]:
    """The functions of a schema: name, and the types of the arguments by their names."""
    rows = scene.victim.sql(
        """select p.proname as name, array(
             select format_type(t, null) from unnest(p.proargtypes) with ordinality a (t, i) order by i) as types,
             coalesce(p.proargnames, '{}') as names
           from pg_proc p where p.pronamespace = %s::regnamespace and p.prorettype <> 'trigger'::regtype order by 1""",
        schema,
    )
    return [
        (row["name"], dict(zip(row["names"] or map(str, range(9)), map(base_type, row["types"]), strict=False)))
        for row in rows
    ]


def tables(scene: Scene, *schemas: str) -> list[str]:
    rows = scene.victim.sql(
        "select n.nspname || '.' || c.relname as name from pg_class c join pg_namespace n on n.oid = c.relnamespace"
        " where c.relkind in ('r', 'p', 'v', 'm') and n.nspname = any (%s) order by 1",
        list(schemas),
    )
    return [row["name"] for row in rows]


def views(scene: Scene) -> list[str]:
    return [row["name"] for row in scene.victim.sql(
        "select schemaname || '.' || viewname as name from pg_views where schemaname in ('autotag', 'public')")]  # fmt: skip


def columns(scene: Scene) -> dict[str, list[str]]:
    """The columns of each table and view in public."""
    rows = scene.victim.sql("select table_name as name, array_agg(column_name::text order by ordinal_position) as columns"
                            " from information_schema.columns where table_schema = 'public' group by 1 order by 1")  # fmt: skip
    return {row["name"]: row["columns"] for row in rows}


def workspace_key(table: str, names: list[str]) -> str:
    """The column to filter a table by: the one with the workspace, or else any, because a missing column would get an
    error."""
    key = "id" if table == "workspaces" else "workspace_id"
    return key if key in names else names[0]


def theirs(scene: Scene, name: str, kind: str) -> Any:
    """A value for an argument that stands for something of the victim."""
    if kind == "uuid[]":
        return [scene.ids["live asset"], scene.ids["asset"]]
    if kind == "uuid":
        return scene.ids["job" if "job" in name else "asset" if "asset" in name else "workspace"]
    return {
        "integer": 1, "text": "batch" if "batch" in name else "realtime", "date": "2026-01-01", "boolean": False,
        "timestamp with time zone": "2100-01-01T00:00:00Z",
    }.get(kind.removeprefix("public."), "realtime" if kind.endswith("tagging_request_type") else None)  # fmt: skip


def rpcs(scene: Scene, caller: str, *, own: bool = False) -> list[Attempt]:
    """Every RPC × every argument × every hostile value, and PostgREST's forms of request, about the victim's rows or
    the caller's own. The forms are dealt out over the functions, each as often as there are bodies."""
    token, found = scene.token(caller), []
    refused = ANY if own else REFUSED
    ways = _ways()

    def add(name: str, how: str, expect: str, method: str = "POST", **request: Any) -> None:
        if name in OPEN and caller != "anon":
            expect = ANY
        do = http(token, method, f"/rest/v1/rpc/{name}", **request)
        found.append(Attempt(f"{caller} calls {name} {how}", do, expect))

    for name, types in functions(scene):
        base = {argument: theirs(scene, argument, kind) for argument, kind in types.items()}
        if own:
            base = {argument: _owned(scene, caller, argument, value) for argument, value in base.items()}
        add(name, "as it is meant to be", refused if own else MEANT, body=base)
        for argument, kind in types.items():
            for i, value in enumerate(HOSTILE.get(kind, [None, LONG])):
                add(name, f"with hostile {argument} {i}", refused, body={**base, argument: value})
            without = {key: value for key, value in base.items() if key != argument}
            add(name, f"without {argument}", refused, body=without)
        plain = "&".join(f"{argument}={json.dumps(value).strip(chr(34))}" for argument, value in base.items())
        for method in ("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS"):
            expect = refused + r"|405 .*" + (r"|2\d\d .*" if method == "OPTIONS" else "")
            add(name, f"by {method}", expect, method, query=plain)
        for _ in range(WAYS_EACH):
            how, change = next(ways)
            request = {"body": base, **change}
            if "more" in change:
                request = {"body": {**base, **change["more"]}}
            elif "content" in change:
                request = change
            add(name, how, refused, **request)
    for name in ("claim", "settle", "autotag.claim", "is_member", "pg_sleep", "set_config", "send", "jwt", "uid", "query",
                 "register_worker", "set_automatic", "dblink", "lo_export", "pg_read_file", "version", "../assets"):  # fmt: skip
        add(name, "which is not there", REFUSED + r"|200 \[\]", body={})
    return found


def rows(scene: Scene, caller: str) -> list[Attempt]:
    """Attempts at every table, with every verb, filter and preference."""
    columns_of, found = columns(scene), _hidden_rows(scene, caller)
    for table in tables(scene, "public"):
        name = table.removeprefix("public.")
        key = workspace_key(name, columns_of[name])
        found += [*_reads(scene, caller, name, key), *_writes(scene, caller, name, key)]
    return found


def _reads(scene: Scene, caller: str, name: str, key: str) -> list[Attempt]:
    """Attempts to read a table with every filter, and, for a type of results, requests that no rows answer. key: the
    table's column with the workspace."""
    token, own, workspace = scene.token(caller), _own(scene, caller), scene.ids["workspace"]
    nothing = REFUSED if caller == "anon" else UNSEEN
    found: list[Attempt] = []

    def add(how: str, expect: str, method: str, path: str, **request: Any) -> None:
        found.append(Attempt(f"{caller} {method} {how}", http(token, method, f"/rest/v1/{path}", **request), expect))

    if key not in KEYS:  # a type of results: nobody's rows
        add(f"{name} whole", MEANT, "GET", name)
        add(f"{name} with {key}", MEANT, "POST", name, body={key: None})
        add(f"{name} to no {key}", MEANT, "PATCH", name, body={key: None}, query=f"{key}=not.is.null")
        add(f"{name} of any {key}", MEANT, "DELETE", name, query=f"{key}=not.is.null")
    for query in (f"{key}=eq.{workspace}", f"{key}=eq.{workspace}&select={key}", f"{key}=in.({workspace})",
                  f"{key}=not.is.null&{key}=neq.{own}", f"{key}=gt.00000000-0000-0000-0000-000000000000&{key}=neq.{own}"):  # fmt: skip
        add(f"{name}?{query}", nothing + r"|206 \[\]", "GET", name, query=query)
        add(
            f"{name}?{query} counted",
            nothing + r"|206 \[\]",
            "GET",
            name,
            query=query,
            headers={"prefer": "count=exact"},
        )
    for query in ("select=*,workspaces(*)", "select=*,workspace_members(*)", "select=*,users(*)", "or=(id.not.is.null)",
                  "select=tags->>0", "select=(select 1)", "order=tags;drop", "limit=-1", "offset=x", "id=eq.' or 1=1",
                  "select=*&limit=1e9", "tags=cs.{x}", "id=fts.x", "select=pg_sleep(9)", "columns=tags",
                  f"{key}=eq.{LONG[:5000]}", "%00=eq.1", "select=%00"):  # fmt: skip
        add(f"{name}?{query[:30]}", ANY, "GET", name, query=query)
    add(f"{name} heads", ANY, "HEAD", name, headers={"prefer": "count=exact"}, query=f"{key}=eq.{workspace}")
    add(f"{name} options", ANY, "OPTIONS", name)
    for schema in SCHEMAS:
        if "\x00" not in schema and schema not in ("", "public"):
            add(f"{name} of {schema}", r"406 PGRST106", "GET", name, headers={"accept-profile": schema})
    return found


def _writes(scene: Scene, caller: str, name: str, key: str) -> list[Attempt]:
    """Attempts to change a table's rows with every verb and preference. key: its column with the workspace."""
    token, own, workspace = scene.token(caller), _own(scene, caller), scene.ids["workspace"]
    nothing = REFUSED if caller == "anon" else UNSEEN
    asset = scene.ids["asset"]
    found: list[Attempt] = []

    def add(how: str, expect: str, method: str, path: str, **request: Any) -> None:
        found.append(Attempt(f"{caller} {method} {how}", http(token, method, f"/rest/v1/{path}", **request), expect))

    for row in ({key: workspace}, {key: None}, [{key: workspace}] * 2, {}, [], {"nonsense": 1}, {key: INJECTIONS[0]},
                {key: workspace, "tags": ["x"]}, {key: workspace, "user_id": scene.user(caller)},
                {key: workspace, "storage_path": f"{workspace}/x.jpg"}, {key: own, "storage_path": scene.ids["path"]},
                {key: own, "storage_path": f"{own}/x.jpg", "tags": ["x"]}, {"ctid": "(0,1)"}, {key: own, "max_requests": 10**9},
                {key: own, "storage_path": f"{own}/x.jpg", "tagging_stage": "completed"}):  # fmt: skip
        add(f"{name} a row {json.dumps(row)[:60]}", REFUSED + r"|201 -", "POST", name, body=row)
        found[-1] = Attempt(found[-1].name, found[-1].do, REFUSED if row else ANY)
    for prefer in (
        "resolution=merge-duplicates",
        "resolution=ignore-duplicates",
        "return=representation",
        "missing=default",
    ):
        add(f"{name} preferring {prefer}", REFUSED, "POST", name, body={key: workspace}, headers={"prefer": prefer},
            query=f"on_conflict={key}")  # fmt: skip
    add(f"{name} put", REFUSED, "PUT", name, body={key: workspace}, query=f"{key}=eq.{workspace}")
    for change in ({"tags": ["x"]}, {key: own}, {"max_requests": 10**9}, {"tagging_stage": "completed"}, {"name": "x"},
                   {"user_id": scene.user(caller)}, {}, {"nonsense": 1}):  # fmt: skip
        add(
            f"{name} to {json.dumps(change)[:60]}",
            REFUSED + ("|204 -" if (name, *change) == ("assets", "tags") else ""),  # of one's own; here of no row
            "PATCH",
            name,
            body=change,
            query=f"{key}=eq.{workspace}",
        )
    for query in (f"{key}=eq.{workspace}", f"{key}=neq.{own}", f"id=eq.{asset}", f"or=({key}.neq.{own})"):
        for prefer in ("return=representation", "return=minimal"):
            add(
                f"{name}?{query} {prefer}",
                nothing + "|204 -",
                "DELETE",
                name,
                query=query,
                headers={"prefer": prefer},
            )
    return found


def _hidden_rows(scene: Scene, caller: str) -> list[Attempt]:
    """Attempts at tables and functions of schemas that the API does not expose."""
    token = scene.token(caller)
    found: list[Attempt] = []

    def add(how: str, expect: str, method: str, path: str, **request: Any) -> None:
        found.append(Attempt(f"{caller} {method} {how}", http(token, method, f"/rest/v1/{path}", **request), expect))

    for table in [
        *tables(scene, "autotag", "storage", "auth", "realtime"),
        "supabase_migrations.schema_migrations",
        "pg_catalog.pg_authid",
    ]:
        schema, _, name = table.partition(".")
        for method in ("GET", "POST", "PATCH", "DELETE"):
            body = {"body": {"id": 1}} if method in ("POST", "PATCH") else {}
            header = {"accept-profile" if method == "GET" else "content-profile": schema}
            add(f"{table} by its profile", r"406 PGRST106", method, name, headers=header, **body)
            add(f"{table} by name", REFUSED, method, table, **body)
    for profile in ("autotag", "realtime", "storage", "auth"):
        do = http(token, "POST", "/rest/v1/rpc/claim", body={}, headers={"content-profile": profile})
        found.append(Attempt(f"{caller} calls into {profile}", do, r"406 PGRST106"))
    return found


def storage(scene: Scene, caller: str) -> list[Attempt]:
    """Attempts at the victim's files by every route of Storage."""
    token, found = scene.token(caller), []
    path, folder, own = scene.ids["path"], scene.ids["workspace"], _own(scene, caller)
    refused = r"4\d\d .*"

    def add(method: str, where: str, expect: str = refused, **request: Any) -> None:
        do = http(token, method, f"/storage/v1/{where}", **request)
        found.append(
            Attempt(f"{caller} Storage {method} {where[:90]} {json.dumps(request.get('body'))[:60]}", do, expect)
        )

    ways = [
        path, f"{own}/../{path}", f"{own}/%2e%2e/{path}", f"{own}%2f..%2f{path}", f"{own}/..%5c{path}", f"/{path}", f"//{path}",
        path.upper(), path.replace("/", "%2f"), path.replace("/", "\\"), f"./{path}", f"{path}/", f"{path}%00.jpg", f"{path}?x=1",
        f"{own}/../../assets/{path}", f"{folder}/../{path}",
    ]  # fmt: skip
    for way in ways:
        for route in ("object/assets", "object/authenticated/assets", "object/public/assets", "object/info/assets",
                      "render/image/authenticated/assets"):  # fmt: skip
            add("GET", f"{route}/{way}", r"[45]\d\d .*|200 \[\]" if "render" in route else refused)
        add("POST", f"object/sign/assets/{way}", body={"expiresIn": 60})
    for way in ways[:4]:
        for method in ("POST", "PUT"):
            add(method, f"object/assets/{way}", content=b"overwritten", headers={"x-upsert": "true"})
    for prefix in (folder, f"{folder}/", "", "/", f"{own}/../{folder}", "%", "../", folder.upper(), folder[:8]):
        expect = r"200 \[\]|4\d\d .*" if prefix not in ("", "/") else ANY  # one's own folder is seen
        add("POST", "object/list/assets", expect, body={"prefix": prefix, "limit": 1000})
    for prefixes in ([path], [folder], ["%"], [f"{own}/../{path}"], [path] * 500):
        add("DELETE", "object/assets", r"200 \[\]|4\d\d .*", body={"prefixes": prefixes})
    add("POST", "object/sign/assets", ANY, body={"expiresIn": 60, "paths": [path, f"{own}/../{path}"]})
    for bucket in ("private", "assets/../private", "../assets", "", "assets%00", "ASSETS"):
        add("GET", f"object/authenticated/{bucket}/{path}", r"[45]\d\d .*")
    add("POST", "bucket", body={"id": "evil", "name": "evil", "public": True})
    add("POST", "bucket", body={"id": "assets", "name": "assets", "public": True})
    add("PUT", "bucket/assets", r"4\d\d .*|501 .*", body={"public": True})
    add("DELETE", "bucket/assets", r"4\d\d .*|501 .*")
    add("POST", "bucket/assets/empty", r"4\d\d .*|501 .*")
    for verb in ("move", "copy"):
        add("POST", f"object/{verb}", r"4\d\d .*|501 .*",
            body={"bucketId": "assets", "sourceKey": path, "destinationKey": f"{own}/stolen.jpg"})  # fmt: skip
    add("GET", "bucket", r"200 \[\]|4\d\d .*")
    forged = jwt.encode({"url": f"assets/{path}", "exp": time.time() + 60}, "guess" * 8, "HS256")
    for guess in (
        "",
        forged,
        scene.token(caller) or scene.stack.anon_key,
        "a.b.c",
        _unsigned({"url": f"assets/{path}"}),
    ):
        add("GET", f"object/sign/assets/{path}", query=f"token={guess}")
    return found


def tokens(scene: Scene, caller: str) -> list[Attempt]:
    """Attempts with forged tokens, which claim more rights than the caller has."""
    user, victim, found = scene.user(caller), scene.victim.member.user, []
    soon = int(time.time()) + 600
    real = scene.token(caller) or scene.stack.anon_key
    head, body, signature = real.split(".")
    forged = {
        "unsigned": _unsigned({"role": "service_role", "exp": soon}),
        "unsigned, of the victim": _unsigned({"role": "authenticated", "sub": victim, "exp": soon}),
        "signed with another secret": jwt.encode({"role": "service_role"}, "x" * 32, "HS256"),
        "signed with a blank": jwt.encode({"role": "service_role"}, " " * 32, "HS256"),
        "signed with the publishable key": jwt.encode({"role": "service_role"}, scene.stack.anon_key, "HS256"),
        "another algorithm": jwt.encode({"role": "service_role"}, "x" * 64, "HS512"),
        "another body": f"{head}.{_unsigned({'role': 'service_role', 'exp': soon}).split('.')[1]}.{signature}",
        "no signature": f"{head}.{body}.", "two parts": f"{head}.{body}", "four parts": f"{real}.x", "empty parts": "..",
        "words": "service_role", "a secret key's form": "sb_secret_" + "x" * 30, "long": "x" * 8000,
        "blanks": f"{head} .{body}.{signature}",
    }  # fmt: skip
    for name, token in forged.items():
        for what, do in (
            ("enqueues", http(token, "POST", "/rest/v1/rpc/enqueue_tagging", body={"asset_ids": [scene.ids["asset"]]})),
            ("reads", http(token, "GET", "/rest/v1/assets", query="select=*")),
            ("downloads", http(token, "GET", f"/storage/v1/object/authenticated/assets/{scene.ids['path']}")),
            ("broadcasts", http(token, "POST", "/realtime/v1/api/broadcast", body={"messages": [
                {"topic": f"tagging:{scene.ids['workspace']}", "event": "job-complete", "payload": {}, "private": True}]})),
        ):  # fmt: skip
            found.append(Attempt(f"{caller} {what} with a token: {name}", do, REFUSED))

    # tokens that are real and say odd things
    def sign(subject: str, lifetime: float = 600, role: Any = "authenticated", **claims: Any) -> str:
        now = int(time.time())
        told = {"sub": subject, "role": role, "aud": "authenticated", "iat": now, "exp": now + lifetime, **claims}
        return jwt.encode(told, scene.stack.jwt_secret, "HS256")

    odd: dict[str, str] = {
        "expired": sign(user or victim, lifetime=-60), "of no role": sign(str(uuid.uuid4()), role="autotag_worker"),
        "of the owner's role": sign(str(uuid.uuid4()), role="postgres"), "of a role that is a list": sign(str(uuid.uuid4()), role=["service_role"]),
        "of a user who is no uuid": sign("not-a-uuid"), "of nobody": sign(""), "with metadata": sign(
            str(uuid.uuid4()), user_metadata={"role": "service_role"}, app_metadata={"workspace_id": scene.ids["workspace"]},
            workspace_id=scene.ids["workspace"]),
        "of Storage's links": sign(str(uuid.uuid4()), role="storage", url=f"assets/{scene.ids['path']}"),
        "with a quote": sign("'; set role postgres; --"),
    }  # fmt: skip
    for name, token in odd.items():
        found.append(Attempt(f"{caller} enqueues with a real token {name}", http(
            token, "POST", "/rest/v1/rpc/enqueue_tagging", body={"asset_ids": [scene.ids["asset"]]})))  # fmt: skip
        found.append(Attempt(f"{caller} reads with a real token {name}", http(
            token, "GET", "/rest/v1/assets", query="select=*"), UNSEEN))  # fmt: skip
    return found


DENIED_OR_NONE = DENIED + "|rows 0"


def statements(scene: Scene, caller: str) -> list[Attempt]:
    """SQL in the caller's role: every table × every verb, every function, and what only owners do."""
    return [
        *_statements_on_tables(scene, caller), *_statements_of_owners(scene, caller),
        *_statements_on_rows(scene, caller),
    ]  # fmt: skip


def _statement(caller: str, statement: str, expect: str, *arguments: object) -> Attempt:
    name = f"{caller} SQL {statement[:110]} {arguments or ''}"[:200]
    return Attempt(name, sql(caller, statement, *arguments), expect)


def _statements_on_tables(scene: Scene, caller: str) -> list[Attempt]:
    own, seen = _own(scene, caller), views(scene)
    found: list[Attempt] = []

    def add(statement: str, expect: str = DENIED_OR_NONE, *arguments: object) -> None:
        found.append(_statement(caller, statement, expect, *arguments))

    for table in tables(scene, "autotag", "public", "storage", "realtime", "auth", "cron"):
        mine = "" if caller in ("anon", "nobody") else f" t where strpos(to_jsonb(t)::text, '{own}') = 0"
        add(f"select * from {table}{mine}")
        add(f"insert into {table} default values")
        # 42601: a view can have the same column twice
        add(
            f"insert into {table} overriding user value select * from {table}{mine}",
            f"{DENIED_OR_NONE}|42601" if table in seen else DENIED_OR_NONE,
        )
        add(f"delete from {table}{mine}")
        column = scene.victim.sql(
            "select attname from pg_attribute where attrelid = %s::regclass and attnum > 0 order by attnum desc limit 1",
            table,
        )
        add(f'update {table} set "{column[0]["attname"]}" = default')
        if table in seen:
            add(f'insert into {table} ("{column[0]["attname"]}") values (null)')
            add(f"drop view {table}", DENIED)
        if not table.startswith(("autotag.", "public.")):
            continue  # Supabase gives its roles more on its own tables than its API lets them do
        add(f"grant all on {table} to public", ANY)  # without the right to it Postgres only warns
        for verb in ("truncate {}", "do $$ begin lock table {} in access exclusive mode; end $$", "copy (select * from {}) to '/tmp/x'", "alter table {} disable row level security",
                     "drop table {}", "create policy p on {} using (true)",
                     "create trigger t before insert on {} execute function pg_catalog.suppress_redundant_updates_trigger()"):  # fmt: skip
            # Postgres lets whoever may delete rows lock their table, for as long as their statement runs.
            may_lock = verb.startswith("do $$ begin lock") and table == "public.assets" and caller != "anon"
            # 42809: a view has none of what a table has
            refused = f"{DENIED}|42809" if table in seen else DENIED
            add(verb.format(table), ANY if may_lock else refused)
    return found


def _statements_of_owners(scene: Scene, caller: str) -> list[Attempt]:
    found: list[Attempt] = []

    def add(statement: str, expect: str, *arguments: object) -> None:
        found.append(_statement(caller, statement, expect, *arguments))

    for schema in ("autotag", "public"):
        for name, types in functions(scene, schema):
            values = [theirs(scene, argument, kind) for argument, kind in types.items()]
            places = ", ".join(f"%s::{kind}" for kind in types.values())
            harmless = name in OPEN | HARMLESS and caller != "anon"
            add(f"select {schema}.{name}({places})", ANY if harmless else DENIED, *values)
    for statement in (
        "create table public.x (a int)", "create function public.x() returns int language sql as 'select 1'",
        "create schema x", "create extension dblink", "alter role authenticated superuser", "create role x superuser login",
        "alter system set log_statement = 'all'", "alter database postgres set search_path = x",
        "set role postgres", "set role supabase_admin", "set role autotag_worker", "set role tagger", "set session authorization postgres",
        "select * from pg_authid", "select pg_read_file('/etc/passwd')", "select lo_import('/etc/passwd')", "copy public.assets from program 'id'",
        "select pg_terminate_backend(pid) from pg_stat_activity where pid <> pg_backend_pid()", "select pg_reload_conf()",
        "create policy p on realtime.messages for insert with check (true)", "drop policy \"members see their workspaces\" on public.workspaces",
        "alter function autotag.is_member(autotag.workspace_id) security invoker", "create or replace function autotag.is_member(p_workspace_id autotag.workspace_id) returns boolean language sql as 'select true'",
        "grant autotag_worker to authenticated", "grant execute on all functions in schema autotag to authenticated",
        "reassign owned by postgres to anon",
        "create publication p for all tables", "select lo_export(1, '/tmp/x')",
        "create event trigger e on ddl_command_start execute function x()",
        "select set_config('row_security', 'off', false), count(*) from autotag.tasks",
    ):  # fmt: skip
        add(statement, DENIED)
    for statement in ("vacuum public.assets", "alter default privileges grant all on functions to public",
                      "select pg_notify('autotag', 'realtime')", "listen autotag"):  # fmt: skip
        add(statement, ANY)  # Postgres lets everybody; it changes nothing
    return found


def _statements_on_rows(scene: Scene, caller: str) -> list[Attempt]:
    own = _own(scene, caller)
    found: list[Attempt] = []

    def add(statement: str, expect: str = DENIED_OR_NONE, *arguments: object) -> None:
        found.append(_statement(caller, statement, expect, *arguments))

    for topic in (f"tagging:{scene.ids['workspace']}", "batch-updates"):
        # The function of the real server turns a refusal into a warning.
        add("select realtime.send('{\"job_id\": \"forged\"}'::jsonb, 'job-complete', %s, true)", ANY, topic)
        add(
            "insert into realtime.messages (topic, extension, event, private, payload) values (%s, 'broadcast', 'x', true, '{}')",
            DENIED_OR_NONE,
            topic,
        )
        add("update realtime.messages set topic = %s", DENIED_OR_NONE, topic)
    add(
        "insert into storage.objects (bucket_id, name) values ('assets', %s)",
        DENIED_OR_NONE,
        f"{scene.ids['workspace']}/x.jpg",
    )
    add("update storage.objects set name = %s", DENIED_OR_NONE, f"{own}/stolen.jpg")
    add(
        "insert into public.workspace_members values (%s, %s)",
        DENIED_OR_NONE,
        scene.ids["workspace"],
        scene.user(caller) or str(uuid.uuid4()),
    )
    add(
        "insert into public.assets (workspace_id, storage_path) values (%s, 'x')",
        DENIED_OR_NONE,
        scene.ids["workspace"],
    )
    add("insert into public.assets (id, workspace_id, image_url) values (%s, %s, 'https://x') on conflict (id) do update set workspace_id = excluded.workspace_id",
        DENIED_OR_NONE, scene.ids["asset"], own)  # fmt: skip
    return found


def behind(scene: Scene, caller: str, foreign: list[str]) -> list[Attempt]:
    """Calls by SQL of the functions behind the RPCs, where the caller itself says which files are hidden. `foreign`:
    images of the caller that name another user's file."""
    own, found = scene.of(caller), []
    assets, theirs = list(own.assets()), [scene.ids["asset"], scene.ids["live asset"], scene.ids["fileless asset"]]
    assets = [asset for asset in assets if asset not in foreign]
    canceled = own.enqueue(assets[:1])["job_id"]
    own.rpc("public.cancel_tagging", canceled)

    def add(name: str, expect: str, statement: str, *arguments: object) -> None:
        found.append(Attempt(f"{caller} by SQL {name}", sql(caller, statement, *arguments), expect))

    for hidden in ([], None, assets, theirs, [None]):
        said = f"and hides {hidden}"
        enqueue, retry = (
            "select autotag.enqueue(%s::uuid[], %s::uuid[])",
            "select autotag.retry(%s, %s::uuid[], %s::uuid[])",
        )
        add(f"enqueues another's {said}", "PT404", enqueue, theirs, hidden)
        add(f"enqueues their own with another's {said}", "PT404", enqueue, [*assets, theirs[0]], hidden)
        for asset in foreign:
            add(f"enqueues {asset}, which names another's file, {said}", "PT403", enqueue, [asset], hidden)
        for job in (scene.ids["job"], scene.ids["cancelled job"]):
            add(f"retries another's {job} {said}", "PT404", retry, job, theirs, hidden)
        add(f"enqueues their own {said}", "rows 1", enqueue, assets[1:], hidden)
        add(f"retries their own {said}", "rows 1", retry, canceled, assets[:1], hidden)
    return found


def _owned(scene: Scene, caller: str, argument: str, value: Any) -> Any:
    """The value for an argument that stands for something of the caller instead of the victim."""
    assets = list(scene.of(caller).assets())
    if isinstance(value, list):
        return assets
    return _own(scene, caller) if argument == "workspace_id" else value


def _own(scene: Scene, caller: str) -> str:
    """The attacker's workspace. An attacker without one gets an id that does not exist."""
    return scene.of(caller).member.workspace if caller in ("neighbour", "member") else str(uuid.UUID(int=1))


def _unsigned(claims: dict[str, Any]) -> str:
    return jwt.encode(claims, "", "none")
