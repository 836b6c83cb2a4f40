"""A semaphore that many tenants share."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """A semaphore whose places go to the tenants in turn, however many of a tenant's tasks wait.

    With a plain semaphore one image of a small upload would wait behind all images of a large one.
    """

    def __init__(self, places: int) -> None:
        """
        Args:
            places: how many tasks may have a place at the same time.
        """
        self._free = places
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by tenant; the first one's turn is next

    @asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[None]:
        """Waits for a place, and has it for the body."""
        await self._take(tenant)
        try:
            yield
        finally:
            self._free += 1
            self._give()

    async def _take(self, tenant: str) -> None:
        if self._free and not self._waiting:
            self._free -= 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._give()  # if all who waited were cancelled
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it got the place at the same moment
                self._free += 1
                self._give()
            raise

    def _give(self) -> None:
        """Gives free places to those who wait, one tenant after the other."""
        while self._free and self._waiting:
            tenant, turns = next(iter(self._waiting.items()))
            del self._waiting[tenant]
            turn = turns.popleft()
            if turns:
                self._waiting[tenant] = turns  # behind the other tenants
            if not turn.done():  # else its task was cancelled
                self._free -= 1
                turn.set_result(None)
