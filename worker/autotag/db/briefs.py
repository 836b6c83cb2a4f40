"""What uploads are asked beside the question: each brief is read once, because it never changes."""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict

from autotag.db.connections import Connections
from autotag.db.errors import NotHeld
from autotag.db.messages import Brief, make

READ_TIMEOUT = 10.0  # seconds; it reads only tables of autotag
KEPT = 200  # briefs; one with 500 tags has some 20 kB


class Briefs:
    """The briefs that a worker has read lately."""

    def __init__(self, connections: Connections, worker: uuid.UUID) -> None:
        self._connections, self._worker = connections, worker
        self._read: OrderedDict[int, Brief] = OrderedDict()
        self._reading: dict[int, asyncio.Lock] = {}

    async def get(self, number: int | None) -> Brief | None:
        """The brief with this number; None: the question alone is asked. Images that need the same one wait for it.

        Raises:
            NotHeld: the worker does not hold an image that is asked this (any more).
            psycopg.Error, Busy, TooSlow: the database failed.
        """
        if number is None:
            return None
        if number not in self._read:
            async with self._reading.setdefault(number, asyncio.Lock()):
                if number not in self._read:
                    self._read[number] = await self._load(number)
            self._reading.pop(number, None)
        self._read.move_to_end(number)
        brief = self._read[number]
        if len(self._read) > KEPT:
            self._read.popitem(last=False)
        return brief

    async def _load(self, number: int) -> Brief:
        row = await self._connections.call(
            "other", "select autotag.describe_brief(%s, %s) as brief", self._worker, number, within=READ_TIMEOUT
        )
        if row["brief"] is None:
            raise NotHeld("This worker holds no image that is asked this.")
        return make(Brief, row["brief"])
