"""Asks another model about a sample of tagged images.

What to ask, when, how often and when to give up is the database's decision (the migration ``compare``); here the calls
are made. Whatever was paid for is settled before anything ends: a reason to stop lets the calls in flight finish.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

from autotag.db import Image, Operator, Question, Refused
from autotag.db.messages import Limits, Seen, TagResult
from autotag.db.operator_messages import Admission, ComparisonReport, ModelQuestion
from autotag.errors import TaggingError
from autotag.images.load import Images
from autotag.images.prepare import LARGEST_SIDE, data_url, prepare
from autotag.openai.answers import normalise_tags, read_completion, read_usage
from autotag.openai.prompt import request_body
from autotag.openai.provider import Provider
from autotag.texts import clean_text

HANDS = 8  # calls at the same time
SHORTEST_WAIT = 0.05  # seconds between two questions whether there is room
THUMBNAIL = 480  # pixels of a picture's longer side on the page
MOST_TAGS = 1000  # of a stored image
PIXELS = LARGEST_SIDE["high"] ** 2  # of a prepared picture, at most


@dataclass(frozen=True)
class Sample:
    """An image of the host, and what is stored about it."""

    asset_id: str
    bucket: str | None
    path: str | None
    url: str | None
    tags: list[str]
    caption: str | None
    confidence: dict[str, float] | None
    model: str | None

    @property
    def image(self) -> Image:
        """Where it is, as `Images.load` takes it."""
        return Image(0, self.asset_id, self.bucket, self.path, self.url)

    @property
    def normal_tags(self) -> list[str]:
        """Its tags in the form that answers have theirs (`normalise_tags`), in the stored order, to be compared."""
        return [tag for tag, _ in normalise_tags([(tag, None) for tag in self.tags], MOST_TAGS)]


@dataclass
class Outcome:
    """What came of one image; with neither a result nor an error it was not asked about.

    result: as in `read_completion`. seconds: of each call that was answered. cost: dollars of all its calls (None: the
    model has no price). cut_off: an answer about it was.
    """

    sample: Sample
    result: TagResult | None = None
    error: TaggingError | None = None
    seconds: list[float] = field(default_factory=list)
    billed: int = 0  # answers with figures of usage
    cost: float | None = 0.0
    cut_off: bool = False
    thumbnail: bytes | None = None  # a JPEG
    failures: int = 0
    cap: int | None = None  # the least cap of the next try
    sent: float = 0.0  # when the call under way was made (`time.monotonic`)


class Comparison:
    """One run over a sample; `outcomes` grow while it lasts, and stay when it stops early."""

    def __init__(
        self, operator: Operator, provider: Provider, images: Images, workspace: str, question: ModelQuestion,
        told: Callable[[int, str | None], None], *, thumbnails: bool,
    ) -> None:  # fmt: skip
        """
        Args:
            operator: the database.
            provider: who is asked.
            images: where pictures come from.
            workspace: its id.
            question: what to ask (``autotag.question_for``).
            told: hears how many images are done, and what the next one waits for (None: for nothing).
            thumbnails: keep the pictures.
        """
        self._operator = operator
        self._provider = provider
        self._images = images
        self._workspace = workspace
        self._told = told
        self._thumbnails = thumbnails
        self._gate = asyncio.Lock()
        self._stop = asyncio.Event()
        self._done = 0
        self._proven = False  # an answer was of use
        self.question = question
        self.outcomes: list[Outcome] = []
        self.stopped: str | None = None  # why it ended early

    def stop(self, reason: str) -> None:
        """Begins nothing new; what is in flight is finished and settled."""
        self.stopped = self.stopped or reason
        self._stop.set()

    async def run(self, sample: list[Sample]) -> None:
        """Asks about every image, or until something stops it (`stopped` says what).

        Raises:
            psycopg.Error: the database failed.
        """
        self.outcomes = [Outcome(one) for one in sample]
        waiting = iter(self.outcomes)
        try:
            async with asyncio.TaskGroup() as hands:
                for _ in range(min(HANDS, len(sample))):
                    hands.create_task(self._work(waiting))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _work(self, waiting: Iterator[Outcome]) -> None:
        for outcome in waiting:
            if self._stop.is_set():
                return
            try:
                await self._ask_until_done(outcome)
            except Refused as refused:
                self.stop(f"{refused} {refused.hint or ''}".strip())

    async def _ask_until_done(self, outcome: Outcome) -> None:
        jpeg: bytes | None = None
        while not self._stop.is_set():
            question = self.question
            report: ComparisonReport = {
                "called": False, "failures": outcome.failures, "cut_off": outcome.cut_off,
                "proven": self._proven,
            }  # fmt: skip
            seen: Seen = {}
            outcome.error, outcome.sent = None, 0.0
            try:
                jpeg = jpeg or await self._load(outcome)
                admitted = await self._admitted(question, outcome.cap)
                if admitted is None:
                    return
                report |= {
                    "reserved": admitted["reserved"], "reserved_at": admitted["reserved_at"], "cap": admitted["cap"],
                }  # fmt: skip
                seen = cast("Seen", await self._call(question, jpeg, outcome, report))
            except TaggingError as error:
                outcome.error, seen = error, _limits(error, seen)
                report["error"] = error.as_json()
            if seen:
                seen["age"] = time.monotonic() - outcome.sent
            if await self._settle(question, outcome, report, seen):
                return

    async def _load(self, outcome: Outcome) -> bytes:
        jpeg = await self._images.load(outcome.sample.image, LARGEST_SIDE[self.question["image_detail"]])
        if self._thumbnails:
            outcome.thumbnail = await asyncio.to_thread(prepare, jpeg, THUMBNAIL, PIXELS)
        return jpeg

    async def _admitted(self, question: ModelQuestion, cap: int | None) -> Admission | None:
        """The place of one call under the limits; None: the comparison stops. One hand after the other asks, so that
        the rest do not ask in vain."""
        async with self._gate:
            while not self._stop.is_set():
                answer = await self._operator.admit_comparison(self._workspace, question, cap)
                if answer["admitted"]:
                    self._told(self._done, None)
                    return answer
                self._told(self._done, answer.get("message") or answer["reason"])
                await self._pause(answer["wait"])
        return None

    async def _call(self, question: ModelQuestion, jpeg: bytes, outcome: Outcome, report: ComparisonReport) -> Limits:
        """Fills the outcome; what the headers say.

        Raises:
            TaggingError: there is no answer, or one of no use.
        """
        asked = Question(version=0, **question)
        body = request_body(asked, data_url(jpeg), report["cap"])
        outcome.sent, report["called"] = time.monotonic(), True
        completion = await self._provider.complete(body)
        outcome.seconds.append(time.monotonic() - outcome.sent)
        report["usage"] = read_usage(completion.body)
        try:
            outcome.result = read_completion(completion.body, asked.max_tags)
        except TaggingError as error:
            error.limits = error.limits or completion.limits
            raise
        self._proven = True
        return completion.limits

    async def _settle(self, question: ModelQuestion, outcome: Outcome, report: ComparisonReport, seen: Seen) -> bool:
        """Whether the image is done."""
        step = await self._operator.settle_comparison(self._workspace, question, report, seen or None)
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
            self._told(self._done, None)
            return True
        self.question = step.get("question") or self.question
        outcome.cap = step.get("cap") or outcome.cap
        await self._pause(step.get("wait") or 0)
        return False

    async def _pause(self, seconds: float) -> None:
        """So long, or until the comparison stops."""
        try:
            async with asyncio.timeout(max(seconds, SHORTEST_WAIT)):
                await self._stop.wait()
        except TimeoutError:
            return


def _limits(error: TaggingError, seen: Seen) -> Seen:
    """What an error's headers say of the provider's bucket."""
    seen = {**seen, **error.limits}
    if error.kind == "rate_limit" and error.origin == "provider":
        seen["retry_after"] = error.retry_after
    return seen
