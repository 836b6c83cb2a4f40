"""Makes a worker kill itself with SIGKILL at one point, for example ``before:settle:2``.

A point is ``before`` or ``after``, the name of a database function or of a request to OpenAI, and how often it has
to come by. Every step of a worker is one of these calls, so that every step has a boundary to die at.
"""

from __future__ import annotations

import os
import re
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

FUNCTIONS = (
    "register_worker", "claim", "describe_tasks", "report_stages", "settle", "claim_batches", "batch_step",
    "batch_images", "batch_submitted", "show_batch", "record_poll", "batch_answers", "batch_finish", "files_deleted",
)  # fmt: skip
REQUESTS = (
    "POST /chat/completions", "POST /files", "POST /batches", "GET /batches", "GET /files/content", "DELETE /files",
)  # fmt: skip
#: Calls that come by several times while one batch is made.
REPEATED = {"batch_step": 3}
#: Every point once; the harvest's and the batch's own first, because they take longest to come by.
POINTS = [
    f"{when}:{name}:{count}"
    for name in (*FUNCTIONS, *REQUESTS)
    for count in range(1, REPEATED.get(name, 1) + 1)
    for when in ("before", "after")
]


class Doom:
    """Counts what comes by, and kills this process when it is time."""

    def __init__(self, point: str) -> None:
        self._when, self._name, count = point.split(":")
        self._count = int(count)
        self._passed: Counter[str] = Counter()

    async def around(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """Makes the call, unless this is the end."""
        self._passed[name] += 1
        due = name == self._name and self._passed[name] == self._count
        if due and self._when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = await call()
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def doom(point: str) -> None:
    """Puts the point into this process's database calls and its requests to OpenAI."""
    from openai import AsyncOpenAI

    from autotag.db.connections import Connections, Purpose

    end = Doom(point)
    once, request = Connections.call_once, AsyncOpenAI.request

    async def doomed_call(
        self: Connections, purpose: Purpose, statement: str, *arguments: object, **more: Any
    ) -> dict[str, Any]:
        match = re.search(r"autotag\.(\w+)", statement)
        answer: dict[str, Any] = await end.around(
            match[1] if match else "", lambda: once(self, purpose, statement, *arguments, **more)
        )
        return answer

    async def doomed_request(self: AsyncOpenAI, cast_to: Any, options: Any, **more: Any) -> Any:
        path = re.sub(r"/(file-|batch_)\w+", "", options.url)
        return await end.around(f"{options.method.upper()} {path}", lambda: request(self, cast_to, options, **more))

    Connections.call_once = doomed_call  # type: ignore[method-assign]
    AsyncOpenAI.request = doomed_request  # type: ignore[assignment, method-assign]
