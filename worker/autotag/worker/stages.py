"""Reports the stages of single calls, which users see."""

from __future__ import annotations

import asyncio
import time

import structlog

from autotag.db import CALL_ERRORS, Database, Image, TooSlow
from autotag.db.messages import Sent, Stage, StageReport
from autotag.redact import safe_message
from autotag.worker.notices import log_notices
from autotag.worker.observations import Observations
from autotag.worker.slow import SlowWorkspaces

#: Seconds before a stage is reported; images that leave it sooner skip it, which saves updates of their rows
STAGE_DELAY = 0.15
#: Seconds until the database may broadcast again (settings.broadcast_interval). If the setting is longer, the
#: database's tick broadcasts instead.
FOLLOW_UP_DELAY = 1.0

log = structlog.get_logger(__name__)


class Stages:
    """Collects the stages that images have reached, and reports those that last longer than `STAGE_DELAY`.

    The reports are best effort, because each image's outcome follows. A report that fails or takes too long is dropped,
    and slow workspaces are skipped.
    """

    def __init__(self, db: Database, observations: Observations, slow: SlowWorkspaces) -> None:
        self._db = db
        self._observations = observations
        self._slow = slow
        self._reached: dict[str, dict[int, StageReport]] = {}  # by workspace and task
        self._due = asyncio.Event()
        self._dropped = False  # calls were dropped since the last report
        self._following: dict[str | None, asyncio.TimerHandle] = {}  # timers of workspaces that need another report
        self._held: set[str | None] = set()  # workspaces whose timer has ended

    def drop(self, calls: int) -> None:
        """Notes released calls that will not be sent and have no outcome. Without a report, the database would reserve
        room for them in the provider's limits until the lease ends."""
        self._observations.count_sent(calls)
        self._dropped = True
        self._due.set()

    def reach(self, image: Image, stage: Stage) -> None:
        """Notes that the image has reached a stage."""
        reached = self._reached.get(image.workspace)
        if reached is None:
            reached = self._reached[image.workspace] = {}
            self._due.set()
        reached[image.task] = {"task": image.task, "attempt": image.attempt, "stage": stage}

    def forget(self, image: Image) -> None:
        """Drops the pending report of an image that has an outcome."""
        reached = self._reached.get(image.workspace)
        if reached is not None:
            reached.pop(image.task, None)

    def follow_up(self, workspace: str | None) -> None:
        """Sends another report of this workspace (None: of any workspace) in a second. Some changed rows are not
        broadcast yet, because the last broadcast was too recent; that report broadcasts them."""
        if workspace not in self._following:
            loop = asyncio.get_running_loop()
            self._following[workspace] = loop.call_later(FOLLOW_UP_DELAY, self._make_due, workspace)

    def _make_due(self, workspace: str | None) -> None:
        del self._following[workspace]
        self._held.add(workspace)
        self._due.set()

    async def run(self) -> None:
        """Reports stages until it is cancelled."""
        while True:
            await self._due.wait()
            self._due.clear()
            await asyncio.sleep(STAGE_DELAY)
            if not any(self._reached.values()) and not self._dropped and not self._held:
                self._reached.clear()
                continue
            self._dropped = False
            held, self._held = self._held, set()
            sent, taken = self._observations.take_sent(), time.monotonic()
            for workspace in list(self._reached):
                stages = list(self._reached.pop(workspace).values())
                if stages and workspace not in self._slow and await self._report(workspace, stages, sent):
                    sent = None
                    held.discard(workspace)
                    self.follow_up(workspace)
            for followed in held:
                if (followed is None or followed not in self._slow) and await self._report(followed, [], sent):
                    sent = None
            if sent and not await self._report(None, [], sent):
                self._observations.put_back(sent, taken)

    async def _report(self, workspace: str | None, stages: list[StageReport], sent: Sent | None) -> bool:
        """Reports stages of one workspace; returns whether that worked."""
        try:
            log_notices(await self._db.report_stages(workspace, stages, sent))
            return True
        except TooSlow:
            if workspace:
                self._slow.mark(workspace)
        except CALL_ERRORS as error:  # best effort: the outcomes follow anyway
            log.warning("stages_not_reported", workspace=workspace, images=len(stages), error=safe_message(error))
        return False
