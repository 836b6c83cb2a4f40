"""How long to wait: as a server asks, or between tries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time

MAX_DOUBLINGS = 50  # 2.0 ** 1024 overflows; every limit is reached long before
MAX_RETRY_AFTER = 3600.0  # seconds; the same limit as autotag.clean_error


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
        if 0 < seconds < math.inf:
            return min(seconds, MAX_RETRY_AFTER)
    return None


def backoff(first: float, longest: float, failures: int) -> float:
    """Seconds until the next try: ``first`` after one failure, doubled with each further one, at most ``longest``."""
    return min(longest, first * 2.0 ** min(failures - 1, MAX_DOUBLINGS))
