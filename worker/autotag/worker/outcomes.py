"""Reports the outcomes of single calls in bulk."""

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

MAX_REPORTS = 500  # per call of settle

log = structlog.get_logger(__name__)


class Outcomes:
    """Collects the outcomes of single calls and settles them in bulk.

    While one call of `Database.settle` runs, outcomes are collected for the next. So the bulk grows with the load, and
    a single image is not delayed.
    """

    def __init__(self, db: Database, stages: Stages, observations: Observations) -> None:
        """
        Args:
            db: the database.
            stages: the pending stage reports; those of images with an outcome are dropped.
            observations: reported together with the outcomes.
        """
        self._db = db
        self._stages = stages
        self._observations = observations
        self._waiting: list[tuple[Report, Any]] = []  # each report with its span
        self._added = asyncio.Event()
        #: Set while there is nothing to settle.
        self.idle = asyncio.Event()
        self.idle.set()

    def add(self, image: Image, outcome: Outcome, span: Any = None) -> None:
        """Adds the outcome of an image. ``span``: of `traces.image_span`."""
        self._stages.forget(image)
        self._waiting.append(({"task": image.task, "attempt": image.attempt, **outcome}, span))
        self.idle.clear()
        self._added.set()

    async def run(self) -> None:
        """Settles outcomes until it is cancelled."""
        while True:
            await self._added.wait()
            self._added.clear()
            while self._waiting:
                reports, self._waiting = self._waiting[:MAX_REPORTS], self._waiting[MAX_REPORTS:]
                await self._settle([report for report, _ in reports], [span for _, span in reports])
            self.idle.set()

    async def _settle(self, reports: list[Report], spans: list[Any]) -> None:
        count_answers("realtime", reports)
        with timed(SECONDS, "settled"), traces.step("settle", spans):
            settled = await self._db.settle(reports, self._observations.take())
        if settled.accepted < len(reports):
            log.warning("late_reports_refused", refused=len(reports) - settled.accepted)
        for notice in settled.notices:
            log.warning(notice["event"], notice=notice["notice"])
