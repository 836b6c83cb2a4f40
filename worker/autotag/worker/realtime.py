"""Single calls: claim, prepare, call, settle in bulk."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import psycopg
import structlog

from autotag.db import Database, Image
from autotag.errors import TaggingError
from autotag.images.prepare import LARGEST_SIDE, Images, data_url
from autotag.observability import traces
from autotag.observability.metrics import CLAIMED, CLAIMS, IN_FLIGHT, SECONDS, count_answers, timed
from autotag.openai.answers import read_completion, read_usage
from autotag.openai.prompt import Question, request_body
from autotag.openai.provider import Provider
from autotag.redact import said
from autotag.worker.wake import Wake

STAGE_DELAY = 0.15  # seconds a stage must last to be worth a write; quick images skip it
SETTLE_MOST = 500  # reports in one call
RECLAIM_DELAY = 0.05  # seconds that freed hands gather before the next claim, when all were full …
RECLAIM_SHARE = 4  # … unless one in so many of them is free earlier
CLAIM_RETRY = 1.0  # seconds after a claim that failed

log = structlog.get_logger(__name__)


class Reports:
    """Gathers what single calls have to report and hands it to the database in bulk.

    While one call of `Database.settle` is under way, answers pile up for the next: under load the bulk grows
    by itself, without a delay for the lone image.
    """

    def __init__(self, db: Database) -> None:
        self._db = db
        self._outcomes: list[dict[str, Any]] = []
        self._spans: list[Any] = []
        self._stages: dict[int, dict[str, Any]] = {}
        self._seen: dict[str, Any] = {}
        self._seen_at = 0.0
        self._sent = 0
        self._first_sent = 0.0
        self._some = asyncio.Event()
        self._stage_due = asyncio.Event()
        self.idle = asyncio.Event()
        self.idle.set()

    def stage(self, image: Image, stage: str) -> None:
        """The image has reached a stage; told when it lasts."""
        self._stages[image.task] = {"task": image.task, "attempt": image.attempt, "stage": stage}
        self._stage_due.set()

    def limits(self, seen: dict[str, Any], sent: float) -> None:
        """What an answer's headers say of the bucket when the call was sent (`time.monotonic`); that of the
        newest call wins, a wait is kept at its longest."""
        wait = max(seen.get("retry_after") or 0, self._seen.get("retry_after") or 0)
        if sent >= self._seen_at:
            self._seen, self._seen_at = {**self._seen, **seen}, sent
        if wait:
            self._seen["retry_after"] = wait

    def sent(self) -> None:
        """A released call is on its way now, or will never be made."""
        self._first_sent = self._first_sent if self._sent else time.monotonic()
        self._sent += 1

    def _take_sent(self) -> dict[str, Any]:
        """How many calls were sent since the last time, and seconds since the first of them."""
        if not self._sent:
            return {}
        told = {"sent": self._sent, "sent_age": time.monotonic() - self._first_sent}
        self._sent = 0
        return told

    def _take_seen(self) -> dict[str, Any] | None:
        """What has been seen since the last time, and how old it is."""
        seen = self._take_sent()
        if self._seen:
            seen |= {**self._seen, "age": time.monotonic() - self._seen_at}
            self._seen, self._seen_at = {}, 0.0
        return seen or None

    def outcome(self, image: Image, report: dict[str, Any], span: Any = None) -> None:
        """What came of an image; ``span`` as in `traces.image_span`."""
        self._spans.append(span)
        self._stages.pop(image.task, None)
        self._outcomes.append({"task": image.task, "attempt": image.attempt, **report})
        self.idle.clear()
        self._some.set()

    async def settle_forever(self) -> None:
        while True:
            await self._some.wait()
            self._some.clear()
            while self._outcomes:
                bulk, self._outcomes = self._outcomes[:SETTLE_MOST], self._outcomes[SETTLE_MOST:]
                count_answers("realtime", bulk)
                spans, self._spans = self._spans[:SETTLE_MOST], self._spans[SETTLE_MOST:]
                with timed(SECONDS, "settled"), traces.step("settle", spans):
                    settled = await self._db.settle(bulk, self._take_seen())
                if settled.accepted < len(bulk):
                    log.warning("late_reports_refused", refused=len(bulk) - settled.accepted)
                for notice in settled.notices:
                    log.warning(notice["event"], notice=notice["notice"])
            self.idle.set()

    async def tell_stages_forever(self) -> None:
        while True:
            await self._stage_due.wait()
            self._stage_due.clear()
            await asyncio.sleep(STAGE_DELAY)
            if self._stages:
                stages, self._stages = list(self._stages.values()), {}
                await self._db.report_stages(stages, self._take_sent() or None)


async def tag(image: Image, images: Images, provider: Provider, question: Question, reports: Reports) -> None:
    """Tags one image and reports what came of it; never raises but when cancelled."""
    with traces.image_span(image) as span:
        report = await _tag(image, images, provider, question, reports)
    reports.outcome(image, report, span)


async def _tag(
    image: Image, images: Images, provider: Provider, question: Question, reports: Reports
) -> dict[str, Any]:
    """The report about one image."""
    report: dict[str, Any] = {"called": False}
    sent = 0.0
    try:
        reports.stage(image, "preparing")
        with timed(SECONDS, "fetched"), traces.step("fetch"):
            jpeg = await images.load(image, LARGEST_SIDE[question.image_detail])
        reports.stage(image, "processing")
        body = request_body(question, data_url(jpeg), image.cap)
        sent, report["called"] = time.monotonic(), True
        reports.sent()
        with timed(SECONDS, "called"), traces.step("call"):
            completion = await provider.complete(body)
        reports.limits(completion.limits, sent)
        report["usage"] = read_usage(completion.body)
        report["result"] = read_completion(completion.body, question.max_tags)
    except TaggingError as error:
        report["error"] = error.as_json()
        if error.kind == "rate_limit" and error.origin == "provider":
            reports.limits({**error.limits, "retry_after": error.retry_after}, sent)
        log_error(image, error)
    except Exception as error:
        # A defect of ours must not take the other images in flight with it: this one counts a failure and
        # ends, after its tries, as failed.
        log.exception("unexpected_error", task=image.task)
        report["error"] = TaggingError(
            "transient", "internal_error", f"Tagging failed: {type(error).__name__}."
        ).as_json()
    if not report["called"]:
        reports.sent()
    return report


def log_error(image: Image, error: TaggingError) -> None:
    level = log.error if error.kind == "account" else log.info if error.kind == "image" else log.warning
    level("image_not_tagged", task=image.task, asset=image.asset_id, kind=error.kind, code=error.code,
          message=error.message)  # fmt: skip


async def run(
    db: Database,
    wake: Wake,
    slots: int,
    tag_image: Callable[[Image, Question], Coroutine[Any, Any, None]],
    deadline: float,
) -> None:
    """The lane, until the worker stops; then at most ``deadline`` seconds more for what is in hand."""
    hands = Hands(wake, slots)
    bound: str | None = None
    while not wake.stop.is_set():
        free = slots - len(hands.busy)
        wait: float | None = None
        if free > 0:
            try:
                claim = await db.claim(free)
                wait = claim.wait
                CLAIMS.labels(claim.bound or "nothing").inc()
                if claim.bound == "outdone" != bound:
                    log.warning(
                        "other_workers_are_asked",
                        hint="Workers with another OPENAI_BASE_URL or OPENAI_API_KEY are there. This one gets nothing "
                        "while they are and nothing is wrong with theirs.",
                    )
                bound = claim.bound
            except psycopg.Error as error:
                log.error("claim_failed", error=said(error))
                await wake.pause(CLAIM_RETRY)
                await db.release_unheld(tasks=[image.task for image in hands.busy.values()])
                continue
            CLAIMED.inc(len(claim.images))
            for image in claim.images:
                hands.take(image, tag_image(image, claim.question))
        await hands.wait(wait)
    await hands.finish(deadline)


class Hands:
    """What a worker tags at the moment; so many images at most."""

    def __init__(self, wake: Wake, slots: int) -> None:
        self.busy: dict[asyncio.Task[None], Image] = {}
        self._wake, self._slots = wake, slots
        self._full = False
        self._gathering: asyncio.TimerHandle | None = None
        self._waited = SECONDS.labels("waited")
        IN_FLIGHT.labels("realtime").set_function(lambda: len(self.busy))

    def take(self, image: Image, tagging: Coroutine[Any, Any, None]) -> None:
        self._waited.observe(image.waited)
        task = asyncio.create_task(tagging)
        self.busy[task] = image
        task.add_done_callback(self._free)

    def _free(self, task: asyncio.Task[None]) -> None:
        self.busy.pop(task)
        if self._full and (self._slots - len(self.busy)) * RECLAIM_SHARE >= self._slots:
            self._full = False
            self._wake.notify("realtime")
        elif self._full and self._gathering is None:
            loop = asyncio.get_running_loop()
            self._gathering = loop.call_later(RECLAIM_DELAY, self._wake.notify, "realtime")

    async def wait(self, seconds: float | None) -> None:
        """Until it is worth claiming again; when all hands are full, until some are free."""
        self._full = len(self.busy) >= self._slots
        await self._wake.wait("realtime", None if self._full else seconds)  # full: a free hand wakes us
        if self._gathering:
            self._gathering.cancel()
            self._gathering = None

    async def finish(self, deadline: float) -> None:
        if not self.busy:
            return
        log.info("finishing", images=len(self.busy), deadline=deadline)
        await asyncio.wait(self.busy, timeout=deadline)
        rest = list(self.busy)
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)
