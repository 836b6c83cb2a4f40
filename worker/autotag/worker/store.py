"""The store lane: stores outcomes that had to wait, because the host's rows were locked or slow to write."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from autotag.db import CALL_ERRORS, Busy, Database, Lost, TooSlow
from autotag.redact import safe_message
from autotag.worker.notices import log_notices
from autotag.worker.slow import SlowWorkspaces
from autotag.worker.wake import Wake

STORES = 2  # workspaces whose outcomes are stored concurrently
MAX_LIMIT = 500  # outcomes per call; after a call that took too long, the next one has a tenth
GROWTH_SECONDS = 2.0  # after a call that took less than this, the next one has twice as many outcomes
BACKOFF = 1.0  # seconds until a workspace's next call, if nothing could be stored; doubles each time
MAX_BACKOFF = 60.0  # seconds
LIST_RETRY = 1.0  # seconds to wait after a failed call of list_unstored

log = structlog.get_logger(__name__)


class StoreLane:
    """Stores waiting outcomes, one workspace per call, in turn.

    A slow workspace does not delay others for long: it goes to the end of the queue, its next call has fewer outcomes,
    and only one slow workspace is served at a time.
    """

    def __init__(self, db: Database, wake: Wake, slow: SlowWorkspaces, follow_up: Callable[[str], None]) -> None:
        """
        Args:
            db: the database.
            wake: wakes the lane.
            slow: where workspaces that take too long are noted.
            follow_up: of `Stages`.
        """
        self._db = db
        self._follow_up = follow_up
        self._wake = wake
        self._slow = slow
        self._turns: dict[str, None] = {}  # workspaces that wait for their turn, in order
        self._running: set[str] = set()  # workspaces whose turn it is
        self._limits: dict[str, int] = {}  # only for workspaces with less than MAX_LIMIT
        # the earliest next call (`time.monotonic`), and the current delay in seconds
        self._backoffs: dict[str, tuple[float, float]] = {}

    async def run(self) -> None:
        """Stores outcomes until it is cancelled."""
        async with asyncio.TaskGroup() as storing:
            while True:
                wait = await self._list()
                self._give_turns(storing)
                await self._wake.wait("store", wait)

    async def _list(self) -> float | None:
        """Queues the due workspaces. Returns the seconds until the next ones are due (None: wait for a
        notification)."""
        try:
            unstored = await self._db.list_unstored()
        except CALL_ERRORS as error:
            log.error("list_unstored_failed", error=safe_message(error))
            return LIST_RETRY
        now = time.monotonic()
        waits = [] if unstored.wait is None else [unstored.wait]
        for workspace in unstored.workspaces:
            if workspace in self._running or workspace in self._turns:
                continue
            not_before, _ = self._backoffs.get(workspace, (0.0, 0.0))
            if not_before > now:
                waits.append(not_before - now)
            else:
                self._turns[workspace] = None
        if self._backoffs:
            due = set(unstored.workspaces)
            self._backoffs = {w: b for w, b in self._backoffs.items() if w in due}
        return min(waits, default=None)

    def _give_turns(self, storing: asyncio.TaskGroup) -> None:
        """Starts the next turns. At most one is for a slow workspace: its call may take ten seconds, and there may be
        many slow ones."""
        for workspace in list(self._turns):
            if len(self._running) == STORES:
                return
            if self._is_slow(workspace) and any(self._is_slow(other) for other in self._running):
                continue
            del self._turns[workspace]
            self._running.add(workspace)
            storing.create_task(self._take_turn(workspace, storing))

    def _is_slow(self, workspace: str) -> bool:
        return workspace in self._limits or workspace in self._slow

    async def _take_turn(self, workspace: str, storing: asyncio.TaskGroup) -> None:
        try:
            more = await self._store(workspace)
        except Exception:  # a bug
            log.exception("task_failed")
            more = self._back_off(workspace)
        finally:
            self._running.remove(workspace)
        if more:
            self._turns[workspace] = None
        else:
            self._wake.notify("store")  # other workspaces may be due, or this one may be due later
        self._give_turns(storing)

    async def _store(self, workspace: str) -> bool:
        """Stores outcomes of a workspace; returns whether to go on at its next turn."""
        limit = self._limits.get(workspace, MAX_LIMIT)
        started = time.monotonic()
        tasks: list[int] = []
        try:
            tasks = await self._db.pick_unstored(workspace, limit)
            stored = await self._db.store_waiting(workspace, tasks)
        except CALL_ERRORS as error:
            if isinstance(error, Busy):
                return self._back_off(workspace)
            log.warning("store_failed", workspace=workspace, images=len(tasks), error=safe_message(error))
            if isinstance(error, TooSlow):
                self._slow.mark(workspace)
            return await self._postpone(workspace, len(tasks) or limit, tasks, lost=isinstance(error, Lost))
        log_notices(stored.notices)
        if stored.stored:
            self._follow_up(workspace)
            self._backoffs.pop(workspace, None)
            if time.monotonic() - started < GROWTH_SECONDS:
                self._limit(workspace, 2 * limit)
        elif stored.more:  # all rows are locked, or another worker stores them
            return self._back_off(workspace)
        return stored.more

    async def _postpone(self, workspace: str, tried: int, tasks: list[int], *, lost: bool) -> bool:
        """Postpones the outcomes of a failed call. The next call has a tenth of its outcomes."""
        self._limit(workspace, tried // 10)
        try:
            log_notices(await self._db.postpone_stores(workspace, tasks, lost=lost))
            return True
        except CALL_ERRORS as error:
            log.error("postpone_failed", workspace=workspace, error=safe_message(error))
            return self._back_off(workspace)

    def _limit(self, workspace: str, limit: int) -> None:
        if limit >= MAX_LIMIT:
            self._limits.pop(workspace, None)
        else:
            self._limits[workspace] = max(1, limit)

    def _back_off(self, workspace: str) -> bool:
        _, seconds = self._backoffs.get(workspace, (0.0, BACKOFF / 2))
        seconds = min(2 * seconds, MAX_BACKOFF)
        self._backoffs[workspace] = (time.monotonic() + seconds, seconds)
        return False
