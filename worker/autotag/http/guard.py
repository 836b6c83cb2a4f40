"""What a port needs beyond uvicorn when strangers may reach it: deadlines, and limits on connections and on sizes.

uvicorn's own ``limit_concurrency`` is no help: beyond it, health checks get a 503 as everybody else does. Here the
connection that has kept the server waiting longest makes room, so a client that sends its request at once is served.
"""

from __future__ import annotations

import asyncio

import h11
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_CONNECTIONS = 128  # per port; a worker's other files (calls, database, images) fit into the usual 1,024 beside two
REQUEST_SECONDS = 10.0  # from a connection's start, or its previous answer, to the last byte of a request
ANSWER_SECONDS = 30.0  # from there to the last byte of the answer
LINGER_SECONDS = 2.0  # for the rest of a body that was refused, so that its client reads why
KEEP_ALIVE_SECONDS = 5  # that an idle connection is kept open
MAX_HEADER_BYTES = 16_384  # bytes
MAX_LINES = 1000  # of a request: headers and chunks, of which a byte each would cost 0.3 s of processor for one body
MAX_BODY_BYTES = 65_536  # bytes; OpenAI's deliveries have a few hundred


class GuardedProtocol(H11Protocol):
    """A connection that ends when its request, or the reading of its answer, takes too long."""

    _deadline: asyncio.TimerHandle | None = None
    _waiting = True  # for a request, or for the rest of one
    _lines = 0  # of this request
    _since = 0.0  # when that, or the answering, began; the loop's clock

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin(waiting=True, seconds=REQUEST_SECONDS)
        self._make_room()

    def data_received(self, data: bytes) -> None:
        self._lines += data.count(b"\r\n")
        if self._lines > MAX_LINES:
            self.transport.abort()
            return
        super().data_received(data)
        self._notice_whole_request()

    def on_response_complete(self) -> None:
        unread = self.conn.their_state is h11.SEND_BODY
        self._lines = self._lines if unread else 0
        self._begin(waiting=True, seconds=LINGER_SECONDS if unread else REQUEST_SECONDS)
        super().on_response_complete()  # takes up what has been sent ahead
        self._notice_whole_request()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline:
            self._deadline.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # an answer has begun already, and a second one would be an error of ours
            self.transport.abort()

    def _notice_whole_request(self) -> None:
        if self._waiting and self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._begin(waiting=False, seconds=ANSWER_SECONDS)

    def _begin(self, *, waiting: bool, seconds: float) -> None:
        if self._deadline:
            self._deadline.cancel()
        self._waiting, self._since = waiting, self.loop.time()
        self._deadline = self.loop.call_later(seconds, self._end)

    def _end(self) -> None:
        self.transport.abort()  # `close` would wait for a client that does not read

    def _make_room(self) -> None:
        others = [
            connection for connection in self.connections
            if isinstance(connection, GuardedProtocol) and not connection.transport.is_closing()
            and connection is not self
        ]  # fmt: skip
        if len(others) >= MAX_CONNECTIONS:
            min(others, key=lambda other: (not other._waiting, other._since)).transport.abort()


class GuardedApp:
    """Hands an application requests that are complete and small; refuses the others with 413 or 431."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
            return await _refuse(431, "headers_too_large", MAX_HEADER_BYTES)(scope, receive, send)
        try:
            body = await _read(scope, receive)
        except ValueError:
            return await _refuse(413, "too_large", MAX_BODY_BYTES)(scope, receive, send)
        if body is None:
            return None
        whole: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return await self._app(scope, replay, send)


async def _read(scope: Scope, receive: Receive) -> bytes | None:
    """The body, or nothing when the client has gone.

    Raises:
        ValueError: it is too large, or says that it will be.
    """
    if int(dict(scope["headers"]).get(b"content-length", 0)) > MAX_BODY_BYTES:
        raise ValueError
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > MAX_BODY_BYTES:
            raise ValueError
        more = message.get("more_body", False)
    return bytes(body)


def _refuse(status: int, code: str, most: int) -> JSONResponse:
    message = f"At most {most:,} bytes are taken here."
    return JSONResponse({"error": {"code": code, "message": message}}, status)
