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
from autotag.worker.claims import Claims
from autotag.worker.notices import log_notices
from autotag.worker.observations import Observations
from autotag.worker.slow import SlowWorkspaces
from autotag.worker.stages import Stages

MAX_REPORTS = 500  # per call of settle
SETTLES = 3  # concurrent calls of settle: as many as the connections for them
BUSY_DELAY = 0.1  # seconds until a workspace's next call, if it was busy; twice as long each time …
MAX_BUSY_DELAY = 10.0  # … but no longer than this
ALONE_DELAY = 1.0  # seconds until a report that raised alone is sent again; twice as long each time …
MAX_ALONE_DELAY = 60.0  # … but no longer than this
WHOLE_TRIES = 6  # how often a report is sent alone as it is (a minute); then it only says that its outcome is lost …
MAX_TRIES = 9  # … and then (four minutes) it is dropped

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Answer:
    """The outcome of one image, until the database has it. alone: it is sent alone, because it raised together with
    others. tries: how often it raised alone."""

    report: Report
    image: Image
    span: Any
    alone: bool = False
    tries: int = 0


@dataclass(slots=True)
class _Queue:
    """The answers of one workspace. alone: those that are sent one by one. busy: how often the workspace was busy in a
    row."""

    answers: list[_Answer] = field(default_factory=list)
    alone: deque[_Answer] = field(default_factory=deque)
    busy: int = 0


class Outcomes:
    """Collects the outcomes of single calls and settles them in bulk, one workspace per call.

    While one call of `Database.settle` for a workspace runs, its outcomes are collected for the next. So the bulk grows
    with the load, and a single image is not delayed. A few workspaces are settled at the same time, in turn, so that a
    slow one delays no other.
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
            slow: workspaces whose outcomes are only kept, for the store lane.
        """
        self._db = db
        self._stages = stages
        self._observations = observations
        self._claims = claims
        self._slow = slow
        #: Each workspace with answers is here, and either in _turns, or a call for it runs, or _turns gets it later.
        self._queues: dict[str, _Queue] = {}
        self._turns: asyncio.Queue[str] = asyncio.Queue()
        self._unsettled = 0
        #: Set while there is nothing to settle.
        self.idle = asyncio.Event()
        self.idle.set()

    def add(self, image: Image, outcome: Outcome, span: Any = None) -> None:
        """Adds the outcome of an image. ``span``: of `traces.image_span`."""
        self._stages.forget(image)
        self._unsettled += 1
        self.idle.clear()
        report: Report = {"task": image.task, "attempt": image.attempt, "mark": image.mark, **outcome}
        self._queue(image.workspace).answers.append(_Answer(report, image, span))

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
                answers = [queue.alone.popleft()]
            else:
                answers, queue.answers = queue.answers[:MAX_REPORTS], queue.answers[MAX_REPORTS:]
            try:
                delay = await self._settle(workspace, queue, answers)
            except Exception:  # a bug, after the database has the answers
                log.exception("task_failed")
                delay = BUSY_DELAY
            if not queue.answers and not queue.alone:
                del self._queues[workspace]
            elif delay:
                asyncio.get_running_loop().call_later(delay, self._turns.put_nowait, workspace)
            else:
                self._turns.put_nowait(workspace)

    async def _settle(self, workspace: str, queue: _Queue, answers: list[_Answer]) -> float:
        """Settles answers, or puts them back; returns the seconds until the workspace's next turn.
        Whatever the call raises, no answer is lost: an exception would end the other calls, and the turns of this
        workspace."""
        keep = workspace in self._slow
        observed, taken = self._observations.take(), time.monotonic()
        reports = [answer.report for answer in answers]
        try:
            with timed(SECONDS, "settled"), traces.step("settle", [answer.span for answer in answers]):
                settled = await self._db.settle(workspace, reports, observed, keep=keep)
        except Exception as error:  # noqa: BLE001 (also what cannot be sent as JSON)
            self._observations.put_back(observed, taken)
            return self._judge(workspace, queue, answers, error, keep)
        if settled.busy:
            self._observations.put_back(observed, taken)
            return self._put_back(queue, answers)
        queue.busy = 0
        self._forget(answers)
        count_answers("realtime", reports)
        if settled.held:
            self._stages.follow_up(workspace)
        # After a broken connection or a timeout, an earlier call may have settled them.
        if settled.accepted < len(reports):
            log.warning("late_reports_refused", refused=len(reports) - settled.accepted)
        log_notices(settled.notices)
        return 0

    def _judge(self, workspace: str, queue: _Queue, answers: list[_Answer], error: Exception, keep: bool) -> float:
        """Decides what happens to answers whose call raised; returns the seconds until the workspace's next turn."""
        if isinstance(error, TooSlow) and not keep:
            self._slow.mark(workspace)
            log.warning("workspace_slow", workspace=workspace, images=len(answers))
            self._put_back(queue, answers)
            return 0
        if isinstance(error, TooSlow | Busy):
            return self._put_back(queue, answers)
        if len(answers) > 1:
            log.error("settle_failed", workspace=workspace, images=len(answers), error=safe_message(error))
            for answer in answers:
                answer.alone = True
            queue.alone.extend(answers)
            return 0
        self._try_later(answers[0], error)
        return 0

    def _put_back(self, queue: _Queue, answers: list[_Answer]) -> float:
        """Puts answers back as they were; returns the seconds until their next turn."""
        if answers[0].alone:
            queue.alone.extendleft(answers)
        else:
            queue.answers[:0] = answers
        queue.busy += 1
        return min(MAX_BUSY_DELAY, BUSY_DELAY * 2.0 ** min(queue.busy, 10))

    def _try_later(self, answer: _Answer, error: Exception) -> None:
        """A report has raised alone: it is sent again later, and in the end dropped."""
        answer.alone = True
        answer.tries += 1
        task, asset = answer.image.task, answer.image.asset_id
        if answer.tries >= MAX_TRIES:
            log.error("report_dropped", task=task, asset=asset, error=safe_message(error))
            self._forget([answer])
            return
        log.error("report_failed", task=task, asset=asset, tries=answer.tries, error=safe_message(error))
        if answer.tries == WHOLE_TRIES:
            lost = TaggingError("transient", "internal_error", "The outcome of this image could not be stored.")
            answer.report = {
                "task": task, "attempt": answer.image.attempt, "called": True, "error": lost.as_json(),
            }  # fmt: skip
        delay = min(MAX_ALONE_DELAY, ALONE_DELAY * 2.0 ** (answer.tries - 1))
        asyncio.get_running_loop().call_later(delay, self._add_alone, answer)

    def _add_alone(self, answer: _Answer) -> None:
        self._queue(answer.image.workspace).alone.append(answer)

    def _forget(self, answers: list[_Answer]) -> None:
        for answer in answers:
            self._claims.drop(answer.image.claim)
        self._unsettled -= len(answers)
        if not self._unsettled:
            self.idle.set()
