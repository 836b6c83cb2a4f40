"""The edge as one application, with the paths of Supabase's gateway."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from psycopg import AsyncConnection
from psycopg_pool import AsyncConnectionPool
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket

from lab.edge.manners import BAD_GATEWAY, Manners
from lab.edge.objects import Objects
from lab.edge.realtime import Realtime
from lab.edge.rest import Rest
from lab.edge.resumable import PATH, Resumable
from lab.edge.storage import Storage
from lab.edge.tokens import TokenError, bearer, verify


class _Cors(CORSMiddleware):
    """Allows everything, except that resumable uploads have their own, shorter list of headers."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "OPTIONS" and scope["path"].startswith(f"/storage/v1{PATH}"):
            await self.app(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def make_edge(authenticator_url: str, owner_url: str, secret: str, files: Path, manners: Manners) -> Starlette:
    """The application.

    Args:
        authenticator_url: database URL of ``authenticator``, which switches to the caller's role.
        owner_url: database URL of a role that reads ``realtime.messages``.
        secret: signs the project's JWTs.
        files: folder for stored objects.
        manners: how the services behave.
    """
    pool: AsyncConnectionPool[AsyncConnection[Any]] = AsyncConnectionPool(
        authenticator_url, open=False, min_size=1, max_size=10
    )
    realtime = Realtime(pool, owner_url, secret, manners)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        await pool.open(wait=True)
        ready = asyncio.Event()
        follower = asyncio.create_task(realtime.follow_messages(ready))
        await ready.wait()
        yield
        follower.cancel()
        await asyncio.gather(follower, return_exceptions=True)
        await pool.close()

    async def unsupported(request: Request) -> Response:
        feature = f"{request.method} {request.url.path}"
        return JSONResponse({"message": f"The local edge does not support {feature}.", "code": "LOCAL501"}, 501)

    async def user(request: Request) -> Response:
        """``GET /auth/v1/user``: the user of a token, for servers. This is the only part of Auth that exists here."""
        try:
            claims = verify(secret, bearer(request.headers.get("authorization")))
        except TokenError as error:
            return JSONResponse({"code": 403, "error_code": "bad_jwt", "msg": f"invalid JWT: {error}"}, 403)
        known = {"id": claims.get("sub"), "aud": "authenticated", "role": claims["role"]}
        return JSONResponse(known | {"app_metadata": {}, "user_metadata": {}, "created_at": "2026-01-01T00:00:00Z"})

    objects = Objects(pool, files)
    uploads = [*Storage(pool, secret, objects).routes(), *Resumable(secret, objects).routes()]
    fallback = Route("/{path:path}", unsupported, methods=["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE"])

    return Starlette(
        lifespan=lifespan,
        routes=[
            Route("/auth/v1/user", user),
            Mount("/rest/v1", routes=[*Rest(pool, secret).routes(), fallback]),
            Mount("/storage/v1", routes=[*uploads, fallback]),
            Route("/realtime/v1/api/broadcast", realtime.http_broadcast, methods=["POST"]),
            WebSocketRoute("/realtime/v1/websocket", realtime.websocket),
            fallback,
        ],
        middleware=[
            Middleware(Gateway, manners=manners),
            Middleware(_Cors, allow_origins=["*"], allow_methods=["*"], allow_headers=["*"]),
        ],
    )


class Gateway:
    """The gateway before the services. While they are down, it answers all requests itself."""

    def __init__(self, app: ASGIApp, manners: Manners) -> None:
        self._app, self._manners = app, manners

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fails = scope["type"] == "http" and self._manners.failures > 0
        self._manners.failures -= fails
        if scope["type"] == "lifespan" or not (self._manners.down or fails):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await WebSocket(scope, receive, send).send_denial_response(HTMLResponse(BAD_GATEWAY, 502))
        else:
            await HTMLResponse(BAD_GATEWAY, 502)(scope, receive, send)
