"""The organisation's limits as the provider meters them: buckets that refill continuously.

From `QUANTISED_ABOVE` requests a minute on, the provider refills once a second, at the end of the second (OpenAI's
guide "Rate limits": 60,000 requests a minute may be enforced as 1,000 a second).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Literal

QUANTISED_ABOVE = 3000  # requests a minute
DAY = 86_400.0  # seconds

#: What ``x-ratelimit-…-requests`` counts if there is a daily limit: the day (OpenAI's tier 1, Groq), the minute (the
#: daily limit is not reported), both (SambaNova: the day as ``…-requests-day``), or one after the other (gateways).
RequestHeaders = Literal["day", "minute", "both", "alternating"]


@dataclass
class Bucket:
    """A limit of ``units`` per ``period``; a full bucket holds one period's units."""

    units: int
    period: float = 60.0  # seconds
    quantum: float = 0.0  # seconds between refills; 0: continuous
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
        """Seconds until the bucket holds this many units; 0 when it does now."""
        return max(0.0, (units - self.left) * self.period / self.units)


@dataclass
class SharedKeyClient:
    """A different program that uses the same key, unknown to autotag."""

    requests_per_second: float
    tokens_each: int
    at: float = field(default_factory=time.monotonic)
    owed: float = 0.0

    def use(self, requests: Bucket, tokens: Bucket) -> None:
        """Takes what this client has used since the last call, as far as the buckets allow."""
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
    """Requests per minute, tokens per minute and requests per day."""

    requests: Bucket
    tokens: Bucket
    day: Bucket | None = None
    shared_key_client: SharedKeyClient | None = None
    request_headers: RequestHeaders = "day"
    speed: float = 1.0  # how much faster than real time the buckets refill
    taken: int = field(default=0, init=False)  # answers so far

    @classmethod
    def of(
        cls, requests: int, tokens: int, per_day: int | None, speed: float = 1.0,
        request_headers: RequestHeaders = "day",
    ) -> Limits:  # fmt: skip
        """Limits with full buckets. ``speed`` compresses time: a minute passes in ``60 / speed`` seconds."""
        quantum = 1.0 / speed if requests >= QUANTISED_ABOVE else 0.0
        return cls(
            Bucket(requests, 60.0 / speed, quantum), Bucket(tokens, 60.0 / speed, quantum),
            Bucket(per_day, DAY / speed) if per_day else None, request_headers=request_headers, speed=speed,
        )  # fmt: skip

    def take(self, tokens: int) -> tuple[dict[str, str], float, str]:
        """Takes one request of ``tokens`` tokens if every limit allows it.

        Returns:
            The rate-limit headers, the seconds to wait (0 when taken), and the name of the limit that refused.
        """
        self.requests.refill()
        self.tokens.refill()
        if self.shared_key_client:
            self.shared_key_client.use(self.requests, self.tokens)
        waits = [
            (self.requests.seconds_until(1), "requests per min (RPM)"),
            (self.tokens.seconds_until(tokens), "tokens per min (TPM)"),
        ]
        if self.day:
            self.day.refill()
            waits.append((self.day.seconds_until(1), "requests per day (RPD)"))
        wait, limit = max(waits)
        if wait == 0:
            self.requests.left -= 1
            self.tokens.left -= tokens
            if self.day:
                self.day.left -= 1
        headers = self._headers()
        if wait:
            headers["retry-after"] = str(math.ceil(wait))
            headers["retry-after-ms"] = str(math.ceil(wait * 1000))
        return headers, wait, limit

    def _headers(self) -> dict[str, str]:
        """The ``x-ratelimit`` headers of the next answer. Resets are in the provider's time, so that a period keeps its
        length however fast it passes."""
        self.taken += 1
        buckets = {"requests": self.requests, "tokens": self.tokens}
        if self.day and self.request_headers == "both":
            buckets["requests-day"] = self.day
        elif self.day and (self.request_headers == "day" or (self.request_headers == "alternating" and self.taken % 2)):
            buckets["requests"] = self.day
        headers = {}
        for name, bucket in buckets.items():
            headers[f"x-ratelimit-limit-{name}"] = str(bucket.units)
            headers[f"x-ratelimit-remaining-{name}"] = str(max(0, math.floor(bucket.left)))
            headers[f"x-ratelimit-reset-{name}"] = as_duration(bucket.seconds_until(bucket.units) * self.speed)
        return headers


def as_duration(seconds: float) -> str:
    """Seconds as OpenAI writes them, rounded to milliseconds: 6ms, 8.64s, 7m12s, 23h59m51.36s."""
    milliseconds = round(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(milliseconds, 60_000)
    hours, minutes_left = divmod(minutes, 60)
    text = f"{rest / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return (f"{hours}h" if hours else "") + (f"{minutes_left}m" if minutes else "") + text
