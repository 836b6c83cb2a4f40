"""Checks the conditions that a project's owner gives (``--where``, ``--members-where``) for the adapter.

They are the owner's own code. But a mistake must lead to a clear message before anything is written. And a condition
must stay a condition: it must not close the parenthesis or the function around it, or contain a comment that hides the
code after it.
"""

from __future__ import annotations

import re
from typing import Any

import psycopg

from autotag.install.answers import HostError
from autotag.install.quoting import quote, table_name
from autotag.texts import clean_text

UUID = "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"
MAX_LENGTH = 2000  # characters
#: A string or a quoted name is one token. A string of the form E'…' may escape its quote.
TOKEN = re.compile(
    r"""[eE]'(?:[^'\\]|\\.|'')*' | [eE]' | '(?:[^']|'')*' | "(?:[^"]|"")*" | \w+ | --|/\*|. """, re.VERBOSE | re.DOTALL
)
FORBIDDEN = {
    ";": "a semicolon", "--": "a comment", "/*": "a comment", "$": "a dollar sign", "'": "a string without an end",
    "E'": "a string without an end", "e'": "a string without an end",
    '"': "a name without an end", "\\": "a backslash", "\0": "a zero byte",
}  # fmt: skip


def check_form(condition: str, option: str) -> str:
    """Returns the condition without white space around it.

    Raises:
        HostError: it is empty or too long, it closes a parenthesis that it did not open, it has a comment, a semicolon
            or a dollar sign outside a string, or ``$$`` anywhere.
    """
    text = condition.strip()
    if not text or len(text) > MAX_LENGTH:
        raise HostError(f"{option} is a condition of 1 to {MAX_LENGTH} characters, such as deleted_at is null.")
    depth = 0
    for token in TOKEN.findall(text):
        if token in FORBIDDEN or "$$" in token:
            raise HostError(f"{option} cannot have {FORBIDDEN.get(token, '$$')}; give one condition, as behind where.")
        depth += {"(": 1, ")": -1}.get(token, 0)
        if depth < 0:
            break
    if depth != 0:
        raise HostError(f"The parentheses of {option} do not match; give one condition, as behind where.")
    return text


def check_condition(url: str, table: str, alias: str, condition: str, option: str) -> None:
    """Lets Postgres parse a condition on the rows of a table.

    Args:
        url: connection URL of the database's owner.
        table: qualified name.
        alias: the name of the row in the adapter.
        condition: the condition.
        option: the option that gave it.

    Raises:
        HostError: it is not a condition on this table, or a function in it may change something.
        psycopg.OperationalError: the database cannot be reached.
    """
    text = check_form(condition, option)
    rows = f"{table_name(table)} {alias}"
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        try:
            # Planning runs functions, so it must not be able to write.
            _try(connection, f"set transaction read only; {PATH}; explain select from {rows} where ({text})")
            view = f"create temporary view autotag_condition as select ({text}) from {rows}"  # noqa: S608 - the owner's code
            changing = _try(connection, f"{PATH}; {view}")
        except psycopg.OperationalError:
            raise
        except psycopg.Error as error:
            reason = (error.diag.message_primary or str(error)).splitlines()[0]
            raise HostError(f"Postgres does not accept {option} for {table}: {reason}.") from None
    if changing:
        raise HostError(
            f"{option} calls {changing}, a volatile function, which may change something whenever autotag reads a row;"
            " leave it out, or declare it stable if it only reads."
        )


PATH = "set local search_path = pg_catalog, public, extensions, pg_temp"
#: Parsing a view runs nothing. The view's tree contains the oids of all its functions and operators.
VOLATILE = r"""
    select p.proname from pg_rewrite w
    cross join regexp_matches(w.ev_action::text, ':(?:funcid|opfuncid|aggfnoid|winfnoid) (\d+)', 'g') m (found)
    join pg_proc p on p.oid = m.found[1]::oid
    where w.ev_class = to_regclass('pg_temp.autotag_condition') and p.provolatile = 'v' order by 1 limit 1"""


def _try(connection: psycopg.Connection[Any], statements: str) -> str:
    """Runs statements and rolls back. Returns a volatile function that the temporary view uses, if there is one."""
    with connection.transaction(force_rollback=True):
        connection.execute(statements.encode())
        row = connection.execute(VOLATILE.encode()).fetchone()
    return str(row[0]) if row else ""


def check_tags(url: str, table: str, column: str, default: str | None) -> None:
    """Refuses a json column that does not hold lists, because autotag could not add tags to its values.

    Args:
        url: connection URL of the database's owner.
        table, column: their names.
        default: of the column.

    Raises:
        HostError: its default is an object, most of the first values are not lists, or most of the lists contain
            objects.
        psycopg.OperationalError: the database cannot be reached.
    """
    value = f"a.{quote(column)}::jsonb"
    kind = f"case when pg_column_size(a.{quote(column)}) <= 20000 then jsonb_typeof({value}) end"
    objects, texts = (
        f"jsonb_path_exists({value}, 'strict $[*] ? (@.type() == \"{one}\")', '{{}}', true)"
        for one in ("object", "string")
    )
    statement = f"""select count(*) filter (where kind = 'array'),
        count(*) filter (where kind not in ('array', 'null')), count(*) filter (where objects),
        count(*) filter (where not objects and texts)
        from (select k.kind, k.kind = 'array' and {objects} as objects, k.kind = 'array' and {texts} as texts
              from (select * from {table_name(table)} limit 10000) a cross join lateral (select {kind}) k (kind)) x"""  # noqa: S608 - quoted
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        connection.execute("set default_transaction_read_only = on")
        lists, others, objects_lists, text_lists = connection.execute(statement.encode()).fetchone() or (0, 0, 0, 0)
    if objects_lists > text_lists:
        raise HostError(
            f"{table}.{column} has lists of objects, and autotag's tags are texts; name another column with"
            " --tags-column (ai_tags, for example: autotag adds it if it does not exist)."
        )
    if others > lists or re.match(r"'\s*\{", default or ""):
        raise HostError(
            f"{table}.{column} has objects or single values, and tags are lists; name another column with --tags-column"
            " (ai_tags, for example: autotag adds it if it does not exist)."
        )


def check_tag_ids(url: str, table: str, column: str) -> None:
    """Refuses a column whose lists hold ids of another table (numbers or uuids) instead of tags.

    Args:
        url: connection URL of the database's owner.
        table, column: their names.

    Raises:
        HostError: most lists of the first rows contain ids.
        psycopg.OperationalError: the database cannot be reached.
    """
    uuids = "^[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}$"
    ids = f"""strict $[*] ? (@.type() == "number" || @ like_regex "{uuids}")"""
    statement = f"""select count(*) filter (where x.ids) > count(*) filter (where not x.ids)
        from (select jsonb_path_exists(to_jsonb(a.tags), %s, '{{}}', true) as ids
              from (select {quote(column)} as tags from {table_name(table)} limit 10000) a
              where case when pg_column_size(a.tags) <= 20000 then to_jsonb(a.tags) not in ('[]', 'null') end) x"""  # noqa: S608 - quoted
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        connection.execute("set default_transaction_read_only = on")
        if connection.execute(statement.encode(), (ids,)).fetchone() == (True,):
            raise HostError(
                f"{table}.{column} has lists of ids (numbers or uuids), and autotag's tags are texts; name another"
                " column with --tags-column (ai_tags, for example: autotag adds it if it does not exist)."
            )


def find_user(url: str, table: str, column: str) -> str | None:
    """A user in the first rows, preferably one whose id is not a uuid; None: there is no user.

    Raises:
        psycopg.OperationalError: the database cannot be reached.
    """
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        connection.execute("set default_transaction_read_only = on")
        statement = f"""
            select u.id from (select m.{quote(column)}::text as id from {table_name(table)} m limit 100000) u
            where u.id is not null order by u.id ~* '{UUID}' limit 1"""  # noqa: S608 - quoted
        found = connection.execute(statement.encode()).fetchone()
    return str(found[0]) if found else None


def check_users(url: str, table: str, column: str) -> None:
    """Refuses users of another login service if the adapter would look for Supabase's own users, whose ids are uuids.

    Raises:
        HostError: the column has such a user.
        psycopg.OperationalError: the database cannot be reached.
    """
    found = find_user(url, table, column)
    if found is not None and not re.fullmatch(UUID, found, re.IGNORECASE):
        raise HostError(
            f"{table} has the user {clean_text(found)[:60]!r}, who is none of Supabase's own: those have uuids."
            " Where Clerk, Auth0 or another service signs people in, set --caller-claim sub."
        )
