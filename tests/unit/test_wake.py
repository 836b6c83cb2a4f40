"""A lane that is busy when it is notified does not miss the notification."""

from __future__ import annotations

import asyncio

import pytest

from autotag.worker.wake import TOPICS, Wake

PATIENCE = 6.0  # seconds that a wake may take on a slow machine


@pytest.mark.parametrize(
    ("notified", "topic"), [*((topic, topic) for topic in TOPICS), *(("", topic) for topic in TOPICS)]
)
async def test_what_is_notified_before_the_first_wait_is_not_lost(notified: str, topic: str) -> None:
    """For example, another worker's images are requeued while this worker makes its first claim."""
    wake = Wake()
    wake.notify(notified)
    async with asyncio.timeout(PATIENCE):
        await wake.wait(topic, None)


async def test_a_wake_is_for_one_wait_and_one_topic() -> None:
    wake = Wake()
    wake.notify("batch")
    wake.notify("something else")
    async with asyncio.timeout(PATIENCE):
        await wake.wait("batch", None)
    for topic in TOPICS:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await wake.wait(topic, None)


async def test_a_stop_wakes_everybody() -> None:
    wake = Wake()
    waits = [asyncio.create_task(wake.wait(topic, None)) for topic in TOPICS]
    await asyncio.sleep(0)
    wake.request_stop()
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*waits)
