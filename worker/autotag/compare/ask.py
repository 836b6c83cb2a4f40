"""Asks another model about a sample of tagged images.

The database decides what to ask, when, how often and when to give up (``supabase/schemas/models/compare.sql``); this
module makes the calls. A comparison that stops early lets the calls in flight finish and settles them, because they are
billed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import cast

from autotag.config import Settings
from autotag.db import Operator, Question, Refused
from autotag.db.messages import Brief, Limits, ObservedLimits, TagResult
from autotag.db.operator_messages import Admission, ComparedImage, ComparisonReport, ModelQuestion
from autotag.errors import TaggingError
from autotag.images.load import Images
from autotag.images.sent import data_url, max_side
from autotag.openai.answers import normalise_tags, read_completion, read_usage
from autotag.openai.prompt import max_tags, may_be_empty, request_body
from autotag.openai.provider import Provider
from autotag.texts import clean_text

CONCURRENT_CALLS = 8
MIN_WAIT = 0.05  # seconds between two requests for admission
THUMBNAIL = 480  # pixels of a picture's longer side on the page
MAX_STORED_TAGS = 1000  # of one image

#: Called with the number of images that are done, and the reason why the next one waits (None: it does not wait).
OnProgress = Callable[[int, str | None], None]


@dataclass
class ComparedOutcome:
    """The outcome for one image. With neither a result nor an error, no call was made.

    Attributes:
        sample: the image, with its stored answer.
        result: the answer, as `read_completion` returns it.
        error: why there is no answer.
        seconds: duration of each call that was answered.
        billed: number of answers with usage.
        cost: dollars of all its calls; None: the model has no price.
        cut_off: an answer was cut off.
        thumbnail: the picture as a JPEG.
        failures: number of transient errors.
        cap: minimum cap of the next try, in output tokens.
        sent: when the call in flight was sent (`time.monotonic`).
    """

    sample: ComparedImage
    result: TagResult | None = None
    error: TaggingError | None = None
    seconds: list[float] = field(default_factory=list)
    billed: int = 0
    cost: float | None = 0.0
    cut_off: bool = False
    thumbnail: bytes | None = None
    failures: int = 0
    cap: int | None = None
    sent: float = 0.0

    @property
    def stored_tags(self) -> list[str]:
        """The image's stored tags in the form of an answer's tags (`normalise_tags`), in the stored order."""
        return [tag for tag, _ in normalise_tags([(tag, None) for tag in self.sample.tags], MAX_STORED_TAGS)]


class Comparison:
    """One run over a sample.

    Attributes:
        question: what is asked; it changes when the provider refuses a parameter.
        outcomes: one for each image of the sample, even if the run stops early.
        stopped: why the run stopped early; None: it did not.
    """

    def __init__(
        self, operator: Operator, provider: Provider, images: Images, workspace: str, question: ModelQuestion,
        brief: Brief | None, on_progress: OnProgress, *, thumbnails: bool,
    ) -> None:  # fmt: skip
        """
        Args:
            operator: the database.
            provider: makes the calls.
            images: reads the pictures.
            workspace: the workspace's id.
            question: what to ask (``autotag.question_for``).
            brief: what the workspace's profile asks in addition.
            on_progress: called for every image that is done and every wait.
            thumbnails: keep the pictures.
        """
        self._operator = operator
        self._provider = provider
        self._images = images
        self._workspace = workspace
        self._brief = brief
        self._on_progress = on_progress
        self._thumbnails = thumbnails
        self._admission = asyncio.Lock()
        self._stop = asyncio.Event()
        self._done = 0
        self._proven = False  # one answer was usable
        self.question = question
        self.outcomes: list[ComparedOutcome] = []
        self.stopped: str | None = None

    def stop(self, reason: str) -> None:
        """Starts no further call. Calls in flight are finished and settled."""
        self.stopped = self.stopped or reason
        self._stop.set()

    async def run(self, sample: list[ComparedImage]) -> None:
        """Asks about every image, until all are done or `stop` is called.

        Raises:
            psycopg.Error: the database failed.
        """
        self.outcomes = [ComparedOutcome(one) for one in sample]
        waiting = iter(self.outcomes)
        try:
            async with asyncio.TaskGroup() as callers:
                for _ in range(min(CONCURRENT_CALLS, len(sample))):
                    callers.create_task(self._work(waiting))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _work(self, waiting: Iterator[ComparedOutcome]) -> None:
        for outcome in waiting:
            if self._stop.is_set():
                return
            try:
                await self._ask_until_done(outcome)
            except Refused as refused:
                self.stop(f"{refused} {refused.hint or ''}".strip())

    async def _ask_until_done(self, outcome: ComparedOutcome) -> None:
        jpeg: bytes | None = None
        while not self._stop.is_set():
            question = self.question
            report: ComparisonReport = {
                "called": False, "failures": outcome.failures, "cut_off": outcome.cut_off,
                "proven": self._proven,
            }  # fmt: skip
            observed: ObservedLimits = {}
            outcome.error, outcome.sent = None, 0.0
            try:
                jpeg = jpeg or await self._load(outcome)
                admitted = await self._admit(question, outcome.cap)
                if admitted is None:
                    return
                report |= {
                    "reserved": admitted["reserved"], "reserved_at": admitted["reserved_at"], "cap": admitted["cap"],
                }  # fmt: skip
                observed = cast("ObservedLimits", await self._call(question, jpeg, outcome, report))
            except TaggingError as error:
                outcome.error, observed = error, _limits_of(error, observed)
                report["error"] = error.as_json()
            if observed:
                observed["age"] = time.monotonic() - outcome.sent
            if await self._settle(question, outcome, report, observed):
                return

    async def _load(self, outcome: ComparedOutcome) -> bytes:
        side = max_side(self.question["image_detail"], self.question["image_side"])
        jpeg = (await self._images.load(outcome.sample.image, side)).jpeg
        if self._thumbnails:
            outcome.thumbnail = await self._images.shrink(jpeg, THUMBNAIL)
        return jpeg

    async def _admit(self, question: ModelQuestion, cap: int | None) -> Admission | None:
        """Waits until the limits admit one call; None: the comparison stops.

        Only one caller asks at a time, because the others would get the same refusal.
        """
        async with self._admission:
            while not self._stop.is_set():
                answer = await self._operator.admit_comparison(self._workspace, question, cap)
                if answer["admitted"]:
                    self._on_progress(self._done, None)
                    return answer
                self._on_progress(self._done, answer.get("message") or answer["reason"])
                await self._pause(answer["wait"])
        return None

    async def _call(
        self, question: ModelQuestion, jpeg: bytes, outcome: ComparedOutcome, report: ComparisonReport
    ) -> Limits:
        """Makes one call, and fills ``outcome`` and ``report``; returns the provider's limits from the headers.

        Raises:
            TaggingError: there is no answer, or it is unusable.
        """
        asked = Question(version=0, **question)
        body = request_body(asked, data_url(jpeg), report["cap"], self._brief)
        outcome.sent, report["called"] = time.monotonic(), True
        completion = await self._provider.complete(body)
        outcome.seconds.append(time.monotonic() - outcome.sent)
        report["usage"] = read_usage(completion.body)
        try:
            outcome.result = read_completion(
                completion.body, max_tags(asked, self._brief), self._brief.fields if self._brief else (),
                may_be_empty=may_be_empty(self._brief),
            )  # fmt: skip
        except TaggingError as error:
            error.limits = error.limits or completion.limits
            raise
        self._proven = True
        return completion.limits

    async def _settle(
        self, question: ModelQuestion, outcome: ComparedOutcome, report: ComparisonReport, observed: ObservedLimits
    ) -> bool:
        """Reports one call to the database; returns whether the image is done."""
        step = await self._operator.settle_comparison(self._workspace, question, report, observed or None)
        if report.get("usage"):
            outcome.billed += 1
            outcome.cost = None if outcome.cost is None or step["cost"] is None else outcome.cost + step["cost"]
        error = outcome.error
        outcome.cut_off |= error is not None and error.code == "answer_too_long"
        outcome.failures += error is not None and error.kind == "transient"
        if step["next"] == "stop":
            self.stop(clean_text(step["message"]))
        if step["next"] != "again":
            self._done += 1
            self._on_progress(self._done, None)
            return True
        self.question = step.get("question") or self.question
        outcome.cap = step.get("cap") or outcome.cap
        await self._pause(step.get("wait") or 0)
        return False

    async def _pause(self, seconds: float) -> None:
        """Waits for this time, or until the comparison stops."""
        try:
            async with asyncio.timeout(max(seconds, MIN_WAIT)):
                await self._stop.wait()
        except TimeoutError:
            return


@asynccontextmanager
async def open_comparison(
    operator: Operator, settings: Settings, workspace: str, question: ModelQuestion, brief: Brief | None,
    on_progress: OnProgress, *, thumbnails: bool,
) -> AsyncIterator[Comparison]:  # fmt: skip
    """Opens a comparison with the provider in the settings. For the other arguments, see `Comparison`."""
    images = Images(
        supabase_url=settings.supabase_url, supabase_key=settings.secret_key(), hosts=settings.image_hosts,
        max_bytes=settings.image_max_bytes, memory=settings.memory_bytes(),
        transform=settings.storage_transform,
    )  # fmt: skip
    key = settings.openai_api_key.get_secret_value()
    async with Provider(key, settings.openai_base_url, settings.call_timeout) as provider, images:
        yield Comparison(operator, provider, images, workspace, question, brief, on_progress, thumbnails=thumbnails)


def _limits_of(error: TaggingError, observed: ObservedLimits) -> ObservedLimits:
    """The observed limits, with those from the headers of an error."""
    observed = {**observed, **error.limits}
    if error.kind == "rate_limit" and error.origin == "provider":
        observed["retry_after"] = error.retry_after
    return observed
