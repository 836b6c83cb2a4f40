"""One attempt, its answer, and a function that makes many attempts."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import httpx
import psycopg

if TYPE_CHECKING:
    from attacks.scene import Scene

#: What a refusal over HTTP looks like: a 4xx, or what the local edge does not even have.
REFUSED = r"4\d\d .*|501 LOCAL501"
UNSEEN = REFUSED + r"|2\d\d \[\]|2\d\d -|rows 0"  # refused, or as if nothing were there
DENIED = r"42501|PT4\d\d"  # SQL: the right is missing, or autotag refuses; with any other sqlstate nothing was tried
MEANT = r"4\d\d (42501|PT4\d\d)"  # the same over HTTP, of a call that is well-formed
ANY = r".*"  # nothing else is asked of the answer than of all: no 500, no secret, no effect
ERROR = re.compile(r"5(?!01 LOCAL501)\d\d .*|XX000|crashed .*")


@dataclass(frozen=True)
class Answer:
    """The answer to an attempt.

    outcome: in a word or two: `403 42501`, `200 []`, `42501`, `rows 3`, `joined`.
    received: everything that the attacker has learned.
    sent: everything that the attacker said, which is no leak when it comes back.
    """

    outcome: str
    received: str = ""
    sent: str = ""


Do = Callable[["Scene"], Awaitable[Answer]]


@dataclass(frozen=True)
class Attempt:
    """Something that an attacker does; ``expect`` matches the outcomes that are as they should be."""

    name: str
    do: Do = field(repr=False)
    expect: str = REFUSED


async def run(scene: Scene, attempts: Sequence[Attempt], only: str = "") -> list[str]:
    """Makes the attempts. Returns one line for each unexpected outcome and each leak. ``only``: a regular expression for
    the names of attempts."""
    found = []
    for attempt in attempts:
        if not re.search(only, attempt.name):
            continue
        try:
            async with asyncio.timeout(20):
                answer = await attempt.do(scene)
        except Exception as error:  # whatever it is, it belongs to this attempt
            answer = Answer(f"crashed {type(error).__name__}: {error}")
        short = answer.received[:300].replace("\n", " ")
        if ERROR.fullmatch(answer.outcome) or not re.fullmatch(attempt.expect, answer.outcome, re.DOTALL):
            found.append(f"{attempt.name}: {answer.outcome} {short}")
        for name in scene.leaks(answer):
            found.append(f"{attempt.name}: told {name} {short}")
    return found


def http(
    token: str, method: str, path: str, *, body: Any = None, content: bytes | str | None = None,
    headers: dict[str, str] | None = None, query: str = "",
) -> Do:  # fmt: skip
    """A request of the project's edge with a token (empty: with the publishable key alone)."""

    async def do(scene: Scene) -> Answer:
        data = json.dumps(body).encode() if body is not None else content
        told = {"apikey": scene.stack.anon_key, "content-type": "application/json"}
        told |= {"authorization": f"Bearer {token or scene.stack.anon_key}"} | (headers or {})
        url = scene.stack.supabase_url + path + (f"?{query}" if query else "")
        response = await scene.http.request(method, url, content=data, headers=told)
        sent = f"{url} {unquote(url)} {told} {data.decode(errors='replace') if isinstance(data, bytes) else data or ''}"
        received = f"{response.headers} {response.content.decode(errors='replace')}"
        return Answer(outcome(response), received, sent)

    return do


def outcome(response: httpx.Response) -> str:
    """Status and code of an answer, or how much it holds."""
    try:
        told = response.json()
    except ValueError:
        return f"{response.status_code} {'-' if not response.content else 'text'}"
    if isinstance(told, dict) and told.get("code"):
        return f"{response.status_code} {told['code']}"
    return f"{response.status_code} {'[]' if told == [] else 'json'}"


def sql(caller: str, statement: str, *arguments: object) -> Do:
    """Executes a statement with an API role, as if PostgREST had been made to do so."""

    async def do(scene: Scene) -> Answer:
        connection = scene.connection(caller)
        sent = f"{statement} {arguments}"
        try:
            cursor = await asyncio.to_thread(connection.execute, statement.encode(), arguments)
            rows = cursor.fetchall() if cursor.description else []
            count = len(rows) if cursor.description else max(cursor.rowcount, 0)
            return Answer(f"rows {count}", repr(rows), sent)
        except psycopg.Error as error:
            diagnosis = error.diag
            told = (diagnosis.message_primary, diagnosis.message_detail, diagnosis.message_hint, diagnosis.context)
            return Answer(error.sqlstate or type(error).__name__, repr(told), sent)

    return do
