"""Where single calls are, for those who watch."""

from __future__ import annotations

import asyncio

from autotag.db import Database, Image
from autotag.db.messages import Stage, StageReport
from autotag.worker.observations import Observations

STAGE_DELAY = 0.15  # seconds a stage must last to be worth a write; quick images skip it


class Stages:
    """Gathers the stages that images have reached, and reports those that last."""

    def __init__(self, db: Database, observations: Observations) -> None:
        self._db = db
        self._observations = observations
        self._reached: dict[int, StageReport] = {}
        self._due = asyncio.Event()

    def reach(self, image: Image, stage: Stage) -> None:
        """The image has reached a stage."""
        self._reached[image.task] = {"task": image.task, "attempt": image.attempt, "stage": stage}
        self._due.set()

    def forget(self, image: Image) -> None:
        """The image has ended; its stage need not be told any more."""
        self._reached.pop(image.task, None)

    async def report_forever(self) -> None:
        """Reports stages until cancelled."""
        while True:
            await self._due.wait()
            self._due.clear()
            await asyncio.sleep(STAGE_DELAY)
            if self._reached:
                stages, self._reached = list(self._reached.values()), {}
                await self._db.report_stages(stages, self._observations.take_sent())
