"""The organisation's limits as the provider meters them: buckets with continuous refill.

Above a rate the provider meters by the second: what a second brings comes at its end (OpenAI's guide "Rate
limits": 60,000 requests a minute may be enforced as 1,000 a second).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field

QUANTISED_ABOVE = 3000  # requests a minute
DAY = 86_400.0  # seconds


@dataclass
class Bucket:
    """So many units in a period; a full bucket holds a period's worth."""

    units: int
    period: float = 60.0  # seconds
    quantum: float = 0.0  # seconds; 0: refilled continuously
    left: float = field(init=False)
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.left, self.at = float(self.units), time.monotonic()

    def refill(self) -> None:
        now = time.monotonic()
        if self.quantum:
            now = math.floor(now / self.quantum) * self.quantum
        self.left = min(float(self.units), self.left + max(0.0, now - self.at) * self.units / self.period)
        self.at = max(self.at, now)

    def seconds_until(self, units: float) -> float:
        """Seconds until so many are there; 0 when they are."""
        return max(0.0, (units - self.left) * self.period / self.units)


@dataclass
class CoUser:
    """Another program with the same key, which nobody told us about."""

    requests_per_second: float
    tokens_each: int
    at: float = field(default_factory=time.monotonic)
    owed: float = 0.0

    def use(self, requests: Bucket, tokens: Bucket) -> None:
        """Takes what it has taken since the last time; it is limited like everybody."""
        now = time.monotonic()
        self.owed += (now - self.at) * self.requests_per_second
        self.at = now
        while self.owed >= 1 and requests.left >= 1 and tokens.left >= self.tokens_each:
            requests.left -= 1
            tokens.left -= self.tokens_each
            self.owed -= 1
        self.owed = min(self.owed, 1.0)


@dataclass
class Limits:
    """Requests and tokens a minute, and requests a day."""

    requests: Bucket
    tokens: Bucket
    day: Bucket | None = None
    co_user: CoUser | None = None

    @classmethod
    def of(cls, requests: int, tokens: int, per_day: int | None, speed: float = 1.0) -> Limits:
        """Full buckets; ``speed`` compresses time: a minute passes in ``60 / speed`` seconds."""
        quantum = 1.0 / speed if requests >= QUANTISED_ABOVE else 0.0
        return cls(
            Bucket(requests, 60.0 / speed, quantum), Bucket(tokens, 60.0 / speed, quantum),
            Bucket(per_day, DAY / speed) if per_day else None,
        )  # fmt: skip

    def take(self, tokens: int) -> tuple[dict[str, str], float, str]:
        """Takes one request of so many tokens if all limits hold it.

        Returns:
            The rate-limit headers, the seconds to wait (0 when taken), and which limit refused.
        """
        self.requests.refill()
        self.tokens.refill()
        if self.co_user:
            self.co_user.use(self.requests, self.tokens)
        waits = [
            (self.requests.seconds_until(1), "requests per min (RPM)"),
            (self.tokens.seconds_until(tokens), "tokens per min (TPM)"),
        ]
        if self.day:
            self.day.refill()
            waits.append((self.day.seconds_until(1), "requests per day (RPD)"))
        wait, which = max(waits)
        if wait == 0:
            self.requests.left -= 1
            self.tokens.left -= tokens
            if self.day:
                self.day.left -= 1
        headers = {}
        for name, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            headers[f"x-ratelimit-limit-{name}"] = str(bucket.units)
            headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.left)))
            headers[f"x-ratelimit-reset-{name}"] = f"{bucket.seconds_until(bucket.units):.3f}s"
        if wait:
            headers["retry-after"] = str(math.ceil(wait))
            headers["retry-after-ms"] = str(math.ceil(wait * 1000))
        return headers, wait, which
