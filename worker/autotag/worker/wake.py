"""What wakes a lane: a notification, a free hand, or the moment that the database named."""

from __future__ import annotations

import asyncio
import contextlib

#: What the database notifies; each has one sleeper.
TOPICS = ("realtime", "batch", "outbox", "version")


class Wake:
    """Events by topic, and ``stop``, which wakes everybody.

    Every topic's event is there from the start: what is notified while a lane makes its first claim must not be
    lost, because that claim may have looked a moment too early.
    """

    def __init__(self) -> None:
        self._events = {topic: asyncio.Event() for topic in TOPICS}
        self.stop = asyncio.Event()
        self.poll_every: float | None = None  # seconds, where LISTEN is impossible

    def notify(self, topic: str) -> None:
        """Wakes one topic; the empty one wakes all. Topics that nobody here waits for are ignored."""
        if not topic:
            for event in self._events.values():
                event.set()
        elif topic in self._events:
            self._events[topic].set()

    def request_stop(self) -> None:
        self.stop.set()
        self.notify("")

    async def pause(self, seconds: float) -> None:
        """Until the time is over or the worker stops, whatever is notified: what just failed is not hurried."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.stop.wait()

    async def sleep(self, topic: str, seconds: float) -> None:
        """Until the topic is notified (a stop notifies all) or the time is over."""
        event = self._events[topic]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()
        event.clear()

    async def wait(self, topic: str, seconds: float | None) -> None:
        """Until the topic is notified, the time is over, or the worker stops; then the topic is quiet again."""
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
