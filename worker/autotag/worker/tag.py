"""Single calls: fetches and prepares an image, calls the model, and reports the outcome."""

from __future__ import annotations

import time

import structlog

from autotag.db import DatabaseSettings, Image, NotHeld
from autotag.db.briefs import Briefs
from autotag.db.messages import Outcome
from autotag.errors import TaggingError
from autotag.images.load import Images
from autotag.images.sent import data_url, max_side
from autotag.observability import traces
from autotag.observability.metrics import SECONDS, timed
from autotag.openai.answers import read_completion, read_usage
from autotag.openai.prompt import max_tags, may_be_empty, request_body
from autotag.openai.provider import Provider
from autotag.worker.observations import Observations
from autotag.worker.outcomes import Outcomes
from autotag.worker.stages import Stages

log = structlog.get_logger(__name__)


class Tagger:
    """Tags images, each with one call."""

    def __init__(
        self,
        images: Images,
        provider: Provider,
        outcomes: Outcomes,
        stages: Stages,
        observations: Observations,
        briefs: Briefs,
    ) -> None:
        """
        Args:
            images: loads the images.
            provider: answers the calls.
            outcomes: gets the outcome of each image.
            stages: gets the stages of each image.
            observations: gets the provider's limits and the number of calls sent.
            briefs: reads what is asked in addition to the question.
        """
        self._images = images
        self._provider = provider
        self._outcomes = outcomes
        self._stages = stages
        self._observations = observations
        self._briefs = briefs

    async def tag(self, image: Image, settings: DatabaseSettings) -> None:
        """Tags one image and reports the outcome. Raises nothing except when it is cancelled."""
        with traces.image_span(image) as span:
            outcome = await self._tag(image, settings)
        self._outcomes.add(image, outcome, span)

    async def _tag(self, image: Image, settings: DatabaseSettings) -> Outcome:
        outcome: Outcome = {"called": False}
        sent = 0.0
        question = settings.question
        try:
            brief = await self._briefs.get(image.brief)
            with timed(SECONDS, "fetched"), traces.step("fetch"):
                prepared = await self._images.load(image, max_side(question.image_detail, question.image_side))
            self._stages.reach(image, "processing")
            body = request_body(question, data_url(prepared.jpeg), image.cap, brief)
            sent, outcome["called"] = time.monotonic(), True
            self._observations.count_sent()
            with timed(SECONDS, "called"), traces.step("call"):
                completion = await self._provider.complete(body)
            self._observations.add_limits(completion.limits, sent)
            outcome["usage"] = read_usage(completion.body)
            outcome["result"] = read_completion(
                completion.body, max_tags(question, brief), brief.fields if brief else (),
                may_be_empty=may_be_empty(brief),
            )  # fmt: skip
            if prepared.notes:
                outcome["result"]["image"] = prepared.notes
        except TaggingError as error:
            outcome["error"] = error.as_json()
            if error.kind == "rate_limit" and error.origin == "provider":
                self._observations.add_limits({**error.limits, "retry_after": error.retry_after}, sent)
            log_error(image, error)
        except NotHeld:  # the lease has ended, so the database would refuse the outcome
            outcome["error"] = TaggingError("transient", "not_held", "Tagging was interrupted.").as_json()
        except Exception as error:
            # A bug must not affect the other images in flight. It counts as a failure of this image, which is retried
            # and finally fails.
            log.exception("unexpected_error_raised", task=image.task)
            outcome["error"] = TaggingError(
                "transient", "internal_error", f"Tagging failed: {type(error).__name__}."
            ).as_json()
        if not outcome["called"]:
            self._observations.count_sent()
        return outcome


def log_error(image: Image, error: TaggingError) -> None:
    """Logs why an image was not tagged this time: account errors as error, image errors as info, others as warning."""
    level = log.error if error.kind == "account" else log.info if error.kind == "image" else log.warning
    level("image_not_tagged", task=image.task, asset=image.asset_id, kind=error.kind, code=error.code,
          message=error.message)  # fmt: skip
