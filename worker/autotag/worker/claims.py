"""Claim numbers. With them, the worker and the database agree on what the worker holds."""

from __future__ import annotations

from collections import Counter


class Claims:
    """Counts the claims of one lane, and the images or batches of each claim that this worker still holds.

    A claim whose reply was lost is repeated with the same number and returns the same work. Each heartbeat lists the
    numbers of claims from which the worker still holds something. The database takes back the work of all earlier
    claims that are not listed.
    """

    def __init__(self) -> None:
        self._last = 0
        self._answered = True
        self._held: Counter[int] = Counter()

    def number(self) -> int:
        """The number for the next call: a new one, or the last claim's number if that got no reply."""
        if self._answered:
            self._last += 1
            self._answered = False
        return self._last

    def receive(self, count: int) -> None:
        """Notes the reply to the last claim: ``count`` images or batches."""
        self._answered = True
        if count:
            self._held[self._last] = count

    def drop(self, number: int, count: int = 1) -> None:
        """Notes that the worker no longer holds ``count`` of a claim's images or batches."""
        left = self._held[number] - count
        if left > 0:
            self._held[number] = left
        else:
            del self._held[number]

    def listed(self) -> list[int]:
        """The numbers for a heartbeat. The last number is always included, so that the database knows which claims are
        newer than this list."""
        return sorted({self._last, *self._held})
