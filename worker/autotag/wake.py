"""What wakes a lane: a notification, a free hand, or the moment that the database named."""

from __future__ import annotations

import asyncio
import contextlib


class Wake:
    """Events by topic (``realtime``, ``batch``, ``outbox``), and ``stop``, which wakes everybody."""

    def __init__(self) -> None:
        self._events: dict[str, asyncio.Event] = {}
        self.stop = asyncio.Event()
        self.poll_every: float | None = None  # seconds, where LISTEN is impossible

    def event(self, topic: str) -> asyncio.Event:
        return self._events.setdefault(topic, asyncio.Event())

    def notify(self, topic: str) -> None:
        """Wakes one topic; the empty one wakes all."""
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
        event = self.event(topic)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await event.wait()
        event.clear()

    async def wait(self, topic: str, seconds: float | None) -> None:
        """Until the topic is notified, the time is over, or the worker stops; then the topic is quiet again."""
        if self.poll_every is not None:
            seconds = self.poll_every if seconds is None else min(seconds, self.poll_every)
        event = self.event(topic)
        if not self.stop.is_set():
            try:
                async with asyncio.timeout(seconds):
                    await event.wait()
            except TimeoutError:
                pass
        event.clear()
