"""Briefs: what uploads are asked in addition to the question. Each brief is read once, because it never changes."""

from __future__ import annotations

import asyncio
import uuid
from collections import OrderedDict

from autotag.db.connections import Connections
from autotag.db.errors import NotHeld
from autotag.db.messages import Brief
from autotag.db.readers import maybe

READ_TIMEOUT = 10.0  # seconds; it reads only tables of autotag
KEPT = 200  # briefs; a brief with 500 tags has about 20 kB


class Briefs:
    """The briefs that a worker has read lately."""

    def __init__(self, connections: Connections, worker: uuid.UUID) -> None:
        self._connections, self._worker = connections, worker
        self._read: OrderedDict[int, Brief] = OrderedDict()
        self._reading: dict[int, asyncio.Lock] = {}

    async def get(self, number: int | None) -> Brief | None:
        """The brief with this number; None: only the question is asked. If several images need the same brief, it is
        read once.

        Raises:
            NotHeld: the worker no longer holds an image with this brief.
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
        brief = await self._connections.call(
            "other", maybe(Brief), "select autotag.describe_brief(%s, %s)", self._worker, number, within=READ_TIMEOUT
        )
        if brief is None:
            raise NotHeld("This worker holds no image that is asked this.")
        return brief
