"""Wakes the lanes: on a notification, a free slot, or at the time of the next useful claim."""

from __future__ import annotations

import asyncio
import contextlib

#: The topics of the database's notifications. One task waits for each.
TOPICS = ("realtime", "batch", "store", "uploads", "outbox", "version")


class Wake:
    """One event per topic, and ``stop``, which wakes all waiting tasks.

    The events exist from the start, so that no notification is lost during a lane's first claim. The claim may have
    read the database just before the change.
    """

    def __init__(self) -> None:
        self._events = {topic: asyncio.Event() for topic in TOPICS}
        self.stop = asyncio.Event()
        self.poll_every: float | None = None  # seconds, where LISTEN is impossible

    def notify(self, topic: str) -> None:
        """Wakes the task that waits for a topic. An empty topic wakes all; unknown topics are ignored."""
        if not topic:
            for event in self._events.values():
                event.set()
        elif topic in self._events:
            self._events[topic].set()

    def request_stop(self) -> None:
        """Stops the worker and wakes all tasks."""
        self.stop.set()
        self.notify("")

    async def pause(self, seconds: float) -> None:
        """Waits for ``seconds`` or until the worker stops. Used after failures: notifications do not end the wait."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.stop.wait()

    async def sleep(self, topic: str, seconds: float) -> None:
        """Waits until the topic is notified (a stop notifies all topics), at most for ``seconds``; then resets the
        topic."""
        event = self._events[topic]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()
        event.clear()

    async def wait(self, topic: str, seconds: float | None) -> None:
        """Waits until the topic is notified or the worker stops, at most for ``seconds`` (None: no limit); then resets
        it.

        If LISTEN is impossible, it waits at most ``poll_every`` seconds.
        """
        if self.poll_every is not None:
            seconds = self.poll_every if seconds is None else min(seconds, self.poll_every)
        event = self._events[topic]
        if not self.stop.is_set():
            try:
                async with asyncio.timeout(seconds):
                    await event.wait()
            except TimeoutError:
                pass
        event.clear()
