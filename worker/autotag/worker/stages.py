"""Reports the stages of single calls, which users see."""

from __future__ import annotations

import asyncio

from autotag.db import Database, Image
from autotag.db.messages import Stage, StageReport
from autotag.worker.observations import Observations

STAGE_DELAY = 0.15  # seconds before a stage is reported; faster images skip it, which saves updates of their rows


class Stages:
    """Collects the stages that images have reached, and reports those that last longer than `STAGE_DELAY`."""

    def __init__(self, db: Database, observations: Observations) -> None:
        self._db = db
        self._observations = observations
        self._reached: dict[int, StageReport] = {}
        self._due = asyncio.Event()

    def reach(self, image: Image, stage: Stage) -> None:
        """Notes that the image has reached a stage."""
        self._reached[image.task] = {"task": image.task, "attempt": image.attempt, "stage": stage}
        self._due.set()

    def forget(self, image: Image) -> None:
        """Drops the pending report of an image that has an outcome."""
        self._reached.pop(image.task, None)

    async def run(self) -> None:
        """Reports stages until it is cancelled."""
        while True:
            await self._due.wait()
            self._due.clear()
            await asyncio.sleep(STAGE_DELAY)
            if self._reached:
                stages, self._reached = list(self._reached.values()), {}
                await self._db.report_stages(stages, self._observations.take_sent())
