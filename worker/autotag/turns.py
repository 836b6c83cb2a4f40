"""A fair semaphore for many tenants."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

MAX_REMEMBERED = 1000  # tenants that are remembered without having tasks


class Turns:
    """A fair semaphore: tenants get its places in turn, however many tasks of a tenant wait.

    With a plain semaphore, one image of a small upload would wait behind all images of a large one. Here the next place
    goes to the tenant that has been served least. This is start-time fair queueing, as in ``autotag.claim``.
    """

    def __init__(self, places: int, *, by_time: bool = False, share: bool = False) -> None:
        """
        Args:
            places: how many tasks may hold a place at the same time.
            by_time: tenants share the time during which they hold places, not the number of places. Then a tenant with
                slow tasks delays other tenants by one of these tasks in all, not by one for each of their own tasks.
            share: a tenant holds at most three quarters of the places, so that slow tasks of one tenant never hold all
                of them.
        """
        self._free = places
        self._max = places - places // 4 if share else places  # places of one tenant
        self._taken: dict[str, int] = {}  # places, by tenant
        self._by_time = by_time
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}
        #: How many turns (or seconds) each tenant has been served. A tenant that returns starts at the clock.
        self._served: dict[str, float] = {}
        self._running: dict[str, list[float]] = {}  # times at which a tenant's tasks began
        self._clock = 0.0

    @property
    def free(self) -> bool:
        """Whether a place is free and nobody waits for it."""
        return self._free > 0 and not self._waiting

    @asynccontextmanager
    async def place(self, tenant: str) -> AsyncIterator[None]:
        """Waits for a place, and holds it for the body."""
        await self._take(tenant)
        began = time.monotonic()
        self._running.setdefault(tenant, []).append(began)
        try:
            yield
        finally:
            self._end(tenant, began)
            self._leave(tenant)

    def _end(self, tenant: str, began: float) -> None:
        self._running[tenant].remove(began)
        if not self._running[tenant]:
            del self._running[tenant]
        if self._by_time:
            self._served[tenant] += time.monotonic() - began

    async def _take(self, tenant: str) -> None:
        # A tenant that returns starts at the clock: it must not catch up on the time in which it had no tasks.
        self._served[tenant] = max(self._served.get(tenant, 0.0), self._clock)
        if self.free and self._taken.get(tenant, 0) < self._max:
            self._start(tenant)
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        self._give()  # needed if all other waiting tasks were cancelled
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it got a place just before it was cancelled
                self._leave(tenant)
            raise

    def _leave(self, tenant: str) -> None:
        self._free += 1
        self._taken[tenant] -= 1
        if not self._taken[tenant]:
            del self._taken[tenant]
        self._give()

    def _start(self, tenant: str) -> None:
        self._free -= 1
        self._taken[tenant] = self._taken.get(tenant, 0) + 1
        self._clock = max(self._clock, self._share(tenant))
        if not self._by_time:
            self._served[tenant] += 1
        if len(self._served) > MAX_REMEMBERED:
            active = self._waiting.keys() | self._running.keys() | {tenant}
            self._served = {t: served for t, served in self._served.items() if served > self._clock or t in active}

    def _share(self, tenant: str) -> float:
        """How much the tenant has been served, including its running tasks."""
        running = self._running.get(tenant, ()) if self._by_time else ()
        now = time.monotonic() if running else 0.0
        return self._served[tenant] + sum(now - began for began in running)

    def _give(self) -> None:
        """Gives free places to waiting tasks: first to the tenant that was served least, among equals to the one that
        has waited longest."""
        while self._free and (able := [t for t in self._waiting if self._taken.get(t, 0) < self._max]):
            tenant = min(able, key=self._share)
            turns = self._waiting.pop(tenant)
            turn = turns.popleft()
            if not turn.done():  # otherwise its task was cancelled
                self._start(tenant)
                turn.set_result(None)
            if turns:
                self._waiting[tenant] = turns  # behind the other tenants
