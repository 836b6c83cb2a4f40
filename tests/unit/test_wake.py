"""A lane that is busy when it is notified does not sleep through it."""

from __future__ import annotations

import asyncio

import pytest

from autotag.wake import TOPICS, Wake

LONG = 60.0  # seconds; a test that waits for them fails by its own deadline


@pytest.mark.parametrize("topic", TOPICS)
@pytest.mark.parametrize("notified", ["", None])
async def test_what_is_notified_before_the_first_wait_is_not_lost(topic: str, notified: str | None) -> None:
    """As when another worker's images come back while this one makes its first claim."""
    wake = Wake()
    wake.notify(topic if notified is None else notified)
    async with asyncio.timeout(LONG / 10):
        await wake.wait(topic, LONG)


async def test_a_wake_is_for_one_wait_and_one_topic() -> None:
    wake = Wake()
    wake.notify("batch")
    wake.notify("something else")
    await wake.wait("batch", LONG)
    for topic in TOPICS:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await wake.wait(topic, None)


async def test_a_stop_wakes_everybody() -> None:
    wake = Wake()
    waits = [asyncio.create_task(wake.wait(topic, None)) for topic in TOPICS]
    await asyncio.sleep(0)
    wake.request_stop()
    async with asyncio.timeout(LONG / 10):
        await asyncio.gather(*waits)
