"""Shows what an adapter answers for rows of the project, before anything is written.

The adapter is created in a transaction that is rolled back. It is one round trip, so the table's lock is held for
milliseconds; if the lock is not free within a second, nothing is shown.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import psycopg

from autotag.install.adapter import TEMPLATE, of_members, render
from autotag.install.host import Host, HostError
from autotag.install.quoting import literal, quote, table_name
from autotag.install.survey import Survey
from autotag.texts import clean_text, printable

ROWS = 3
USERS = 5  # users that are shown for each workspace
SHOWN = 200  # characters of a value


@dataclass(frozen=True)
class Example:
    """What the adapter answers for one row.

    Attributes:
        id, workspace: its keys.
        users: up to five users who may act for its workspace; None: tokens or a function decide.
        user_count: the number of these users; None: unknown.
        who: the users as text.
        image: where its image is, as text; None: nowhere.
        refused: why autotag does not tag the image; None: it does.
        tags: the existing tags as text; None: there are none.
    """

    id: str
    workspace: str | None
    users: list[str] | None
    user_count: int | None
    who: str
    image: str | None
    refused: str | None
    tags: str | None


def show_examples(url: str, found: Survey) -> list[dict[str, Any]] | str:
    """The adapter's answers for three rows; empty: the table has no rows. A text: the reason why it was not tried.

    Raises:
        HostError: the adapter does not fit the project's tables, or everybody would be a member.
        psycopg.OperationalError: the database cannot be reached.
    """
    if found.keeps_adapter or (found.facts.adapter is not None and found.change is None):
        return "the database has this adapter already"
    change = found.change or found.waiting
    adapter = change.sql if change else render(TEMPLATE.read_text("utf-8"), found.host)
    token = f"select set_config('request.jwt.claims', {literal(_stranger(found.host))}, true)"
    # Inside a function, the SQL of a file cannot end the transaction, whatever it contains.
    tried = f"do {literal(f'begin execute {literal(adapter)}; end')}"
    statements = f"begin; {tried}; {token}; {_question(found.host)}; rollback"
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        try:
            cursor = connection.execute(statements.encode())
        except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled):
            return f"another session holds {found.host.table}; to see them, run this again"
        except (psycopg.errors.FeatureNotSupported, psycopg.errors.InvalidTransactionTermination) as error:
            if "transaction" not in str(error.diag.message_primary):
                raise HostError(f"The adapter cannot be tried: {printable(str(error), 300)}.") from None
            return "its file begins or ends transactions of its own, so trying it would change the database"
        except psycopg.errors.InsufficientPrivilege as error:
            return f"the login may not create the adapter ({printable(error.diag.message_primary, 200)})"
        except (psycopg.OperationalError, psycopg.errors.ReadOnlySqlTransaction):
            raise
        except psycopg.Error as error:
            reason = (error.diag.message_primary or str(error)).splitlines()[0]
            raise HostError(f"The adapter does not fit {found.host.table}: {printable(reason, 300)}.") from None
        rows: list[tuple[Any, ...]] = []
        while True:
            if cursor.description:
                rows = cursor.fetchall()
            if not cursor.nextset():
                break
    if any(accepted for accepted, *_ in rows):
        raise HostError(
            f"A signed-in user whom no row names would be a member of every workspace ({found.host.members}), so"
            " everybody could tag every image; name a table (--members-table) or a function (--members-function) that"
            " is about the caller."
        )
    return [asdict(_example(found.host, row)) for _, *row in rows]


def _stranger(host: Host) -> str:
    """The token of a user who exists in no project."""
    sub: Any = str(2**31 - 2 if host.user_type == "integer" else 2**63 - 2)
    if host.user_type in ("uuid", "text"):
        sub = str(uuid.uuid4())
    claims: dict[str, Any] = {"role": "authenticated", "sub": sub}
    place = claims
    for part in host.caller[:-1]:
        place = place.setdefault(part, {})
    if host.caller:
        place[host.caller[-1]] = sub
    return json.dumps(claims)


def _question(host: Host) -> str:
    counted = f" where ({host.where})" if host.where else ""
    users = "null::text[], null::bigint"
    if host.members.table:
        members = of_members(host.members, "d.workspace_id")
        user = f"m.{quote(host.members.user)}"
        members += f" and {user} is not null"  # a view may have such rows
        users = f"array(select {user}::text {members} order by 1 limit {USERS}), (select count(*) {members})"
    if host.members.owner:
        users = "array[d.workspace_id::text], 1::bigint"
    tags, key, table = f"a.{quote(host.tags)}", f"a.{quote(host.id)}", table_name(host.table)
    stranger = "d.workspace_id is not null and autotag.is_member(d.workspace_id)"
    return f"""select {stranger}, d.asset_id::text, d.workspace_id::text, {users}, d.bucket, d.path, d.url, d.refused,
        case when pg_column_size({tags}) <= 20000 then left({tags}::text, {SHOWN}) end
      from autotag.describe_assets(array(select {key} from {table} a{counted} limit {ROWS})) d
      join {table} a on {key} = d.asset_id order by 1"""


def _example(host: Host, row: Sequence[Any]) -> Example:
    key, workspace, users, count, bucket, path, url, refused, tags = row
    image = f"bucket {bucket}, path {path}" if path else url
    return Example(
        key, workspace, users, count, _who(host, workspace, users, count), image and clean_text(image)[:SHOWN], refused,
        clean_text(tags) if tags not in (None, "{}", "[]", "null") else None,
    )  # fmt: skip


def _who(host: Host, workspace: str | None, users: list[str] | None, count: int | None) -> str:
    if workspace is None:
        return "nobody: the row has no workspace"
    if users is None:
        if host.members.function:
            return f"whom {host.members.function}({workspace}) accepts"
        return f"users whose claim {'.'.join(host.members.claim)} names {workspace}"
    if not users:
        return f"nobody: workspace {workspace} has no members"
    more = f" and {count - len(users)} more" if count and count > len(users) else ""
    return f"{', '.join(users)}{more}"
