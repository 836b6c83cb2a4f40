"""A provider and a Storage that answer immediately and use as little processor time as possible: every file is the same
photograph, and every completion is the same answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import uvicorn

Message = dict[str, Any]


def make_app(photo: bytes, answer: bytes) -> Any:
    """The ASGI application."""

    async def app(
        scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[[Message], Awaitable[None]]
    ) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        kind, body = (b"image/jpeg", photo) if scope["method"] == "GET" else (b"application/json", answer)
        headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    return app


if __name__ == "__main__":
    from benchmarks.engine import ANSWER

    port, photo = int(sys.argv[1]), Path(sys.argv[2]).read_bytes()
    uvicorn.run(make_app(photo, json.dumps(ANSWER).encode()), host="127.0.0.1", port=port, log_level="warning",
                access_log=False, lifespan="off", backlog=2048)  # fmt: skip
