"""What the headers of a provider's answers say: its limits, and how long to wait."""

from __future__ import annotations

import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time
from typing import cast

from autotag.db.messages import Limits

MAX_RETRY_AFTER = 3600.0  # seconds; the database allows no more either (autotag.clean_error)

_COUNT = re.compile(r"[0-9]{1,10}")


def read_limits(headers: Mapping[str, str]) -> Limits:
    """What answers say about the provider's bucket.

    Compatible servers leave headers out or send zeros and words: only sensible numbers are passed on.
    """
    names = {
        "requests_limit": "x-ratelimit-limit-requests", "requests_left": "x-ratelimit-remaining-requests",
        "tokens_limit": "x-ratelimit-limit-tokens", "tokens_left": "x-ratelimit-remaining-tokens",
    }  # fmt: skip
    seen: dict[str, int] = {}
    for name, header in names.items():
        value = headers.get(header, "")
        if _COUNT.fullmatch(value) and (int(value) > 0 or name.endswith("left")) and int(value) < 2**31:
            seen[name] = int(value)
    # A remaining without its limit is a stray: zeros were seen from servers that do not meter at all.
    told = {k: v for k, v in seen.items() if k.endswith("limit") or k.replace("left", "limit") in seen}
    return cast("Limits", told)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the provider asks to wait (``retry-after-ms``, or ``retry-after`` in seconds or as a date), if it
    says so in a way that makes sense."""
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
    """Seconds out of "Please retry after 26 seconds" or "try again in 1m2.5s": Azure's and OpenAI's messages name the
    wait also where the header is missing."""
    found = re.search(
        r"(?:retry|try again) (?:after|in) (?:(\d+)h)?(?:(\d+)m(?!s))?(?:(\d+(?:\.\d+)?) ?(ms|s\b|seconds?))?",
        message,
        re.IGNORECASE,
    )
    if not found or not any(found.groups()):
        return None
    hours, minutes, seconds, unit = found.groups()
    wait = float(hours or 0) * 3600 + float(minutes or 0) * 60 + float(seconds or 0) * (0.001 if unit == "ms" else 1)
    return min(wait, MAX_RETRY_AFTER) if wait > 0 else None
