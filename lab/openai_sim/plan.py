"""How the simulator behaves: as OpenAI's tier 1, unless a test changes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from lab.openai_sim.limits import RequestHeaders
from lab.openai_sim.webhooks import make_secret

HOUR = 3600  # seconds
#: Reasoning tokens of an answer by effort: minimum and maximum.
REASONING_TOKENS = {
    "none": (0, 0), "low": (60, 250), "medium": (200, 900), "high": (800, 3000), "xhigh": (2000, 8000),
    "max": (4000, 16_000),
}  # fmt: skip


@dataclass
class Plan:
    """The provider to simulate; the defaults are OpenAI's tier 1 with short latencies.

    The simulator reads every field when a request arrives, so a test may change a field at any time. Only the limits
    are fixed when the simulator is created: to change them, replace `Simulator.limits`.
    """

    key: str = "sk-local"
    requests_per_minute: int = 500
    tokens_per_minute: int = 200_000
    requests_per_day: int | None = 10_000
    queued_batch_tokens: int = 2_000_000
    latency: tuple[float, float] = (0.05, 0.3)  # seconds, uniform
    hold_answers: bool = False  # while set, no call and no line of a batch is answered
    batch_latency: tuple[float, float] = (2.0, 4.0)  # seconds from creation to completion, uniform
    batch_validation: float | None = None  # seconds in `validating`; None: a tenth of batch_latency
    batch_may_end: asyncio.Event | None = None  # a batch stays `cancelling` until it is set (OpenAI: up to ten minutes)
    seed: int = 1
    speed: float = 1.0  # how much faster than real time the limits refill (latencies are not scaled)
    webhook_url: str | None = None  # receives an event when a batch ends
    webhook_secret: str = field(default_factory=make_secret)  # signs the event
    #: reasoning tokens by effort, minimum and maximum; picture, effort and seed determine the number
    reasoning_tokens: dict[str, tuple[int, int]] = field(default_factory=REASONING_TOKENS.copy)

    #: replaces the tags of a picture by others
    tags: Callable[[tuple[str, ...]], tuple[str, ...]] | None = None

    # -- the account
    credit: bool = True  # False: 429 insufficient_quota
    models: frozenset[str] | None = None  # None: all in `models`; a name that is not there gets a model without prices
    flex_available: bool = True  # False: requests for the tier flex get 429 resource_unavailable

    # -- what some OpenAI-compatible servers lack
    models_endpoint: bool = True
    batch_api: bool = True  # False: /v1/files and /v1/batches answer 404
    min_expires: int = HOUR  # seconds: the shortest expiry of a file (Azure: 1,209,600)
    rate_headers: bool = True  # False: no x-ratelimit headers
    request_headers: RequestHeaders = "day"  # what the headers about requests count, if there is a limit per day
    response_formats: frozenset[str] = frozenset({"json_schema", "json_object", "text"})
    # the supported ones of max_completion_tokens and max_tokens; None: as the model does
    token_parameters: frozenset[str] | None = None
    effort_parameter: bool | None = None  # whether reasoning_effort is supported; None: as the model does
    detail_parameter: bool = True  # whether image_url.detail is supported
    vision: bool = True  # False: no model accepts images; the error is LM Studio's

    async def until_answers(self) -> None:
        """Waits while answers are held."""
        while self.hold_answers:  # noqa: ASYNC110 - tests set it from other threads, too
            await asyncio.sleep(0.02)
