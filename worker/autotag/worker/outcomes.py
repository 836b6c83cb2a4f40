"""Reports the outcomes of single calls in bulk."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import structlog

from autotag.db import Busy, Database, Image, TooSlow
from autotag.db.messages import Outcome, Report
from autotag.errors import TaggingError
from autotag.observability import traces
from autotag.observability.metrics import SECONDS, count_answers, timed
from autotag.redact import safe_message
from autotag.waits import backoff
from autotag.worker.claims import Claims
from autotag.worker.notices import log_notices
from autotag.worker.observations import Observations
from autotag.worker.slow import SlowWorkspaces
from autotag.worker.stages import Stages

MAX_REPORTS = 500  # per call of settle
SETTLES = 3  # concurrent calls of settle; as many connections are reserved for them
BUSY_DELAY = 0.1  # seconds until the next call for a workspace that was busy; doubles each time
MAX_BUSY_DELAY = 10.0  # seconds
ALONE_DELAY = 1.0  # seconds until a report that failed alone is sent again; doubles each time
MAX_ALONE_DELAY = 60.0  # seconds
WHOLE_TRIES = 6  # tries of a report alone (about a minute), after which its outcome is replaced by an error
MAX_TRIES = 9  # tries of a report alone (about four minutes), after which it is dropped

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Pending:
    """A report that the database does not have yet. alone: it is sent in a call of its own, because a call with other
    reports failed. tries: how often it failed alone."""

    report: Report
    image: Image
    span: Any
    alone: bool = False
    tries: int = 0


@dataclass(slots=True)
class _Queue:
    """The pending reports of one workspace. alone: reports that are sent one by one. busy: how often in a row the
    workspace was busy."""

    pending: list[_Pending] = field(default_factory=list)
    alone: deque[_Pending] = field(default_factory=deque)
    busy: int = 0


class Outcomes:
    """Collects the outcomes of single calls and settles them in bulk, one workspace per call.

    While one call of `Database.settle` for a workspace runs, its outcomes are collected for the next. So calls become
    larger under load, and a single image is not delayed. A few workspaces are settled at the same time, in turn, so
    that a slow one does not delay others.
    """

    def __init__(
        self, db: Database, stages: Stages, observations: Observations, claims: Claims, slow: SlowWorkspaces
    ) -> None:
        """
        Args:
            db: the database.
            stages: the pending stage reports; those of images with an outcome are dropped.
            observations: reported together with the outcomes.
            claims: the claims of these images.
            slow: workspaces whose outcomes are only kept for the store lane.
        """
        self._db = db
        self._stages = stages
        self._observations = observations
        self._claims = claims
        self._slow = slow
        #: Workspaces with pending reports. Each is also in `_turns`, unless a call for it runs or a timer will add it.
        self._queues: dict[str, _Queue] = {}
        self._turns: asyncio.Queue[str] = asyncio.Queue()
        self._unsettled = 0
        #: Set while there is nothing to settle.
        self.idle = asyncio.Event()
        self.idle.set()

    def add(self, image: Image, outcome: Outcome, span: Any = None) -> None:
        """Adds the outcome of an image. ``span``: the result of `traces.image_span`."""
        self._stages.forget(image)
        self._unsettled += 1
        self.idle.clear()
        report: Report = {"task": image.task, "attempt": image.attempt, "mark": image.mark, **outcome}
        self._queue(image.workspace).pending.append(_Pending(report, image, span))

    async def run(self) -> None:
        """Settles outcomes until it is cancelled."""
        async with asyncio.TaskGroup() as settling:
            for _ in range(SETTLES):
                settling.create_task(self._take_turns())

    def _queue(self, workspace: str) -> _Queue:
        queue = self._queues.get(workspace)
        if queue is None:
            queue = self._queues[workspace] = _Queue()
            self._turns.put_nowait(workspace)
        return queue

    async def _take_turns(self) -> None:
        while True:
            workspace = await self._turns.get()
            queue = self._queues[workspace]
            if queue.alone:
                pending = [queue.alone.popleft()]
            else:
                pending, queue.pending = queue.pending[:MAX_REPORTS], queue.pending[MAX_REPORTS:]
            try:
                delay = await self._settle(workspace, queue, pending)
            except Exception:  # a bug, after the database has accepted the reports
                log.exception("task_failed")
                delay = BUSY_DELAY
            if not queue.pending and not queue.alone:
                del self._queues[workspace]
            elif delay:
                asyncio.get_running_loop().call_later(delay, self._turns.put_nowait, workspace)
            else:
                self._turns.put_nowait(workspace)

    async def _settle(self, workspace: str, queue: _Queue, pending: list[_Pending]) -> float:
        """Settles pending reports, or puts them back. Returns the seconds until the workspace's next turn.

        Catches everything that the call raises: an exception would end the calls of other workspaces, and reports would
        be lost.
        """
        keep = workspace in self._slow
        observed, taken = self._observations.take(), time.monotonic()
        reports = [item.report for item in pending]
        try:
            with timed(SECONDS, "settled"), traces.step("settle", [item.span for item in pending]):
                settled = await self._db.settle(workspace, reports, observed, keep=keep)
        except Exception as error:  # noqa: BLE001 (includes reports that cannot be sent as JSON)
            self._observations.put_back(observed, taken)
            return self._judge(workspace, queue, pending, error, keep)
        if settled.busy:
            self._observations.put_back(observed, taken)
            return self._put_back(queue, pending)
        queue.busy = 0
        self._forget(pending)
        count_answers("realtime", reports)
        if settled.held:
            self._stages.follow_up(workspace)
        # Expected after a broken connection or a timeout: an earlier call may have settled these reports.
        if settled.accepted < len(reports):
            log.warning("late_reports_refused", refused=len(reports) - settled.accepted)
        log_notices(settled.notices)
        return 0

    def _judge(self, workspace: str, queue: _Queue, pending: list[_Pending], error: Exception, keep: bool) -> float:
        """Decides what happens to reports whose call raised. Returns the seconds until the workspace's next turn."""
        if isinstance(error, TooSlow) and not keep:
            self._slow.mark(workspace)
            log.warning("workspace_slowed", workspace=workspace, images=len(pending))
            self._put_back(queue, pending)
            return 0
        if isinstance(error, TooSlow | Busy):
            return self._put_back(queue, pending)
        if len(pending) > 1:
            log.error("settle_failed", workspace=workspace, images=len(pending), error=safe_message(error))
            for item in pending:
                item.alone = True
            queue.alone.extend(pending)
            return 0
        self._try_later(pending[0], error)
        return 0

    def _put_back(self, queue: _Queue, pending: list[_Pending]) -> float:
        """Puts reports back into their queue; returns the seconds until their next turn."""
        if pending[0].alone:
            queue.alone.extendleft(pending)
        else:
            queue.pending[:0] = pending
        queue.busy += 1
        return backoff(BUSY_DELAY, MAX_BUSY_DELAY, queue.busy + 1)

    def _try_later(self, item: _Pending, error: Exception) -> None:
        """Sends a report that failed alone again later; drops it after `MAX_TRIES`."""
        item.alone = True
        item.tries += 1
        task, asset = item.image.task, item.image.asset_id
        if item.tries >= MAX_TRIES:
            log.error("report_dropped", task=task, asset=asset, error=safe_message(error))
            self._forget([item])
            return
        log.error("report_failed", task=task, asset=asset, tries=item.tries, error=safe_message(error))
        if item.tries == WHOLE_TRIES:
            lost = TaggingError("transient", "internal_error", "The outcome of this image could not be stored.")
            item.report = {
                "task": task, "attempt": item.image.attempt, "called": True, "error": lost.as_json(),
            }  # fmt: skip
        delay = backoff(ALONE_DELAY, MAX_ALONE_DELAY, item.tries)
        asyncio.get_running_loop().call_later(delay, self._add_alone, item)

    def _add_alone(self, item: _Pending) -> None:
        self._queue(item.image.workspace).alone.append(item)

    def _forget(self, pending: list[_Pending]) -> None:
        for item in pending:
            self._claims.drop(item.image.claim)
        self._unsettled -= len(pending)
        if not self._unsettled:
            self.idle.set()
