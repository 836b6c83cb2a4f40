"""Reads rate limits and waits from the headers (and messages) of the provider's answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time
from typing import cast

from autotag.db.messages import Limits

MAX_RETRY_AFTER = 3600.0  # seconds; the same limit as autotag.clean_error

_COUNT = re.compile(r"[0-9]{1,10}")


def read_limits(headers: Mapping[str, str]) -> Limits:
    """The provider's limits and what is left of them, from ``x-ratelimit-*`` headers: requests and tokens per minute.

    Compatible servers omit headers or send zeros and words, so implausible values are dropped.
    """
    names = {
        "requests_limit": "x-ratelimit-limit-requests", "requests_left": "x-ratelimit-remaining-requests",
        "tokens_limit": "x-ratelimit-limit-tokens", "tokens_left": "x-ratelimit-remaining-tokens",
    }  # fmt: skip
    values: dict[str, int] = {}
    for name, header in names.items():
        value = headers.get(header, "")
        if _COUNT.fullmatch(value) and (int(value) > 0 or name.endswith("left")) and int(value) < 2**31:
            values[name] = int(value)
    # Drop "remaining" without "limit": servers without rate limits were seen to send remaining 0.
    limits = {k: v for k, v in values.items() if k.endswith("limit") or k.replace("left", "limit") in values}
    return cast("Limits", limits)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from ``retry-after-ms`` or ``retry-after`` (seconds or a date), at most `MAX_RETRY_AFTER`; None
    if both are missing or invalid."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        value = headers.get(name, "")
        try:
            seconds = float(value) * unit
        except ValueError:
            try:
                seconds = parsedate_to_datetime(value).timestamp() - time()
            except (TypeError, ValueError, OverflowError):
                continue
        if 0 < seconds < float("inf"):
            return min(seconds, MAX_RETRY_AFTER)
    return None


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
