"""PostgREST: RPC calls and table rows in ``public``, with the caller's role and claims.

Supported: select (columns), the filters eq neq gt gte lt lte like ilike is in cs cd ov, groups (or, and) of them,
order, limit, offset, ranges, counts, single objects, insert, update, delete, and RPC by POST and GET. Anything else
gets a 501.
"""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Any, cast

import psycopg
from psycopg import AsyncConnection, sql
from psycopg_pool import AsyncConnectionPool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from lab.edge.query import MAX_ROWS, Query, RestError, parse_query, unsupported
from lab.edge.session import as_caller
from lab.edge.tokens import TokenError, bearer, verify

SCHEMAS = ("public", "graphql_public")
OBJECT = "application/vnd.pgrst.object+json"

#: HTTP status by sqlstate or its first two characters (PostgREST's reference, "Errors").
STATUSES = {
    "08": 503, "09": 500, "0L": 403, "0P": 403, "23503": 409, "23505": 409, "25006": 405, "25": 500, "28": 403,
    "2D": 500, "38": 500, "39": 500, "3B": 500, "40": 500, "53400": 500, "53": 503, "54": 500, "55": 500,
    "57": 500, "58": 500, "F0": 500, "HV": 500, "P0001": 400, "P0": 500, "XX": 500, "42883": 404, "42P01": 404,
    "42P17": 500,
}  # fmt: skip


@dataclass(frozen=True)
class Function:
    """A function in ``public`` that RPC can call."""

    name: str
    arguments: dict[str, str]
    optional: int
    returns_set: bool
    returns: str  # void, composite or scalar


class Rest:
    """The REST interface of one project."""

    def __init__(self, pool: AsyncConnectionPool[AsyncConnection[Any]], secret: str) -> None:
        self._pool = pool
        self._secret = secret

    def routes(self) -> list[Route]:
        """Everything below ``/rest/v1``."""
        return [
            Route("/rpc/{name}", self._answer(self._rpc), methods=["GET", "HEAD", "POST"]),
            Route("/{table}", self._answer(self._rows), methods=["GET", "HEAD"]),
            Route("/{table}", self._answer(self._insert), methods=["POST"]),
            Route("/{table}", self._answer(self._update), methods=["PATCH"]),
            Route("/{table}", self._answer(self._delete), methods=["DELETE"]),
        ]

    def _answer(self, handler: Any) -> Any:
        async def answer(request: Request) -> Response:
            anonymous = True
            try:
                claims = self._claims(request)
                anonymous = claims.get("role") == "anon"
                self._check_schema(request)
                return cast("Response", await handler(request, claims))
            except RestError as error:
                return _error(error)
            except psycopg.Error as error:
                return _error(_from_postgres(error, anonymous))

        return answer

    def _claims(self, request: Request) -> dict[str, Any]:
        token = bearer(request.headers.get("authorization")) or request.headers.get("apikey", "")
        if not token:
            return {"role": "anon"}
        try:
            return verify(self._secret, token)
        except TokenError as error:
            if error.reason == "expired":
                raise RestError(401, "PGRST303", "JWT expired") from None
            parts = len(token.split("."))
            message = f"Expected 3 parts in JWT; got {parts}" if parts != 3 else "No suitable key or wrong key type"
            raise RestError(401, "PGRST301", message) from None

    @staticmethod
    def _check_schema(request: Request) -> None:
        header = "accept-profile" if request.method in ("GET", "HEAD") else "content-profile"
        schema = request.headers.get(header, "public")
        if schema not in SCHEMAS:
            raise RestError(
                406, "PGRST106", f"Invalid schema: {schema}",
                hint=f"Only the following schemas are exposed: {', '.join(SCHEMAS)}",
            )  # fmt: skip

    # -- functions

    async def _rpc(self, request: Request, claims: dict[str, Any]) -> Response:
        name = request.path_params["name"]
        query = dict(request.query_params)
        if request.method == "POST":
            try:
                arguments = json.loads(await request.body() or b"{}")
            except (ValueError, RecursionError):
                raise RestError(400, "PGRST102", "Empty or invalid json") from None
            if not isinstance(arguments, dict):
                raise unsupported("RPC bodies that are not objects")
        else:
            arguments = {}
        async with as_caller(self._pool, claims, request.headers) as connection:
            functions = await self._functions(connection)
            if request.method != "POST":
                target = functions.get(name)
                arguments = {key: query.pop(key) for key in list(query) if target and key in target.arguments}
            function = self._pick(functions, name, arguments, request.method)
            return await self._call(connection, request, function, arguments, parse_query(list(query.items())))

    async def _functions(self, connection: AsyncConnection[Any]) -> dict[str, Function]:
        cursor = await connection.execute(
            "select p.proname, p.pronargs, p.pronargdefaults, p.proretset,"
            " coalesce(p.proargnames, '{}'),"
            " array(select format_type(t, null) from unnest(p.proargtypes) with ordinality a (t, i) order by i),"
            " case when p.prorettype = 'void'::regtype then 'void'"
            "      when y.typtype = 'c' or p.prorettype = 'record'::regtype then 'composite' else 'scalar' end"
            " from pg_proc p join pg_type y on y.oid = p.prorettype"
            " where p.pronamespace = 'public'::regnamespace and p.prokind = 'f'"
        )
        return {
            name: Function(name, dict(zip(names[:count], types, strict=False)), defaults, returns_set, returns)
            for name, count, defaults, returns_set, names, types, returns in await cursor.fetchall()
        }

    @staticmethod
    def _pick(functions: dict[str, Function], name: str, arguments: dict[str, Any], method: str) -> Function:
        function = functions.get(name)
        if function:
            required = list(function.arguments)[: len(function.arguments) - function.optional]
            if all(r in arguments for r in required) and all(a in function.arguments for a in arguments):
                return function
        names = ", ".join(sorted(arguments))
        called = f"public.{name}({names})" if names else f"public.{name}"
        if len(arguments) > 1:
            shape = f"with parameters {names}"
        elif arguments:
            shape = f"with parameter {names}"
        else:
            shape = "without parameters"
        extra = " or with a single unnamed json/jsonb parameter" if method == "POST" else ""
        if function:
            hint = f"Perhaps you meant to call the function public.{name}({', '.join(sorted(function.arguments))})"
        else:
            near = difflib.get_close_matches(name, functions, 1, 0.5)
            hint = f"Perhaps you meant to call the function public.{near[0]}" if near else ""
        message = (
            f"Could not find the function {called}{' without parameters' if not names else ''} in the schema cache"
        )
        raise RestError(
            404, "PGRST202", message,
            f"Searched for the function public.{name} {shape}{extra}, but no matches were found in the schema cache.",
            hint or None,
        )  # fmt: skip

    async def _call(
        self, connection: AsyncConnection[Any], request: Request, function: Function, arguments: dict[str, Any],
        query: Query,
    ) -> Response:  # fmt: skip
        passed = sql.SQL(", ").join(sql.SQL("{0} := b.{0}").format(sql.Identifier(argument)) for argument in arguments)
        record = sql.SQL(", ").join(
            sql.Identifier(argument) + sql.SQL(" " + function.arguments[argument]) for argument in arguments
        )
        source: sql.Composable = (
            sql.SQL("json_to_record(%s::json) as b ({}), lateral ").format(record) if arguments else sql.SQL("")
        )
        call = sql.SQL("public.{}({})").format(sql.Identifier(function.name), passed)
        values: list[Any] = [json.dumps(arguments)] if arguments else []
        if function.returns == "scalar" and not function.returns_set:
            statement = sql.SQL("select to_json(f.value)::text, 1 from {}{} as f (value)").format(source, call)
        else:
            inner = sql.SQL("(select f.* from {}{} as f) as f").format(source, call)
            rows = sql.SQL("select {} from {}{}").format(query.columns(), inner, query.clauses())
            body_expression = "coalesce((json_agg(r) -> 0)::text, 'null')" if not function.returns_set else _AGGREGATE
            statement = sql.SQL("select " + body_expression + ", count(*)::int from ({}) r").format(rows)
            values += query.values
        cursor = await connection.execute(statement, values)
        body, count = cast("tuple[str, int]", await cursor.fetchone())
        if function.returns == "void":
            return _respond(request, 204, "", "0-0/*")
        return _respond(request, 200, body, _range(0, count if function.returns_set else 1, None))

    # -- rows

    async def _table(self, connection: AsyncConnection[Any], request: Request) -> sql.Composable:
        name = request.path_params["table"]
        cursor = await connection.execute(
            "select relname from pg_class where relnamespace = 'public'::regnamespace and relkind in ('r', 'p', 'v')"
        )
        tables = [row[0] for row in await cursor.fetchall()]
        if name not in tables:
            near = difflib.get_close_matches(name, tables, 1, 0.5)
            raise RestError(
                404, "PGRST205", f"Could not find the table 'public.{name}' in the schema cache",
                hint=f"Perhaps you meant the table 'public.{near[0]}'" if near else None,
            )  # fmt: skip
        return sql.Identifier("public", name)

    async def _rows(self, request: Request, claims: dict[str, Any]) -> Response:
        query = parse_query(request.query_params.multi_items(), request.path_params["table"])
        preferences = _preferences(request)
        async with as_caller(self._pool, claims) as connection:
            table = await self._table(connection, request)
            query.limit = min(MAX_ROWS if query.limit is None else query.limit, MAX_ROWS)
            rows = sql.SQL("select {} from {} as {}{}").format(
                query.columns(), table, sql.Identifier(request.path_params["table"]), query.clauses()
            )
            cursor = await connection.execute(
                sql.SQL("select " + _AGGREGATE + ", count(*)::int from ({}) r").format(rows),
                query.values,
            )
            body, count = cast("tuple[str, int]", await cursor.fetchone())
            total = None
            if preferences.get("count") == "exact":
                unpaged = Query(where=query.where, values=query.values)
                cursor = await connection.execute(
                    sql.SQL("select count(*)::int from {}{}").format(table, unpaged.clauses()), query.values
                )
                total = cast("tuple[int]", await cursor.fetchone())[0]
        status = 206 if total is not None and count < total else 200
        return _respond(request, status, body, _range(query.offset, count, total), preferences, count)

    async def _insert(self, request: Request, claims: dict[str, Any]) -> Response:
        rows = await _json(request)
        rows = rows if isinstance(rows, list) else [rows]
        columns = sorted({column for row in rows for column in row})
        names = sql.SQL(", ").join(map(sql.Identifier, columns))
        if request.query_params.get("on_conflict") or "resolution" in _preferences(request):
            raise unsupported("upsert")
        async with as_caller(self._pool, claims) as connection:
            table = await self._table(connection, request)
            statement = sql.SQL(
                "insert into {table} ({names}) select {names} from json_populate_recordset(null::{table}, %s::json)"
            ).format(table=table, names=names)
            return await self._write(connection, request, statement, [json.dumps(rows)], 201)

    async def _update(self, request: Request, claims: dict[str, Any]) -> Response:
        values = await _json(request)
        query = parse_query(request.query_params.multi_items(), request.path_params["table"])
        names = sql.SQL(", ").join(map(sql.Identifier, sorted(values)))
        async with as_caller(self._pool, claims) as connection:
            table = await self._table(connection, request)
            statement = sql.SQL(
                "update {table} set ({names}) ="
                " (select {names} from json_populate_record(null::{table}, %s::json)){where}"
            ).format(table=table, names=names, where=Query(where=query.where).clauses())
            return await self._write(connection, request, statement, [json.dumps(values), *query.values], 204)

    async def _delete(self, request: Request, claims: dict[str, Any]) -> Response:
        query = parse_query(request.query_params.multi_items(), request.path_params["table"])
        async with as_caller(self._pool, claims) as connection:
            table = await self._table(connection, request)
            statement = sql.SQL("delete from {}").format(table) + Query(where=query.where).clauses()
            return await self._write(connection, request, statement, query.values, 204)

    async def _write(
        self, connection: AsyncConnection[Any], request: Request, statement: sql.Composed, values: list[Any],
        status: int,
    ) -> Response:  # fmt: skip
        """Runs a write; with ``Prefer: return=representation``, responds with its rows."""
        preferences = _preferences(request)
        unknown = "*/*"
        if preferences.get("return") != "representation":
            await connection.execute(statement, values)
            return _respond(request, status, "", unknown, preferences)
        query = parse_query([(k, v) for k, v in request.query_params.multi_items() if k == "select"])
        cursor = await connection.execute(
            sql.SQL(
                "with w as ({} returning *) select " + _AGGREGATE + ", count(*)::int from (select {} from w) r"
            ).format(statement, query.columns()),
            values,
        )
        body, count = cast("tuple[str, int]", await cursor.fetchone())
        shown = unknown if status == 201 else _range(0, count, None)
        return _respond(request, 201 if status == 201 else 200, body, shown, preferences, count)


#: The rows of `r` as JSON, in PostgREST's format.
_AGGREGATE = "coalesce(json_agg(r), '[]')::text"


def _preferences(request: Request) -> dict[str, str]:
    preferences = {}
    for part in request.headers.get("prefer", "").split(","):
        key, _, value = part.strip().partition("=")
        if key:
            preferences[key] = value
    return preferences


async def _json(request: Request) -> Any:
    try:
        return await request.json()
    except (ValueError, RecursionError):
        raise RestError(400, "PGRST102", "Empty or invalid json") from None


def _range(offset: int, count: int, total: int | None) -> str:
    shown = f"{offset}-{offset + count - 1}" if count else "*"
    return f"{shown}/{'*' if total is None else total}"


def _respond(
    request: Request, status: int, body: str, content_range: str, preferences: dict[str, str] | None = None,
    count: int | None = None,
) -> Response:  # fmt: skip
    headers = {"content-range": content_range}
    applied = [f"{k}={v}" for k, v in (preferences or {}).items() if k in ("count", "return") and v != "minimal"]
    if applied:
        headers["preference-applied"] = ", ".join(applied)
    kind = "application/json"
    if request.headers.get("accept", "").startswith(OBJECT) and count is not None:
        if count != 1:
            raise RestError(
                406, "PGRST116", "Cannot coerce the result to a single JSON object", f"The result contains {count} rows"
            )
        body = json.dumps(json.loads(body)[0], separators=(",", ":"), ensure_ascii=False)
        kind = OBJECT
    if status != 204 and (body or request.method == "HEAD"):
        headers["content-type"] = f"{kind}; charset=utf-8"
    return Response("" if request.method == "HEAD" else body, status, headers)


def _error(error: RestError) -> Response:
    headers = {
        "content-type": "application/json; charset=utf-8",
        "proxy-status": f"PostgREST; error={error.body['code']}",
    }
    if error.status == 401:
        described = {"PGRST303": "JWT expired"}.get(str(error.body["code"]), error.body["message"])
        invalid = f' error="invalid_token", error_description="{described}"'
        headers["www-authenticate"] = "Bearer" + (invalid if str(error.body["code"]).startswith("PGRST30") else "")
    return Response(json.dumps(error.body, separators=(",", ":"), ensure_ascii=False), error.status, headers)


def _from_postgres(error: psycopg.Error, anonymous: bool) -> RestError:
    code = error.sqlstate or "XX000"
    if code.startswith("PT") and code[2:].isdigit():
        status = int(code[2:])
    elif code == "42501":
        status = 401 if anonymous else 403
    else:
        status = next((STATUSES[code[:n]] for n in (5, 2) if code[:n] in STATUSES), 400)
    diagnosis = error.diag
    return RestError(
        status, code, diagnosis.message_primary or str(error), diagnosis.message_detail, diagnosis.message_hint
    )
