"""Connection strings as people paste them: of ORMs, of other drivers, with a password that nobody has encoded."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, unquote, urlencode

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from psycopg.pq import Conninfo

#: What Prisma, SQLAlchemy, JDBC, node-postgres, asyncpg, Npgsql and Supabase's own clients add, and libpq refuses.
#: None of it matters here: the worker finds out itself whether a pooler is in between.
OF_OTHER_CLIENTS = frozenset({
    "pgbouncer", "connection_limit", "pool_timeout", "socket_timeout", "schema", "schemas", "sslaccept",
    "sslidentity", "statement_cache_size", "pool_size", "max_pool_size", "min_pool_size", "max_overflow",
    "pool_recycle", "pool_pre_ping", "prepared_statement_cache_size", "currentschema", "preparethreshold",
    "preparedstatementcachequeries", "binarytransfer", "tcpkeepalive", "logintimeout", "sockettimeout",
    "connecttimeout", "sslfactory", "uselibpqcompat", "idle_timeout", "max_lifetime", "search_path",
    "charset", "encoding", "timezone", "supa", "workaround", "prepared_statements",
})  # fmt: skip
_SCHEME = re.compile(r"(?:jdbc:)?postgres(?:ql)?(?:\+\w+)?://", re.IGNORECASE)
#: What is pasted along with it: psql, the name of a variable.
_IN_FRONT = re.compile(
    r"^(?:(?:export|set)\s+)?(?:\w+\s*[=:]\s*|psql\s+)?[\"'`]?(?=(?:jdbc:)?postgres(?:ql)?(?:\+\w+)?:)", re.IGNORECASE
)
_HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[\w.%-]*)(?::\d*)?"
_AFTER_USER = re.compile(rf"(?P<hosts>{_HOST}(?:,{_HOST})*)(?:/(?P<database>[^/?#\s]*))?(?:\?(?P<query>[^#\s]*))?")
_PLACEHOLDER = re.compile(
    r"[\[<{(]+\s*(?:your|my|the|db|database|project)?[\s_-]*(?:password|pass|ref|project[\s_-]?ref|region|host|user)[^\]>})]*[\]>})]+"
    r"|your[_-]?(?:db[_-]?)?password|\$\{?\w*password\w*\}?", re.IGNORECASE)  # fmt: skip
_WHOLE_ESCAPES = re.compile(r"(?:[^%]|%[0-9A-Fa-f]{2})*")
_DIRECT_HOST = re.compile(r"\bdb\.([a-z0-9]{8,40})\.supabase\.(?:co|in|red|com)\b")
_NO_ROUTE = ("network is unreachable", "no route to host", "name or service not known", "no address associated",
             "resolve host", "nodename nor servname", "cannot assign requested address", "name resolution")  # fmt: skip
URL_FORM = (
    # Not written as one URL, because the log replaces passwords in URLs by ***.
    "cannot be read as a connection string: postgresql:// and then user:password @ host:port/database without blanks"
)


def read(value: str) -> str:
    """A connection string as a URL that libpq reads as it was meant.

    Args:
        value: a URL with any of the usual schemes, or libpq's ``host=… user=…``. The password may be encoded or not: it
            is taken as it is if it contains a character that would have been encoded, or a ``%`` that encodes nothing.

    Raises:
        ValueError: says what to change. The message continues a sentence and contains no part of a password.
    """
    value = _IN_FRONT.sub("", re.sub(r"\s*[\r\n]+\s*", "", value)).rstrip("\"'`;")
    scheme = _SCHEME.match(value)
    if scheme is None:
        return _of_keywords(value)
    rest = value[scheme.end() :]
    if re.search(r"\s", rest):
        raise ValueError(URL_FORM)
    user, password, after = _split(rest)
    parts = dict(_parameters(after["query"] or ""))
    user = user if user is not None else parts.pop("user", None)
    password = password if password is not None else parts.pop("password", None)
    for part in (password, after["hosts"], user):
        if part and (
            placeholder := _PLACEHOLDER.fullmatch(part) or (part is not password and _PLACEHOLDER.search(part))
        ):
            raise ValueError(f"still has the placeholder {placeholder[0]}; put the real value in its place")
    url = "postgresql://"
    if user is not None:
        url += quote(user, safe="") + ("" if password is None else f":{quote(password, safe='')}") + "@"
    url += (after["hosts"] or "") + (f"/{after['database']}" if after["database"] is not None else "")
    return url + (f"?{urlencode(parts, quote_via=quote)}" if parts else "")


def how_to_reach(reason: str) -> str:
    """What to do about a database that cannot be reached; ``reason``: libpq's message. It continues a sentence.

    A project's direct host has only an IPv6 address, unless its owner has bought an IPv4 one (Supabase's docs, "Connect
    to your database"), and many networks have no IPv6.
    """
    direct = _DIRECT_HOST.search(reason)
    if direct and any(words in reason.lower() for words in _NO_ROUTE):
        return (
            f"{direct[0]} has only an IPv6 address, which this network cannot reach; use the session pooler"
            f" (user postgres.{direct[1]}, host aws-…-<region>.pooler.supabase.com, port 5432), which Supabase's"
            " dashboard shows under Connect"
        )
    return "check DATABASE_URL, its password and the network"


def _split(rest: str) -> tuple[str | None, str | None, dict[str, str | None]]:
    """User, password, and the parts of what follows them. The password ends at the last @ that a host can follow."""
    at = len(rest)
    while (at := rest.rfind("@", 0, at)) >= 0:
        if after := _AFTER_USER.fullmatch(rest[at + 1 :]):
            user, colon, password = rest[:at].partition(":")
            return _decode(user), _decode(password) if colon else None, after.groupdict()
    if after := _AFTER_USER.fullmatch(rest):
        return None, None, after.groupdict()
    raise ValueError(URL_FORM)


def _decode(text: str) -> str:
    """A user or password without its encoding, if it has one."""
    if re.search(r"[@/?#\[\]{}|\\^<>\"`]", text) or not _WHOLE_ESCAPES.fullmatch(text):
        return text
    return unquote(text)


def _parameters(query: str) -> list[tuple[str, str]]:
    """The parameters that libpq has."""
    known = {option.keyword.decode() for option in Conninfo.get_defaults()}
    kept: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name == "ssl" and value.lower() in ("true", "1", "require"):
            kept.setdefault("sslmode", "require")
        elif name == "sslmode":
            kept[name] = "require" if value == "no-verify" else value  # node-postgres
        elif name in known:
            kept[name] = value
        elif name.lower() not in OF_OTHER_CLIENTS and name != "ssl":
            what = f"the parameter {name}" if re.fullmatch(r"\w{1,30}", name) else "a parameter"
            raise ValueError(f"has {what}, which Postgres does not know; remove it")
    return list(kept.items())


def _of_keywords(value: str) -> str:
    """The URL of libpq's other form: ``host=… port=… dbname=… user=… password=…``."""
    if "://" in value or "=" not in value:
        raise ValueError("must start with postgresql:// (in Supabase's dashboard: Connect, then Session pooler)")
    try:
        parts = {name: str(part) for name, part in conninfo_to_dict(value).items() if part is not None}
    except (ProgrammingError, UnicodeError):
        raise ValueError(URL_FORM) from None
    user, password, database = (parts.pop(name, None) for name in ("user", "password", "dbname"))
    host, port = parts.pop("host", ""), parts.pop("port", "")
    if host.startswith("/"):  # a socket's folder
        parts["host"], host = host, ""
    if "," in host + port:
        raise ValueError(
            "names several hosts; write it as a URL: postgresql:// and then user:password @ host:port,host:port/x"
        )
    url = "postgresql://"
    if user is not None:
        url += quote(user, safe="") + ("" if password is None else f":{quote(password, safe='')}") + "@"
    url += (f"[{host}]" if ":" in host else host) + (f":{port}" if port else "")
    url += f"/{quote(database, safe='')}" if database else ""
    return url + (f"?{urlencode(parts, quote_via=quote)}" if parts else "")
