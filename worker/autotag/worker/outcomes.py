"""What came of single calls, settled in bulk."""

from __future__ import annotations

import asyncio
from typing import Any

import structlog

from autotag.db import Database, Image
from autotag.db.messages import Outcome, Report
from autotag.observability import traces
from autotag.observability.metrics import SECONDS, count_answers, timed
from autotag.worker.observations import Observations
from autotag.worker.stages import Stages

MAX_REPORTS = 500  # reports in one call

log = structlog.get_logger(__name__)


class Outcomes:
    """Gathers what came of single calls and hands it to the database in bulk.

    While one call of `Database.settle` is under way, answers pile up for the next: under load the bulk grows
    by itself, without a delay for the lone image.
    """

    def __init__(self, db: Database, stages: Stages, observations: Observations) -> None:
        """
        Args:
            db: the database.
            stages: forgets the images that have ended.
            observations: reported with the outcomes.
        """
        self._db = db
        self._stages = stages
        self._observations = observations
        self._waiting: list[tuple[Report, Any]] = []  # each with its span
        self._some = asyncio.Event()
        #: set while everything is settled
        self.idle = asyncio.Event()
        self.idle.set()

    def add(self, image: Image, outcome: Outcome, span: Any = None) -> None:
        """What came of an image; ``span`` as in `traces.image_span`."""
        self._stages.forget(image)
        self._waiting.append(({"task": image.task, "attempt": image.attempt, **outcome}, span))
        self.idle.clear()
        self._some.set()

    async def settle_forever(self) -> None:
        """Reports outcomes until cancelled."""
        while True:
            await self._some.wait()
            self._some.clear()
            while self._waiting:
                bulk, self._waiting = self._waiting[:MAX_REPORTS], self._waiting[MAX_REPORTS:]
                await self._settle([report for report, _ in bulk], [span for _, span in bulk])
            self.idle.set()

    async def _settle(self, reports: list[Report], spans: list[Any]) -> None:
        count_answers("realtime", reports)
        with timed(SECONDS, "settled"), traces.step("settle", spans):
            settled = await self._db.settle(reports, self._observations.take())
        if settled.accepted < len(reports):
            log.warning("late_reports_refused", refused=len(reports) - settled.accepted)
        for notice in settled.notices:
            log.warning(notice["event"], notice=notice["notice"])
