"""The local edge answers as the real servers did, exchange by exchange (except for ids, times and the order of
headers)."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from lab.edge import tokens
from lab.postgres import LocalPostgres
from lab.stack import Stack, edge_stack
from support import PATIENCE

TRANSCRIPTS = Path(__file__).parent / "transcripts"
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z")
JWT = re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]+")
MD5 = re.compile(r"\b[0-9a-f]{32}\b")
AGO = re.compile(r"expired \d+ seconds ago")
MEMBER = "aaaaaaaa-1111-4111-8111-111111111111"
WORKSPACE = "11111111-0000-4000-8000-000000000001"
SHORT = 1.0  # seconds that a token lives that has to expire while it is in use (4 in the recordings)


def lines(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TRANSCRIPTS / path).read_text().splitlines() if line]


def without_ids(text: str) -> str:
    """The text with placeholders for tokens, ids, times and hashes, which differ in every run."""
    for pattern, name in ((JWT, "<SIGNED_TOKEN>"), (UUID, "<id>"), (MOMENT, "<time>"), (MD5, "<md5>"), (AGO, "<ago>")):
        text = pattern.sub(name, text)
    return text


@pytest.fixture
async def stack(postgres: LocalPostgres, bare: str) -> AsyncIterator[Stack]:
    """An edge in front of a database without autotag, as in the recordings. It does not delay bad requests."""
    async with edge_stack(postgres, bare) as running:
        yield running


def people(stack: Stack, workspace: str) -> dict[str, str]:
    """The tokens of the placeholders."""
    sign = stack.token
    return {
        "ANON": stack.anon_key, "SERVICE": stack.secret_key, "MEMBER": sign(MEMBER, ws=workspace),
        "OTHER": sign("bbbbbbbb-1111-4111-8111-111111111111", ws="elsewhere"),
        "EXPIRED": sign(MEMBER, lifetime=-139, ws=workspace),
    }  # fmt: skip


def filled(value: Any, who: dict[str, str]) -> Any:
    """A request with real tokens instead of placeholders."""
    text = json.dumps(value)
    for name, token in who.items():
        text = text.replace(f"<{name}>", token)
    return json.loads(text)


# -- PostgREST


async def test_postgrest(stack: Stack, postgres: LocalPostgres) -> None:
    with psycopg.connect(stack.database_url(), autocommit=True) as connection:
        connection.execute((TRANSCRIPTS / "postgrest" / "schema.sql").read_bytes())
    who = people(stack, WORKSPACE)
    async with httpx.AsyncClient(base_url=f"{stack.supabase_url}/rest/v1") as client:
        for exchange in lines("postgrest/exchanges.jsonl"):
            request, expected = filled(exchange["request"], who), exchange["response"]
            answer = await client.request(
                request["method"], request["path"], headers=request["headers"], content=request.get("body")
            )
            about = exchange["about"]
            assert answer.status_code == expected["status"], (about, answer.text)
            assert answer.text == expected["body"], about
            for name in ("content-type", "content-range", "proxy-status", "www-authenticate", "preference-applied"):
                assert answer.headers.get(name) == expected["headers"].get(name), (about, name)


# -- Storage


async def test_storage(stack: Stack) -> None:
    who = people(stack, WORKSPACE)
    token = ""
    async with httpx.AsyncClient(base_url=stack.supabase_url) as client:
        for exchange in lines("storage/exchanges.jsonl"):
            request, expected, about = filled(exchange["request"], who), exchange["response"], exchange["about"]
            used = token
            if "broken" in about:
                used = token + "x"
            elif "after two" in about:  # instead of waiting: a token of the same server that has run out
                used = tokens.sign(stack.jwt_secret, "storage", lifetime=-1, url="assets/ws1/a.jpg")
            answer = await client.request(
                request["method"], request["path"].replace("<SIGNED_TOKEN>", used), **_body(request, about)
            )
            assert answer.status_code == expected["status"], (about, answer.text)
            if expected["body"].startswith("<"):
                assert len(answer.content) == int(expected["headers"]["content-length"]), about
            else:
                assert without_ids(answer.text) == without_ids(expected["body"]), about
            for name in set(expected["headers"]) - {"content-length"}:
                assert without_ids(answer.headers.get(name, "")) == without_ids(expected["headers"][name]), (
                    about,
                    name,
                )
            if (found := JWT.search(answer.text)) and '"1"' not in (request.get("body") or ""):
                token = found[0]


async def test_storage_and_wrong_keys(stack: Stack) -> None:
    """Without /authenticated in the path, an invalid token finds no bucket, and a token without the right finds no
    file."""
    storage = stack.storage()
    await storage.create_bucket("assets", "assets", {"public": False})
    await storage.from_("assets").upload(f"{WORKSPACE}/ten/004.jpg", b"\xff\xd8", {"content-type": "image/jpeg"})
    who = {
        **people(stack, WORKSPACE), "WORKSPACE": WORKSPACE, "GARBAGE": "garbage",
        "BAD_SIGNATURE": tokens.sign("somebody else's secret of 32 bytes", "service_role"),
    }  # fmt: skip
    async with httpx.AsyncClient(base_url=stack.supabase_url) as client:
        for exchange in lines("storage/wrong-keys.jsonl"):
            request, expected = filled(exchange["request"], who), exchange["response"]
            answer = await client.request(request["method"], request["path"], headers=request["headers"])
            assert (answer.status_code, answer.text) == (expected["status"], expected["body"]), exchange
            assert answer.headers["content-type"] == expected["headers"]["content-type"]
        url = f"/storage/v1/object/authenticated/assets/{WORKSPACE}/ten/004.jpg"
        read = await client.get(url, headers={"authorization": f"Bearer {stack.secret_key}"})
        assert (read.status_code, read.content) == (200, b"\xff\xd8")


def _body(request: dict[str, Any], about: str) -> dict[str, Any]:
    """The body of a request, as httpx takes it. An upload gets a file of the recorded picture's size and kind."""
    headers, body = request["headers"], request.get("body")
    if not isinstance(body, str) or "multipart" not in body:
        return {"headers": headers, "content": body}
    kind = "text/plain" if "text file" in about else "image/jpeg"
    form = {"": ("a.jpg", b"\xff\xd8" + bytes(1667), kind)}
    return {"headers": {k: v for k, v in headers.items() if k != "content-type"}, "files": form}


# -- Realtime


@pytest.fixture
def topics(stack: Stack) -> Stack:
    """Creates the policy of the recordings: a member may listen to the topic of their workspace."""
    with psycopg.connect(stack.database_url(), autocommit=True) as connection:
        connection.execute("""create policy members on realtime.messages for select to authenticated
            using ((select realtime.topic()) = 'tagging:' || ((select auth.jwt()) ->> 'ws'))""")
    return stack


@pytest.mark.parametrize("name", sorted(path.name for path in (TRANSCRIPTS / "realtime").glob("[cv]*.jsonl")))
async def test_realtime(topics: Stack, name: str) -> None:
    steps = lines(f"realtime/{name}")
    who = {**people(topics, "ws1"), "JWT": topics.token(MEMBER, ws="ws1", lifetime=SHORT + 1)}
    if name == "connect_expired_key.jsonl":
        who["JWT"] = who["EXPIRED"]
    url = filled(steps[1]["connect"], who).replace(
        "ws://HOST/socket", topics.supabase_url.replace("http", "ws") + "/realtime/v1"
    )
    if "refused" in steps[2]:
        with pytest.raises(InvalidStatus) as refused:
            await connect(url)
        response = refused.value.response
        assert (response.status_code, (response.body or b"").decode()) == (steps[2]["refused"], steps[2]["body"])
        return
    async with connect(url) as socket:
        await Play(topics, socket, who).play(steps[2:])


class Play:
    """One recorded conversation with the server."""

    def __init__(self, stack: Stack, socket: ClientConnection, who: dict[str, str]) -> None:
        self._stack = stack
        self._socket = socket
        self._who = who

    async def play(self, steps: list[dict[str, Any]]) -> None:
        for step in steps:
            if "send" in step:
                await self._socket.send(json.dumps(filled(step["send"], self._who)))
            elif "send_text" in step:
                await self._socket.send(step["send_text"])
            elif "sql" in step:
                await self._in_database(step["sql"])
            elif "rest" in step:
                await self._over_http(step["rest"])
            elif "recv" in step:
                told = json.loads(await self._next())
                assert without_ids(json.dumps(told)) == without_ids(json.dumps(step["recv"]))
            elif "recv_binary_base64" in step:
                expected = base64.b64decode(step["recv_binary_base64"])
                told = await self._next()
                assert isinstance(told, bytes)
                assert told[:5] == expected[:5], "the head of the binary frame"
                assert without_ids(told.decode("latin-1")) == without_ids(expected.decode("latin-1"))
            else:
                assert step["closed"] == 1000
                await self._nothing_more()

    async def _next(self) -> Any:
        async with asyncio.timeout(PATIENCE):
            return await self._socket.recv()

    async def _in_database(self, statement: str) -> None:
        with psycopg.connect(self._stack.database_url(), autocommit=True) as connection:
            connection.execute(statement.encode())

    async def _over_http(self, rest: dict[str, Any]) -> None:
        async with httpx.AsyncClient(base_url=f"{self._stack.supabase_url}/realtime/v1") as client:
            answer = await client.post(
                "/api/broadcast", headers=filled(rest["headers"], self._who), json=filled(rest["body"], self._who)
            )
        assert (answer.status_code, answer.text) == (rest["status"], rest["answer"])

    async def _nothing_more(self) -> None:
        """Checks that the server has sent nothing else: the next message is the answer to a heartbeat.

        Messages from the database take another path. So a marker is sent through the database first, and has to arrive
        at a second socket.
        """
        key = self._who["ANON"]
        base = self._stack.supabase_url.replace("http", "ws")
        async with connect(f"{base}/realtime/v1/websocket?apikey={key}&vsn=2.0.0") as witness:
            await witness.send(json.dumps(["1", "1", "realtime:marker", "phx_join", {"config": {"private": False}}]))
            await witness.recv()
            await self._in_database("""select realtime.send('{"a": 1}'::jsonb, 'marker', 'marker', false)""")
            async with asyncio.timeout(PATIENCE):
                await witness.recv()
        version = "vsn=1.0.0" in str(self._socket.request.path if self._socket.request else "")
        beat: Any = [None, "99", "phoenix", "heartbeat", {}]
        if version:
            beat = {"topic": "phoenix", "event": "heartbeat", "payload": {}, "ref": "99"}
        await self._socket.send(json.dumps(beat))
        told = json.loads(await self._next())
        assert (told["ref"] if version else told[1]) == "99", f"not in the recording: {told}"


async def test_realtime_over_http(stack: Stack) -> None:
    who = people(stack, "ws1")
    message = {"topic": "batch-updates", "event": "e", "payload": {"a": 1}, "private": False}
    large: dict[int, Callable[[], Any]] = {  # bodies that the recording cut short
        422: lambda: {"messages": [{**message, "payload": {"a": "x" * 3_100_000}}]},
        202: lambda: {"messages": [{**message, "payload": {"a": "x" * 200_000}}]},
        429: lambda: {"messages": [message] * 101},
    }
    async with httpx.AsyncClient(base_url=f"{stack.supabase_url}/realtime/v1") as client:
        for exchange in lines("realtime/http_broadcast.jsonl")[1:]:
            body = filled(exchange["body"], who)
            if isinstance(body, str) and body.endswith("…"):
                body = large[exchange["status"]]()
            content = body if isinstance(body, str) else json.dumps(body)
            headers = {"content-type": "application/json", **filled(exchange["headers"], who)}
            answer = await client.post("/api/broadcast", headers=headers, content=content)
            assert (answer.status_code, answer.text) == (exchange["status"], exchange["answer"]), exchange


# -- what the edge does not do


async def test_realtime_names_what_it_does_not_support(topics: Stack) -> None:
    """A join with postgres_changes or presence is refused with a reason."""
    url = topics.supabase_url.replace("http", "ws") + f"/realtime/v1/websocket?apikey={topics.anon_key}&vsn=2.0.0"
    async with connect(url) as socket:
        for config in ({"postgres_changes": [{"event": "*", "schema": "public"}]}, {"presence": {"enabled": True}}):
            await socket.send(json.dumps(["1", "1", "realtime:x", "phx_join", {"config": config}]))
            answer = json.loads(await socket.recv())
            assert answer[4]["status"] == "error"
            assert next(iter(config)) in answer[4]["response"]["reason"]


async def test_the_delays_before_refusals_are_a_setting(postgres: LocalPostgres, bare: str) -> None:
    async with edge_stack(postgres, bare, penalty=0.2) as stack:
        url = stack.supabase_url.replace("http", "ws") + "/realtime/v1/websocket?apikey=abc&vsn=2.0.0"
        started = time.monotonic()
        with pytest.raises(InvalidStatus):
            await connect(url)
        assert time.monotonic() - started >= 0.4
