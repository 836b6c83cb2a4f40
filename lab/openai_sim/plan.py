"""How the simulator behaves: OpenAI's tier 1 unless a test says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field

from lab.openai_sim.webhooks import make_secret

HOUR = 3600  # seconds
#: Tokens that a model thinks at each effort before it answers: the fewest and the most.
THINKING = {
    "none": (0, 0), "low": (60, 250), "medium": (200, 900), "high": (800, 3000), "xhigh": (2000, 8000),
    "max": (4000, 16_000),
}  # fmt: skip


@dataclass
class Plan:
    """The provider to be; the defaults are OpenAI's tier 1 with quick answers.

    Every field is looked up when a request arrives, so that a test may change it at any time. Only the limits are
    fixed when the simulator is made: to change those, replace `Simulator.limits`.
    """

    key: str = "sk-local"
    requests_per_minute: int = 500
    tokens_per_minute: int = 200_000
    requests_per_day: int | None = 10_000
    queued_batch_tokens: int = 2_000_000
    latency: tuple[float, float] = (0.05, 0.3)  # seconds, uniform
    batch_latency: tuple[float, float] = (2.0, 4.0)  # seconds from creation to completion, uniform
    seed: int = 1
    speed: float = 1.0  # how much faster than real the limits' minutes pass (latencies are as they are given)
    webhook_url: str | None = None  # who is told of the end of a batch …
    webhook_secret: str = field(default_factory=make_secret)  # … signed with this
    #: tokens of thinking by effort, at least and at most; drawn from the picture, the effort and the seed
    thinking: dict[str, tuple[int, int]] = field(default_factory=THINKING.copy)

    # -- the account
    credit: bool = True  # False: 429 insufficient_quota
    models: frozenset[str] | None = None  # None: all that are known; a name that is not known is a model without prices
    flex_available: bool = True  # False: the tier flex answers 429 resource_unavailable

    # -- what other OpenAI-compatible servers lack
    models_endpoint: bool = True
    batch_api: bool = True  # False: /v1/files and /v1/batches answer 404
    min_expires: int = HOUR  # seconds: the least that files may be kept (Azure: 1,209,600)
    rate_headers: bool = True  # False: no x-ratelimit headers
    response_formats: frozenset[str] = frozenset({"json_schema", "json_object", "text"})
    token_parameters: frozenset[str] | None = None  # of max_completion_tokens and max_tokens; None: by the model
    effort_parameter: bool | None = None  # whether reasoning_effort is known; None: by the model
    detail_parameter: bool = True  # whether image_url.detail is known
    vision: bool = True  # False: no model takes images, and the answer says so as LM Studio does
