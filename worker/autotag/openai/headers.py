"""Reads rate limits and waits from the headers (and messages) of the provider's answers.

Providers use the same names for different limits: ``x-ratelimit-limit-requests`` counts a minute at most of them, but a
day at Groq and in OpenAI's tier 1. `_period` tells the two apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from time import time
from typing import NamedTuple, cast

from autotag.db.messages import Limits
from autotag.waits import MAX_RETRY_AFTER

MINUTE, DAY = 60.0, 86_400.0  # seconds
#: Seconds. No limit per minute takes longer to reset, even if the provider lets its bucket fall below zero.
MAX_MINUTE_RESET = 120.0
#: Seconds. A limit with a period of at most this (Azure's: 10 s) counts as one per minute, any other as one per day.
MAX_SHORT_PERIOD = 600.0
RESOLUTION = 0.001  # seconds; OpenAI rounds resets to milliseconds
MAX_RESET = 32 * DAY  # a later reset is nonsense

#: Suffixes of the headers about requests, with the period if the name contains it. OpenAI, Groq, Azure and LiteLLM use
#: the first; Cerebras and SambaNova use `-requests-day`, Mistral `-req-minute`, DigitalOcean those with `-per-`.
_REQUESTS = {
    "requests": None, "requests-minute": MINUTE, "requests-per-minute": MINUTE, "req-minute": MINUTE,
    "requests-day": DAY, "requests-per-day": DAY, "req-day": DAY,
}  # fmt: skip
_TOKENS = {"tokens": None, "tokens-minute": MINUTE, "tokens-per-minute": MINUTE}

_COUNT = re.compile(r"[0-9]{1,10}")
_SECONDS = re.compile(r"[0-9]{1,15}(\.[0-9]{1,9})?")
_DURATION = re.compile(
    r"(?:(\d{1,3})d)?(?:(\d{1,5})h)?(?:(\d{1,6})m(?!s))?(?:(\d{1,8}(?:\.\d{1,9})?)s)?"
    r"(?:(\d{1,9}(?:\.\d{1,9})?)ms)?(?:(\d{1,9}(?:\.\d{1,9})?)[uµ]s)?"
)
_DURATION_UNITS = (DAY, 3600.0, MINUTE, 1.0, 1e-3, 1e-6)
_DAILY_REFUSAL = re.compile(r"requests per day \(RPD\):? Limit:? ([0-9]{1,9})\b", re.IGNORECASE)


class Reset(NamedTuple):
    """When a limit is fully available again.

    seconds: from now. fixed: the whole limit returns at once, when its window ends; otherwise it refills continuously.
    """

    seconds: float
    fixed: bool


def read_limits(headers: Mapping[str, str]) -> Limits:
    """The provider's limits and what is left of them, from ``x-ratelimit-*`` headers.

    Requests per minute are ``requests_…``, requests per day ``day_…``, and requests of a period that cannot be told
    ``unclear_…``. Compatible servers omit headers or send zeros and words, so implausible values are dropped.
    "Remaining" without "limit" is dropped, too: servers without rate limits were seen to send remaining 0.
    """
    values: dict[str, int] = {}
    for limit, left, period, clear in _read(headers, _REQUESTS):
        name = "unclear" if not clear else "requests" if period == MINUTE else "day"
        values |= _pair(name, limit, left)
    for limit, left, period, _ in _read(headers, _TOKENS):
        if period == MINUTE:  # limits of tokens per day are not mirrored; their 429s have a retry-after
            values |= _pair("tokens", limit, left)
    return cast("Limits", values)


def _pair(name: str, limit: int, left: int | None) -> dict[str, int]:
    return {f"{name}_limit": limit} | ({} if left is None else {f"{name}_left": min(left, limit)})


def _read(
    headers: Mapping[str, str], endings: Mapping[str, float | None]
) -> Iterator[tuple[int, int | None, float, bool]]:
    """Each limit as (limit, left, period, whether the period is clear); the period is `MINUTE` or `DAY`."""
    for ending, named in endings.items():
        limit = _count(headers.get(f"x-ratelimit-limit-{ending}"))
        left = _count(headers.get(f"x-ratelimit-remaining-{ending}"))
        if not limit:
            continue
        period = named or _renewal_period(headers, ending)
        clear = period is not None
        if period is None:
            reset = read_reset(headers.get(f"x-ratelimit-reset-{ending}"))
            if ending in ("tokens", "requests"):
                period = _period(limit, left, reset, refills=ending == "requests")
            clear = period is not None
        period = period or MINUTE
        unit = MINUTE if period <= MAX_SHORT_PERIOD else DAY
        yield max(1, min(round(limit * unit / period), 2**31 - 1)), left, unit, clear


def _period(limit: int, left: int | None, reset: Reset | None, *, refills: bool) -> float | None:
    """The period that a limit counts, from its reset; None: it cannot be told.

    A bucket that refills continuously is full again after the same share of the period as the share of the limit that
    was used. For example, if 9,999 of 10,000 are left, a reset of 8.64 s means a day, and 6 ms mean a minute.

    Args:
        limit: units per period.
        left: units left, rounded down.
        reset: when the limit is fully available again.
        refills: whether the reset is proportional to the used share. For tokens it is not: Groq documents 7.66 s for 3
            of 18,000 tokens a minute.
    """
    if reset is None:
        return None
    if reset.seconds > MAX_MINUTE_RESET:
        return DAY
    if reset.fixed or left is None or left >= limit or not refills:
        return None
    used = limit - left  # at least used - 1, because `left` is rounded down
    if (reset.seconds - RESOLUTION) * limit / used > MAX_MINUTE_RESET:
        return DAY
    # This is the first request after a pause. Between 0 and 1 may be used, so a short reset may belong to any period.
    longest = (reset.seconds + RESOLUTION) * limit / (used if used == 1 else used - 1)
    return MINUTE if longest > 0.95 * MINUTE else None


def _renewal_period(headers: Mapping[str, str], ending: str) -> float | None:
    """The length of the window in seconds. Azure and GitHub send it; LiteLLM passes it on with a prefix."""
    for prefix in ("", "llm_provider-"):
        seconds = _count(headers.get(f"{prefix}x-ratelimit-renewalperiod-{ending}"))
        if seconds and seconds <= MAX_RESET:
            return float(seconds)
    return None


def _count(value: str | None) -> int | None:
    if value is None or not _COUNT.fullmatch(value) or int(value) >= 2**31:
        return None
    return int(value)


def read_reset(value: str | None) -> Reset | None:
    """Reads a reset: a duration (``1m30.5s``, ``6m0s``, ``120ms``), seconds, or a time (ISO, epoch in s or ms).

    Whole seconds and times are the end of a fixed window (Azure, OpenRouter); durations and fractions of a second
    belong to limits that refill (OpenAI, Groq). None: missing, past or nonsense.
    """
    value = (value or "").strip()
    reset = None
    if match := _SECONDS.fullmatch(value):
        seconds = float(value)
        if seconds >= 1e9:  # a time, in milliseconds from 1e11 on
            seconds = seconds / (1000 if seconds >= 1e11 else 1) - time()
            reset = Reset(seconds, fixed=True)
        else:
            reset = Reset(seconds, fixed=match[1] is None)
    elif (match := _DURATION.fullmatch(value)) and any(match.groups()):
        parts = zip(match.groups(), _DURATION_UNITS, strict=True)
        reset = Reset(sum(float(part) * unit for part, unit in parts if part), fixed=False)
    elif "T" in value:
        try:
            moment = datetime.fromisoformat(value)
            reset = Reset((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp() - time(), fixed=True)
        except (ValueError, OverflowError):
            return None
    return reset if reset and 0 <= reset.seconds <= MAX_RESET else None


def reset_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds until the exhausted windows that a 429 reports end, at most `MAX_RETRY_AFTER`; None if it reports none.
    Needed for providers whose 429s have no ``retry-after`` (OpenRouter, older versions of Azure)."""
    waits = []
    for ending in ("", *(f"-{ending}" for ending in (*_REQUESTS, *_TOKENS))):
        reset = read_reset(headers.get(f"x-ratelimit-reset{ending}"))
        if _count(headers.get(f"x-ratelimit-remaining{ending}")) == 0 and reset and reset.fixed and reset.seconds > 0:
            waits.append(reset.seconds)
    return min(max(waits), MAX_RETRY_AFTER) if waits else None


def read_daily_refusal(message: str) -> Limits:
    """The exhausted limit that a 429 names: "… on requests per day (RPD): Limit 1000, Used 1000, Requested 1." """
    match = _DAILY_REFUSAL.search(message)
    return {"day_limit": int(match[1]), "day_left": 0} if match and int(match[1]) else {}


def retry_after_in_message(message: str) -> float | None:
    """Seconds to wait, from messages like "Please retry after 26 seconds" or "try again in 1m2.5s".

    Azure's and OpenAI's messages contain the wait even if the header is missing.
    """
    match = re.search(
        r"(?:retry|try again) (?:after|in) (?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?) ?(ms|s\b|seconds?))?",
        message,
        re.IGNORECASE,
    )
    if not match or not any(match.groups()):
        return None
    hours, minutes, seconds, unit = match.groups()
    wait = float(hours or 0) * 3600 + float(minutes or 0) * 60 + float(seconds or 0) * (0.001 if unit == "ms" else 1)
    return min(wait, MAX_RETRY_AFTER) if wait > 0 else None
