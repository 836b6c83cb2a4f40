"""Makes a worker kill itself with SIGKILL at one point, for example ``before:settle:2``.

A point is ``before`` or ``after``, the name of a database function or of a request to OpenAI, and the number of the
call. Every step of a worker is one of these calls, so a worker can die before and after every step.
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
#: Calls that occur several times while one batch is made.
REPEATED = {"batch_step": 3}
#: Every point once. Points in the harvest and in batches come first, because it takes longest to reach them.
POINTS = [
    f"{when}:{name}:{count}"
    for name in (*FUNCTIONS, *REQUESTS)
    for count in range(1, REPEATED.get(name, 1) + 1)
    for when in ("before", "after")
]


class Doom:
    """Counts calls, and kills this process at its point."""

    def __init__(self, point: str) -> None:
        self._when, self._name, count = point.split(":")
        self._count = int(count)
        self._passed: Counter[str] = Counter()

    async def around(self, name: str, call: Callable[[], Awaitable[Any]]) -> Any:
        """Makes the call, or kills the process at its point."""
        self._passed[name] += 1
        due = name == self._name and self._passed[name] == self._count
        if due and self._when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = await call()
        if due:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def doom(point: str) -> None:
    """Installs the point in this process's database calls and requests to OpenAI."""
    from openai import AsyncOpenAI

    from autotag.db.connections import Connections, Purpose

    end = Doom(point)
    call, request = Connections._call, AsyncOpenAI.request  # `call` and `call_once` end in it

    async def doomed_call(self: Connections, purpose: Purpose, statement: str, *more: Any, **named: Any) -> object:
        match = re.search(r"autotag\.(\w+)", statement)
        return await end.around(match[1] if match else "", lambda: call(self, purpose, statement, *more, **named))

    async def doomed_request(self: AsyncOpenAI, cast_to: Any, options: Any, **more: Any) -> Any:
        path = re.sub(r"/(file-|batch_)\w+", "", options.url)
        return await end.around(f"{options.method.upper()} {path}", lambda: request(self, cast_to, options, **more))

    Connections._call = doomed_call  # type: ignore[method-assign]
    AsyncOpenAI.request = doomed_request  # type: ignore[assignment, method-assign]
