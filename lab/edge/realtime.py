"""Supabase Realtime: the Phoenix WebSocket protocol (1.0.0 and 2.0.0) and the HTTP broadcast endpoint.

Broadcasts come from ``realtime.messages``, from HTTP and from clients. The public and the private subscriptions to a
topic are separate channels. Presence and postgres_changes are not supported.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.websockets import WebSocket, WebSocketDisconnect

from lab.edge.manners import Manners
from lab.edge.tokens import TokenError, bearer, verify

PREFIX = "realtime:"
MAX_MESSAGES = 100  # in one HTTP request
MAX_PAYLOAD = 3_000_000  # bytes; the default of a Realtime tenant
JSON_ENCODING = 1
PUSH, BROADCAST = 3, 4  # types of binary frames


@dataclass(eq=False)
class Subscription:
    """One socket's subscription to a topic."""

    socket: Socket
    topic: str
    join_ref: str | None
    private: bool
    ack: bool = False
    own: bool = False
    can_send: bool = True  # on a private topic, the policies of realtime.messages decide
    expiry: asyncio.Task[None] | None = None


@dataclass(eq=False)
class Socket:
    """One WebSocket and its subscriptions."""

    websocket: WebSocket
    version: str
    joined: dict[str, Subscription] = field(default_factory=dict)
    sending: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def send(self, join_ref: str | None, ref: str | None, topic: str, event: str, payload: Any) -> None:
        if self.version == "1.0.0":
            message: Any = {"ref": ref, "topic": topic, "event": event, "payload": payload}
        else:
            message = [join_ref, ref, topic, event, payload]
        await self._send({"text": json.dumps(message)})

    async def send_stored(self, topic: str, event: str, message_id: str, payload: str) -> None:
        """Sends a broadcast from the database; ``payload`` is JSON text from Postgres."""
        if self.version == "1.0.0":
            inner = {"event": event, "meta": {"id": message_id}, "payload": json.loads(payload), "type": "broadcast"}
            await self.send(None, None, topic, "broadcast", inner)
            return
        names = [part.encode() for part in (topic, event, json.dumps({"id": message_id}, separators=(",", ":")))]
        head = struct.pack("BBBBB", BROADCAST, *(len(name) for name in names), JSON_ENCODING)
        await self._send({"bytes": head + b"".join(names) + payload.encode()})

    async def _send(self, message: dict[str, Any]) -> None:
        async with self.sending:
            # If the client has disconnected, the message is lost (delivery is at most once); `websocket` notices it.
            with contextlib.suppress(WebSocketDisconnect, RuntimeError):
                await self.websocket.send({"type": "websocket.send", **message})


class Realtime:
    """All sockets of one project."""

    def __init__(
        self, pool: AsyncConnectionPool[AsyncConnection[Any]], database_url: str, secret: str, manners: Manners
    ) -> None:
        """Args:
        pool: connections as ``authenticator``.
        database_url: database URL of a role that reads ``realtime.messages``.
        secret: signs the project's JWTs.
        manners: how it behaves.
        """
        self._pool = pool
        self._url = database_url
        self._secret = secret
        self._manners = manners
        self._channels: dict[tuple[str, bool], set[Subscription]] = defaultdict(set)

    # -- from the database

    async def follow_messages(self, ready: asyncio.Event) -> None:
        """Sends each row inserted into ``realtime.messages`` to the topic's subscribers, until cancelled."""
        listener = await AsyncConnection.connect(self._url, autocommit=True)
        reader = await AsyncConnection.connect(self._url, autocommit=True)
        async with listener, reader:
            await listener.execute("listen realtime_messages")
            ready.set()
            async for notification in listener.notifies():
                if not notification.payload or time.monotonic() < (self._manners.reads_from or 0):
                    continue  # a statement that inserted nothing, or a message before the replication runs
                cursor = await reader.execute(
                    "select m.id::text, m.topic, m.event, m.payload::text, m.private from realtime.messages m"
                    " join unnest(%s::uuid[]) with ordinality i (id, n) on i.id = m.id order by i.n",
                    (notification.payload.split(","),),
                )
                for message_id, topic, event, payload, private in await cursor.fetchall():
                    for subscription in list(self._channels.get((PREFIX + topic, private), ())):
                        await subscription.socket.send_stored(PREFIX + topic, event, message_id, payload)

    # -- over HTTP

    async def http_broadcast(self, request: Request) -> Response:
        """``POST /realtime/v1/api/broadcast``."""
        token = bearer(request.headers.get("authorization")) or request.headers.get("apikey", "")
        try:
            claims = verify(self._secret, token)
        except TokenError:
            return JSONResponse({"message": "Unauthorized"}, 401)
        try:
            body = await request.json()
        except ValueError:
            return PlainTextResponse("Bad Request", 400)
        messages = body.get("messages") if isinstance(body, dict) else None
        if not messages or not isinstance(messages, list):
            return JSONResponse({"errors": {"messages": ["can't be blank"]}}, 422)
        if len(messages) > MAX_MESSAGES:
            return JSONResponse({"message": "Too many messages to broadcast, please reduce the batch size"}, 429)
        errors = [_message_errors(message) for message in messages]
        if any(errors):
            return JSONResponse({"errors": {"messages": errors}}, 422)
        can_send: dict[str, bool] = {}
        for message in messages:
            topic, private = message["topic"], bool(message.get("private", False))
            if private and topic not in can_send:
                _, can_send[topic] = await self._permissions(claims, topic)
            if not private or can_send[topic]:  # like the real server, drops the rest silently
                await self._broadcast_all(PREFIX + topic, private, message["event"], message["payload"])
        return Response(status_code=202)

    async def _broadcast_all(
        self, topic: str, private: bool, event: str, payload: Any, sender: Subscription | None = None
    ) -> None:
        inner = {"event": event, "payload": payload, "type": "broadcast"}
        for subscription in list(self._channels.get((topic, private), ())):
            if subscription is not sender or subscription.own:
                await subscription.socket.send(None, None, topic, "broadcast", inner)

    # -- websockets

    async def websocket(self, websocket: WebSocket) -> None:
        """``/realtime/v1/websocket?apikey=…&vsn=…``."""
        version = websocket.query_params.get("vsn", "1.0.0")
        if version not in ("1.0.0", "2.0.0"):
            await websocket.send_denial_response(Response(status_code=403))
            return
        try:
            claims = verify(self._secret, websocket.query_params.get("apikey", ""))
        except TokenError as error:
            message = "Token has expired" if error.reason == "expired" else "The token provided is not a valid JWT"
            await asyncio.sleep(2 * self._manners.penalty)
            await websocket.send_denial_response(
                Response(json.dumps({"error": message}, separators=(",", ":")), 401, media_type="application/json")
            )
            return
        await websocket.accept()
        socket = Socket(websocket, version)
        self._manners.sockets.add(websocket)
        try:
            while True:
                received = await websocket.receive()
                if received["type"] == "websocket.disconnect":
                    return
                frame = _parse(received, version)
                if frame is not None:
                    await self._handle(socket, claims, *frame)
        finally:
            self._manners.sockets.discard(websocket)
            for subscription in list(socket.joined.values()):
                self._drop(subscription)

    async def _handle(
        self, socket: Socket, claims: dict[str, Any], join_ref: str | None, ref: str | None, topic: str, event: str,
        payload: Any,
    ) -> None:  # fmt: skip
        subscription = socket.joined.get(topic)
        if topic == "phoenix" and event == "heartbeat":
            await socket.send(None, ref, topic, "phx_reply", {"status": "ok", "response": {}})
        elif event == "phx_join" and topic.startswith(PREFIX):
            await self._join(socket, claims, join_ref or ref, ref, topic, payload if isinstance(payload, dict) else {})
        elif subscription is None:
            await socket.send(
                None, ref, topic, "phx_reply", {"status": "error", "response": {"reason": "unmatched topic"}}
            )
        elif event == "phx_leave":
            await socket.send(join_ref, ref, topic, "phx_reply", {"status": "ok", "response": {}})
            await self._close(subscription)
        elif event == "broadcast" and isinstance(payload, dict):
            if subscription.can_send:
                await self._broadcast_all(
                    topic, subscription.private, payload.get("event", ""), payload.get("payload"), subscription
                )
            if subscription.ack and subscription.can_send:
                await socket.send(join_ref, ref, topic, "phx_reply", {"status": "ok", "response": {}})
        elif event == "access_token" and isinstance(payload, dict):
            with contextlib.suppress(TokenError):
                self._watch_expiry(subscription, verify(self._secret, str(payload.get("access_token", ""))))

    async def _join(
        self, socket: Socket, claims: dict[str, Any], join_ref: str | None, ref: str | None, topic: str,
        payload: dict[str, Any],
    ) -> None:  # fmt: skip
        config = _as_object(payload.get("config"))
        private = bool(config.get("private"))
        refusal, can_receive, can_send = _unsupported(config), True, True
        if self._manners.private_only and not private:
            refusal = "PrivateOnly: This project only allows private channels"
        if private and refusal is None:
            if payload.get("access_token"):
                try:
                    claims = verify(self._secret, str(payload["access_token"]))
                except TokenError as error:
                    refusal = (
                        f"InvalidJWTToken: Token has expired {error.expired_for} seconds ago"
                        if error.reason == "expired"
                        else "MalformedJWT: The token provided is not a valid JWT"
                    )
            if refusal is None:
                can_receive, can_send = await self._permissions(claims, topic.removeprefix(PREFIX))
            if refusal is None and not can_receive:
                refusal = (
                    "Unauthorized: You do not have permissions to read from this Channel topic: "
                    + topic.removeprefix(PREFIX)
                )
        if refusal:
            await asyncio.sleep(5 * self._manners.penalty)
            await socket.send(join_ref, ref, topic, "phx_reply", {"status": "error", "response": {"reason": refusal}})
            return
        self._manners.reads_from = self._manners.reads_from or time.monotonic() + self._manners.cold_start
        previous = socket.joined.get(topic)
        broadcast = _as_object(config.get("broadcast"))
        subscription = Subscription(
            socket, topic, join_ref, private, bool(broadcast.get("ack")), bool(broadcast.get("self")), can_send
        )
        if previous:
            self._drop(previous)
        socket.joined[topic] = subscription
        self._channels[topic, private].add(subscription)
        if private:
            self._watch_expiry(subscription, claims)
        await socket.send(join_ref, ref, topic, "phx_reply", {"status": "ok", "response": {"postgres_changes": []}})
        if previous:
            await socket.send(previous.join_ref, previous.join_ref, topic, "phx_close", {})

    async def _permissions(self, claims: dict[str, Any], topic: str) -> tuple[bool, bool]:
        """Whether row level security of ``realtime.messages`` lets the caller read and insert messages of a topic.

        Like the real server, inserts a message, tries to read it as the caller, tries to insert one as the caller, and
        rolls back.
        """
        message = (
            "insert into realtime.messages (topic, extension, event, private) values (%s, 'broadcast', '', true)"
            " returning id, inserted_at"
        )
        async with await AsyncConnection.connect(self._url) as connection:
            cursor = await connection.execute(message, (topic,))
            row = await cursor.fetchone()
            await connection.execute(
                "select set_config('realtime.topic', %s, true), set_config('request.jwt.claims', %s, true),"
                " set_config('role', %s, true)",
                (topic, json.dumps(claims), claims.get("role", "anon")),
            )
            can_receive = can_send = False
            with contextlib.suppress(psycopg.DatabaseError):
                async with connection.transaction():
                    cursor = await connection.execute(
                        "select 1 from realtime.messages where (id, inserted_at) = (%s, %s)", row
                    )
                    can_receive = await cursor.fetchone() is not None
            with contextlib.suppress(psycopg.DatabaseError):
                async with connection.transaction():
                    await connection.execute(message.split(" returning")[0].encode(), (topic,))
                    can_send = True
            await connection.rollback()
            return can_receive, can_send

    def _watch_expiry(self, subscription: Subscription, claims: dict[str, Any]) -> None:
        if subscription.expiry:
            subscription.expiry.cancel()
        if subscription.private and "exp" in claims:
            subscription.expiry = asyncio.create_task(self._expire(subscription, float(claims["exp"]) - time.time()))

    async def _expire(self, subscription: Subscription, seconds: float) -> None:
        await asyncio.sleep(max(seconds, 0))
        topic = subscription.topic
        await subscription.socket.send(
            subscription.join_ref, None, topic, "system",
            {"message": "Token has expired 0 seconds ago", "status": "error", "extension": "system",
             "channel": topic.removeprefix(PREFIX)},
        )  # fmt: skip
        subscription.expiry = None
        await self._close(subscription)

    async def _close(self, subscription: Subscription) -> None:
        self._drop(subscription)
        await subscription.socket.send(
            subscription.join_ref, subscription.join_ref, subscription.topic, "phx_close", {}
        )

    def _drop(self, subscription: Subscription) -> None:
        if subscription.expiry:
            subscription.expiry.cancel()
        subscription.socket.joined.pop(subscription.topic, None)
        self._channels[subscription.topic, subscription.private].discard(subscription)


def _unsupported(config: dict[str, Any]) -> str | None:
    """The reason to refuse a join that the real server accepts."""
    if config.get("postgres_changes"):
        return "The local edge does not support postgres_changes."
    if _as_object(config.get("presence")).get("enabled"):
        return "The local edge does not support presence."
    return None


def _message_errors(message: Any) -> dict[str, list[str]]:
    if not isinstance(message, dict):
        return {"topic": ["can't be blank"]}
    errors = {name: ["can't be blank"] for name in ("topic", "event", "payload") if message.get(name) in (None, "")}
    errors |= {name: ["is invalid"] for name in ("topic", "event") if not isinstance(message.get(name) or "", str)}
    if not errors and len(json.dumps(message["payload"])) > MAX_PAYLOAD:
        errors = {"payload": ["Payload size exceeds tenant limit"]}
    return errors


def _parse(message: Any, version: str) -> tuple[str | None, str | None, str, str, Any] | None:
    """join_ref, ref, topic, event and payload of a frame; None for frames that the real server silently ignores."""
    if message.get("bytes") is not None:
        return _parse_push(message["bytes"])
    try:
        frame = json.loads(message["text"])
        if version == "1.0.0":
            frame = [frame.get(name) for name in ("join_ref", "ref", "topic", "event", "payload")]
        join_ref, ref, topic, event, payload = frame
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None
    if not isinstance(topic, str) or not isinstance(event, str) or "\0" in topic:
        return None
    return _reference(join_ref), _reference(ref), topic, event, payload


def _reference(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _as_object(value: Any) -> dict[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def _parse_push(data: bytes) -> tuple[str | None, str | None, str, str, Any] | None:
    """Parses a broadcast that supabase-js sends as a binary frame."""
    try:
        kind, *lengths, encoding = struct.unpack("BBBBBBB", data[:7])
        if kind != PUSH or encoding != JSON_ENCODING:
            return None
        parts, start = [], 7
        for length in lengths:
            parts.append(data[start : start + length].decode())
            start += length
        join_ref, ref, topic, event, _metadata = parts
        payload = json.loads(data[start:])
    except (ValueError, struct.error):
        return None
    return join_ref or None, ref or None, topic, "broadcast", {"event": event, "payload": payload}
