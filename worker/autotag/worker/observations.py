"""Collects what single calls show about the provider's limits, for the next report to the database."""

from __future__ import annotations

import time
from typing import cast

from autotag.db.messages import Limits, ObservedLimits, Sent


class Observations:
    """The limits in the headers of the newest answers, and the number of released calls that were sent."""

    def __init__(self) -> None:
        self._limits: Limits = {}
        self._limits_at = 0.0  # when the call with these limits was sent (`time.monotonic`)
        self._sent = 0
        self._first_sent = 0.0  # `time.monotonic`

    def add_limits(self, limits: Limits, sent: float) -> None:
        """Adds the limits from an answer's headers.

        Keeps the limits of the call that was sent last, and the longest wait of all calls.

        Args:
            limits: the result of `headers.read_limits`.
            sent: when the call was sent (`time.monotonic`).
        """
        wait = max(limits.get("retry_after") or 0, self._limits.get("retry_after") or 0)
        if sent >= self._limits_at:
            self._limits, self._limits_at = {**self._limits, **limits}, sent
        if wait:
            self._limits["retry_after"] = wait

    def count_sent(self, calls: int = 1) -> None:
        """Counts released calls that have just been sent, or that will not be sent."""
        self._first_sent = self._first_sent if self._sent else time.monotonic()
        self._sent += calls

    def take_sent(self) -> Sent | None:
        """Takes the number of calls sent since the last report; None if there were none."""
        if not self._sent:
            return None
        report: Sent = {"sent": self._sent, "sent_age": time.monotonic() - self._first_sent}
        self._sent = 0
        return report

    def take(self) -> ObservedLimits | None:
        """Takes everything observed since the last report; None if there is nothing."""
        observed: ObservedLimits = {}
        if sent := self.take_sent():
            observed = {**observed, **sent}
        if self._limits:
            observed = {**observed, **self._limits, "age": time.monotonic() - self._limits_at}
            self._limits, self._limits_at = {}, 0.0
        return observed or None

    def put_back(self, observed: ObservedLimits | Sent | None, taken: float) -> None:
        """Puts observations back after a failed report. ``taken``: when they were taken (`time.monotonic`)."""
        if observed is None:
            return
        if "sent" in observed:
            first = taken - observed["sent_age"]
            self._first_sent = min(first, self._first_sent) if self._sent else first
            self._sent += observed["sent"]
        limits = cast("Limits", {k: v for k, v in observed.items() if k not in ("sent", "sent_age", "age")})
        if limits:
            self.add_limits(limits, taken - cast("float", observed.get("age", 0)))
