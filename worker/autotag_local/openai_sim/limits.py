"""The organisation's limits as the provider meters them: buckets with continuous refill."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field


@dataclass
class Bucket:
    """So many units a minute; a full bucket holds a minute's worth."""

    per_minute: int
    left: float = field(init=False)
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.left, self.at = float(self.per_minute), time.monotonic()

    def refill(self) -> None:
        now = time.monotonic()
        self.left = min(float(self.per_minute), self.left + (now - self.at) * self.per_minute / 60)
        self.at = now

    def seconds_until(self, units: float) -> float:
        """Seconds until so many are there; 0 when they are."""
        return max(0.0, (units - self.left) * 60 / self.per_minute)


@dataclass
class Limits:
    """Requests and tokens a minute."""

    requests: Bucket
    tokens: Bucket

    def take(self, tokens: int) -> tuple[dict[str, str], float, str]:
        """Takes one request of so many tokens if both fit.

        Returns:
            The rate-limit headers, the seconds to wait (0 when taken), and which limit refused.
        """
        self.requests.refill()
        self.tokens.refill()
        wait, which = max((self.requests.seconds_until(1), "requests"), (self.tokens.seconds_until(tokens), "tokens"))
        if wait == 0:
            self.requests.left -= 1
            self.tokens.left -= tokens
        headers = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            headers[f"x-ratelimit-limit-{name}"] = str(bucket.per_minute)
            headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.left)))
            headers[f"x-ratelimit-reset-{name}"] = f"{bucket.seconds_until(bucket.per_minute):.3f}s"
        if wait:
            headers["retry-after"] = str(math.ceil(wait))
            headers["retry-after-ms"] = str(math.ceil(wait * 1000))
        return headers, wait, which
