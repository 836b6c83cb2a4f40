"""Every provider's headers show what its limits count: a minute or a day, requests or tokens."""

from __future__ import annotations

import time
from datetime import UTC, datetime

import pytest

from autotag.openai.classify import classify_status
from autotag.openai.headers import read_limits


def minute(limit: int, left: int) -> dict[str, int]:
    return {"requests_limit": limit, "requests_left": left}


def day(limit: int, left: int) -> dict[str, int]:
    return {"day_limit": limit, "day_left": left}


def unclear(limit: int, left: int) -> dict[str, int]:
    return {"unclear_limit": limit, "unclear_left": left}


@pytest.mark.parametrize(
    ("limit", "left", "reset", "means"),
    [
        # OpenAI: tier 1 sends its limit per day, the others the one per minute
        (10_000, 9_999, "8.64s", day(10_000, 9_999)), (10_000, 9_998, "17.28s", day(10_000, 9_998)),
        (10_000, 9_998, "8.64s", day(10_000, 9_998)), (10_000, 0, "23h59m51.36s", day(10_000, 0)),
        (200, 199, "7m12s", day(200, 199)), (200, 100, "12h0m0s", day(200, 100)),
        (1_000, 999, "60ms", minute(1_000, 999)), (500, 499, "120ms", minute(500, 499)),
        (60, 59, "1s", minute(60, 59)), (60, 0, "1m0s", minute(60, 0)), (500, 380, "14.4s", minute(500, 380)),
        (10_000, 9_999, "6ms", minute(10_000, 9_999)), (30_000, 29_999, "2ms", minute(30_000, 29_999)),
        (500, 0, "1m12.5s", minute(500, 0)),  # in debt
        (10_000, 9_999, "1ms", unclear(10_000, 9_999)),  # a thousandth of a request is used: of a day, or of a minute
        # Groq: always per day
        (14_400, 14_370, "2m59.56s", day(14_400, 14_370)), (1_000, 999, "1m26.4s", day(1_000, 999)),
        (1_000, 997, "4m19.2s", day(1_000, 997)),
        # seconds without a unit
        (10_000, 9_999, "8.64", day(10_000, 9_999)), (1_000, 999, "0.06", minute(1_000, 999)),
        (2_400, 2_200, "33011.38", day(2_400, 2_200)),
        (2_500, 2_499, "24", unclear(2_500, 2_499)),  # the end of a window: of a minute, or soon of a day
        (1_000, 900, "86400", day(1_000, 900)),
        # missing, zero and nonsense
        (480, 479, None, unclear(480, 479)), (500, 500, "0s", unclear(500, 500)), (500, 400, "0", unclear(500, 400)),
        (500, 0, "0s", unclear(500, 0)), (500, 499, "soon", unclear(500, 499)), (500, 499, "-3s", unclear(500, 499)),
        (500, 499, "", unclear(500, 499)), (500, 499, "9" * 30, unclear(500, 499)),
        (500, 499, "2020-01-01T00:00:00Z", unclear(500, 499)),
    ],
)  # fmt: skip
def test_a_limit_of_requests_counts_a_minute_or_a_day(
    limit: int, left: int, reset: str | None, means: dict[str, int]
) -> None:
    headers = {"x-ratelimit-limit-requests": str(limit), "x-ratelimit-remaining-requests": str(left)}
    assert read_limits(headers | ({} if reset is None else {"x-ratelimit-reset-requests": reset})) == means


def test_the_end_of_a_window_may_be_a_time() -> None:
    headers = {"x-ratelimit-limit-requests": "50", "x-ratelimit-remaining-requests": "3"}
    later = time.time() + 40_000
    for reset in (str(int(later)), str(int(later * 1000)), datetime.fromtimestamp(later, UTC).isoformat()):
        assert read_limits({**headers, "x-ratelimit-reset-requests": reset}) == day(50, 3)
    assert read_limits({**headers, "x-ratelimit-reset-requests": str(int(time.time() + 30))}) == unclear(50, 3)


def test_names_and_renewal_periods_say_what_a_limit_counts() -> None:
    def named(**values: str) -> dict[str, str]:
        return {f"x-ratelimit-{name.replace('_', '-')}": value for name, value in values.items()}

    azure = named(limit_requests="2500", remaining_requests="2499", reset_requests="24", renewalperiod_requests="60")
    assert read_limits(azure) == minute(2500, 2499)
    litellm = {name.replace("x-ratelimit-renewal", "llm_provider-x-ratelimit-renewal"): v for name, v in azure.items()}
    assert read_limits(litellm) == minute(2500, 2499)
    ten_seconds = named(limit_requests="50", remaining_requests="45", renewalperiod_requests="10")
    assert read_limits(ten_seconds) == minute(300, 45)
    assert read_limits(named(limit_requests="50", remaining_requests="45", renewalperiod_requests="3600")) == day(
        1200, 45
    )
    mistral = named(limit_req_minute="30", remaining_req_minute="29", limit_tokens_minute="937500",
                    remaining_tokens_minute="937000", limit_tokens_month="1000000000")  # fmt: skip
    assert read_limits(mistral) == {**minute(30, 29), "tokens_limit": 937_500, "tokens_left": 937_000}
    cerebras = named(limit_requests_day="2400", remaining_requests_day="2200", limit_tokens_minute="30000",
                     remaining_tokens_minute="29000", limit_tokens_day="1000000", remaining_tokens_day="900000")  # fmt: skip
    assert read_limits(cerebras) == {**day(2400, 2200), "tokens_limit": 30_000, "tokens_left": 29_000}
    both = named(limit_requests="60", remaining_requests="42", reset_requests="18.0", limit_requests_day="1000",
                 remaining_requests_day="900", reset_requests_day="86400")  # fmt: skip
    assert read_limits(both) == {**minute(60, 42), **day(1000, 900)}
    assert read_limits(named(limit="50", remaining="0", reset="1788220800000")) == {}, "the unit is not known"


def test_tokens_of_a_day_are_not_tokens_of_a_minute() -> None:
    tokens = {"x-ratelimit-limit-tokens": "500000", "x-ratelimit-remaining-tokens": "499000"}
    for reset in ("2m52.8s", "1h0m0s", "86000"):
        assert read_limits({**tokens, "x-ratelimit-reset-tokens": reset}) == {}
    for reset in ("120ms", "7.66s", "1", "0"):
        assert read_limits({**tokens, "x-ratelimit-reset-tokens": reset})["tokens_limit"] == 500_000


def test_a_429_says_in_other_words_how_long_to_wait() -> None:
    """Some 429s have no retry-after: OpenRouter's have the end of the day in the body, Azure's a header for the
    reset."""
    ends = {
        "X-RateLimit-Limit": "50",
        "X-RateLimit-Remaining": "0",
        "X-RateLimit-Reset": str(int((time.time() + 600) * 1000)),
    }
    error = classify_status(
        429, {"error": {"message": "free-models-per-day", "code": 429, "metadata": {"headers": ends}}}, {}
    )
    assert error.retry_after == pytest.approx(600, abs=30)
    azure = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "55"}
    assert classify_status(429, None, azure).retry_after == 55
    assert classify_status(429, None, {**azure, "retry-after": "3"}).retry_after == 3
    assert (
        classify_status(429, None, {"x-ratelimit-remaining-tokens": "7", "x-ratelimit-reset-tokens": "55"}).retry_after
        == 1
    )


def test_a_429_names_the_limit_of_the_day() -> None:
    message = ("Rate limit reached for gpt-4o-mini in organization org-xx on requests per day (RPD): Limit 1000, Used"
               " 1000, Requested 1. Please try again in 1m26.4s.")  # fmt: skip
    error = classify_status(429, {"error": {"code": "rate_limit_exceeded", "message": message}}, {})
    assert (error.kind, error.retry_after, error.limits) == ("rate_limit", 86.4, day(1000, 0))
