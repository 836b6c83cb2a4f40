"""Reads connection strings as people paste them: those of ORMs and other drivers, and with unencoded passwords."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, quote, unquote, urlencode

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import Conninfo

#: Parameters of Prisma, SQLAlchemy, JDBC, node-postgres, asyncpg, Npgsql and Supabase's own clients that libpq refuses.
#: They can be dropped: the worker itself finds out whether it connects through a pooler.
OF_OTHER_CLIENTS = frozenset({
    "pgbouncer", "connection_limit", "pool_timeout", "socket_timeout", "schema", "schemas", "sslaccept",
    "sslidentity", "statement_cache_size", "pool_size", "max_pool_size", "min_pool_size", "max_overflow",
    "pool_recycle", "pool_pre_ping", "prepared_statement_cache_size", "currentschema", "preparethreshold",
    "preparedstatementcachequeries", "binarytransfer", "tcpkeepalive", "logintimeout", "sockettimeout",
    "connecttimeout", "sslfactory", "uselibpqcompat", "idle_timeout", "max_lifetime", "search_path",
    "charset", "encoding", "timezone", "supa", "workaround", "prepared_statements", "ssl_context", "pool_mode",
    "default_pool_size", "statement_timeout", "lock_timeout", "query_timeout", "idle_in_transaction_session_timeout",
    "rewritebatchedinserts", "defaultrowfetchsize", "loadbalancehosts",
})  # fmt: skip
#: Schemes of URLs, including Elixir's and Django's names for Postgres.
_NAME = r"(?:jdbc:)?(?:postgres(?:ql)?(?:\+\w+)?|ecto|postgis):"
_SCHEME = re.compile(rf"{_NAME}//", re.IGNORECASE)
#: Text that is pasted together with the string: psql, an option or the name of a variable before it, a quote after it.
_IN_FRONT = re.compile(
    rf"^(?:(?:export|set)\s+|\$env:)?(?:(?!jdbc:)\w+[\"']?\s*[=:]\s*|(?:psql\s+)?(?:--?[a-z-]+[=\s]\s*)?)[\"'`]?(?={_NAME})",
    re.IGNORECASE,
)
_BEHIND = re.compile(r"(?:[\"'`][,;]*|;+|(?:\\[nr])+)+$")
_HOST = r"(?:\[[0-9A-Fa-f:.]+(?:%25\w+)?\]|[\w.%-]*)(?::\d*)?"
_BARE_IPV6 = re.compile(r"@[0-9A-Fa-f]*:[0-9A-Fa-f]*:[0-9A-Fa-f:.]*(?:[/?]|$)")
_AFTER_USER = re.compile(rf"(?P<hosts>{_HOST}(?:,{_HOST})*)(?:/(?P<database>[^/?#\s]*))?(?:\?(?P<query>[^#\s]*))?")
_PLACEHOLDER = re.compile(
    r"[\[<{(]+\s*(?:your|my|the|db|database|project)?[\s_-]*(?:password|pass|ref|project[\s_-]?ref|region|host|user)[^\]>})]*[\]>})]+"
    r"|your[_-]?(?:db[_-]?)?password|\$\{?\w*password\w*\}?", re.IGNORECASE)  # fmt: skip
#: Keywords of .NET (Npgsql), which Supabase's dashboard also shows -> keywords of libpq.
_OF_NPGSQL = {
    "host": "host", "server": "host", "port": "port", "database": "dbname", "db": "dbname", "username": "user",
    "userid": "user", "user": "user", "uid": "user", "password": "password", "pwd": "password", "sslmode": "sslmode",
}  # fmt: skip
_NPGSQL = re.compile(r"\s*(?:host|server|user ?(?:id|name)|uid|database)\s*=[^;=]*;", re.IGNORECASE)
_WHOLE_ESCAPES = re.compile(r"(?:[^%]|%[0-9A-Fa-f]{2})*")
_DIRECT_HOST = re.compile(r"\bdb\.([a-z0-9]{8,40})\.supabase\.(?:co|in|red|com)\b")
_NO_ROUTE = ("network is unreachable", "no route to host", "name or service not known", "no address associated",
             "resolve host", "nodename nor servname", "cannot assign requested address", "name resolution")  # fmt: skip
URL_FORM = (
    # This is not written as one URL, because the log replaces passwords in URLs by ***.
    "cannot be read as a connection string: postgresql:// and then user:password @ host:port/database without blanks"
)


def read(value: str) -> str:
    """Converts a connection string to a URL that libpq understands.

    Args:
        value: a URL with any of the usual schemes, or libpq's ``host=… user=…``. The password may be encoded or not. It
            counts as unencoded if it contains a character that encoding would have replaced, or a ``%`` that encodes
            nothing.

    Raises:
        ValueError: says what to change. The message continues a sentence and contains no part of a password.
    """
    value = re.sub(r"\s*[\r\n]+\s*", "", value)
    value = _BEHIND.sub("", _IN_FRONT.sub("", value[1:-1] if re.fullmatch(r"<.*>", value) else value))
    scheme = _SCHEME.match(value)
    if scheme is None:
        return _of_keywords(value)
    rest = value[scheme.end() :]
    if re.search(r"\s", rest):
        raise ValueError(URL_FORM)
    user, password, after = _split(rest)
    database, _, more = (after["database"] or "").partition("&")  # x&pgbouncer=true: no `?` in front
    query = "&".join(filter(None, (more, after["query"])))
    if not scheme[0].lower().startswith("jdbc:"):
        query = query.replace("+", "%2B")  # only Java reads a plus as a blank
    parts = dict(_parameters(query))
    user = user if user is not None else parts.pop("user", None)
    password = password if password is not None else parts.pop("password", None)
    _refuse_placeholders(password, after["hosts"], user)
    url = "postgresql://"
    if user is not None:
        url += quote(user, safe="") + ("" if password is None else f":{quote(password, safe='')}") + "@"
    url += (after["hosts"] or "") + (f"/{database}" if after["database"] is not None else "")
    return url + (f"?{urlencode(parts, quote_via=quote)}" if parts else "")


def _refuse_placeholders(password: str | None, *others: str | None) -> None:
    """Raises ValueError if a part is still a placeholder. A password may contain text that only looks like one."""
    found = [_PLACEHOLDER.fullmatch(password or ""), *(_PLACEHOLDER.search(part or "") for part in others)]
    for placeholder in filter(None, found):
        raise ValueError(f"still has the placeholder {placeholder[0]}; put the real value in its place")


def how_to_reach(reason: str) -> str:
    """Advice for a database that cannot be reached; it continues a sentence. ``reason``: libpq's message.

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
    """User, password, and the parts of the rest. The password ends at the last @ that is followed by a possible
    host."""
    at = len(rest)
    while (at := rest.rfind("@", 0, at)) >= 0:
        if after := _AFTER_USER.fullmatch(rest[at + 1 :]):
            user, colon, password = rest[:at].partition(":")
            return _decode(user), _decode(password) if colon else None, after.groupdict()
    if after := _AFTER_USER.fullmatch(rest):
        return None, None, after.groupdict()
    if _BARE_IPV6.search(rest):
        raise ValueError("has an IPv6 address without brackets; write it as [2600:…]:5432")
    raise ValueError(URL_FORM)


def _decode(text: str) -> str:
    """A user or password, decoded if it is encoded."""
    if re.search(r"[@/?#\[\]{}|\\^<>\"`]", text) or not _WHOLE_ESCAPES.fullmatch(text):
        return text
    return unquote(text)


def _parameters(query: str) -> list[tuple[str, str]]:
    """The parameters that libpq supports."""
    keywords = [option.keyword.decode() for option in Conninfo.get_defaults()]
    known = {keyword.replace("_", ""): keyword for keyword in keywords}  # also applicationName, as Java writes it
    kept: dict[str, str] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name == "ssl" and value.lower() in ("true", "1", "require"):
            kept.setdefault("sslmode", "require")
        elif name == "sslmode":
            kept[name] = "require" if value == "no-verify" else value.lower()  # node-postgres
        elif name in keywords:
            kept[name] = value
        elif name.lower() in OF_OTHER_CLIENTS or name == "ssl":
            continue
        elif keyword := known.get(name.lower()):
            kept[keyword] = value
        else:
            what = f"the parameter {name}" if re.fullmatch(r"\w{1,30}", name) else "a parameter"
            raise ValueError(f"has {what}, which Postgres does not know; remove it")
    return list(kept.items())


def _of_npgsql(value: str) -> str:
    """Converts .NET's form (``Host=…;Username=…;Password=…``) to libpq's. Keywords that only .NET's driver has are
    dropped."""
    parts: dict[str, str] = {}
    for name, text in re.findall(r"\s*([^=;]+?)\s*=\s*(\"(?:[^\"]|\"\")*\"|'(?:[^']|'')*'|[^;]*)", value):
        keyword = _OF_NPGSQL.get(name.lower().replace(" ", ""))
        if text[:1] in ("'", '"'):
            text = text[1:-1].replace(text[0] * 2, text[0])
        if keyword == "sslmode":
            text = text.lower().replace("verify", "verify-").replace("--", "-")  # VerifyFull
        if keyword:
            parts[keyword] = text.strip()
    return make_conninfo(**parts)


def _of_keywords(value: str) -> str:
    """Converts libpq's other form (``host=… port=… dbname=… user=… password=…``) to a URL."""
    if "://" in value or "=" not in value:
        raise ValueError("must start with postgresql:// (in Supabase's dashboard: Connect, then Session pooler)")
    if _NPGSQL.match(value):
        value = _of_npgsql(value)
    try:
        parts = {name: str(part) for name, part in conninfo_to_dict(value).items() if part is not None}
    except (ProgrammingError, UnicodeError):
        raise ValueError(URL_FORM) from None
    user, password, database = (parts.pop(name, None) for name in ("user", "password", "dbname"))
    host, port = parts.pop("host", ""), parts.pop("port", "")
    _refuse_placeholders(password, host, user)
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
