"""Protects a port against untrusted clients: deadlines, and limits on connections and sizes, in addition to uvicorn's.

uvicorn's ``limit_concurrency`` does not help, because above the limit health checks get a 503, too. Instead, at
`MAX_CONNECTIONS`, the connection that has waited longest for its request is closed. So clients that send their request
at once are served.
"""

from __future__ import annotations

import asyncio

import h11
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

# per port; two ports and a worker's other files (calls, database, images) fit into the usual limit of 1,024
MAX_CONNECTIONS = 128
REQUEST_SECONDS = 10.0  # from the start of a connection, or from its previous response, to the last byte of a request
RESPONSE_SECONDS = 30.0  # from the last byte of a request to the last byte of its response
LINGER_SECONDS = 2.0  # time to receive the rest of a refused body, so that the client reads the response
KEEP_ALIVE_SECONDS = 5  # that an idle connection stays open
MAX_HEADER_BYTES = 16_384  # bytes
#: Headers and chunks of a request; without a limit, a body in chunks of one byte would take 0.3 s of CPU time
MAX_LINES = 1000
MAX_BODY_BYTES = 65_536  # OpenAI's deliveries have a few hundred bytes


class GuardedProtocol(H11Protocol):
    """A connection that is closed when its request, or the delivery of its response, takes too long."""

    _deadline: asyncio.TimerHandle | None = None
    _waiting = True  # whether it waits for a request, or for the rest of one
    _lines = 0  # of the current request
    _since = 0.0  # when the wait or the response began (the loop's clock)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin(waiting=True, seconds=REQUEST_SECONDS)
        self._close_one_if_full()

    def data_received(self, data: bytes) -> None:
        self._lines += data.count(b"\r\n")
        if self._lines > MAX_LINES:
            self.transport.abort()
            return
        super().data_received(data)
        self._check_request_complete()

    def on_response_complete(self) -> None:
        unread = self.conn.their_state is h11.SEND_BODY
        self._lines = self._lines if unread else 0
        self._begin(waiting=True, seconds=LINGER_SECONDS if unread else REQUEST_SECONDS)
        super().on_response_complete()  # starts a pipelined request
        self._check_request_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._deadline:
            self._deadline.cancel()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:  # a response has already started, and a second one is not allowed
            self.transport.abort()

    def _check_request_complete(self) -> None:
        if self._waiting and self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._begin(waiting=False, seconds=RESPONSE_SECONDS)

    def _begin(self, *, waiting: bool, seconds: float) -> None:
        if self._deadline:
            self._deadline.cancel()
        self._waiting, self._since = waiting, self.loop.time()
        self._deadline = self.loop.call_later(seconds, self._end)

    def _end(self) -> None:
        self.transport.abort()  # `close` would wait for a client that does not read

    def _close_one_if_full(self) -> None:
        others = [
            connection for connection in self.connections
            if isinstance(connection, GuardedProtocol) and not connection.transport.is_closing()
            and connection is not self
        ]  # fmt: skip
        if len(others) >= MAX_CONNECTIONS:
            min(others, key=lambda other: (not other._waiting, other._since)).transport.abort()


class GuardedApp:
    """Passes only complete requests of limited size to an application; refuses the others with 413 or 431."""

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
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        return await self._app(scope, replay, send)


async def _read(scope: Scope, receive: Receive) -> bytes | None:
    """Reads the body; None if the client has disconnected.

    Raises:
        ValueError: the body, or its ``content-length``, is too large.
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


def _refuse(status: int, code: str, max_bytes: int) -> JSONResponse:
    message = f"At most {max_bytes:,} bytes are accepted."
    return JSONResponse({"error": {"code": code, "message": message}}, status)
