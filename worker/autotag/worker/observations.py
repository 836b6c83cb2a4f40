"""What a worker sees of the provider's limits while it makes single calls, until the next report takes it along."""

from __future__ import annotations

import time

from autotag.db.messages import Limits, ObservedLimits, Sent


class Observations:
    """The newest limits that answers told, and how many released calls have been sent."""

    def __init__(self) -> None:
        self._limits: Limits = {}
        self._limits_at = 0.0  # when the call was sent that told of them (`time.monotonic`)
        self._sent = 0
        self._first_sent = 0.0  # of `time.monotonic`

    def limits(self, seen: Limits, sent: float) -> None:
        """What an answer's headers say of the bucket when the call was sent (`time.monotonic`); that of the newest
        call wins, a wait is kept at its longest."""
        wait = max(seen.get("retry_after") or 0, self._limits.get("retry_after") or 0)
        if sent >= self._limits_at:
            self._limits, self._limits_at = {**self._limits, **seen}, sent
        if wait:
            self._limits["retry_after"] = wait

    def sent(self) -> None:
        """A released call is on its way now, or will never be made."""
        self._first_sent = self._first_sent if self._sent else time.monotonic()
        self._sent += 1

    def take_sent(self) -> Sent | None:
        """How many calls were sent since the last time; None: none was."""
        if not self._sent:
            return None
        told: Sent = {"sent": self._sent, "sent_age": time.monotonic() - self._first_sent}
        self._sent = 0
        return told

    def take(self) -> ObservedLimits | None:
        """Everything that has been seen since the last time; None: nothing."""
        seen: ObservedLimits = {}
        if sent := self.take_sent():
            seen = {**seen, **sent}
        if self._limits:
            seen = {**seen, **self._limits, "age": time.monotonic() - self._limits_at}
            self._limits, self._limits_at = {}, 0.0
        return seen or None
