"""The semaphore that tenants share."""

from __future__ import annotations

import asyncio
import random

import pytest

from autotag.turns import Turns


async def test_one_image_waits_for_one_of_each_tenant_and_not_for_all_of_a_large_upload() -> None:
    turns, order = Turns(2), list[str]()

    async def work(tenant: str) -> None:
        async with turns.place(tenant):
            order.append(tenant)
            await asyncio.sleep(0)

    large = [asyncio.create_task(work(tenant)) for tenant in "ab" for _ in range(50)]
    await asyncio.sleep(0)  # they wait
    small = asyncio.create_task(work("c"))
    await asyncio.sleep(0)
    began = len(order)
    await asyncio.gather(*large, small)
    assert order.index("c") - began <= 2 + 2, "two had a place, and one of each of the others had its turn"
    assert order[10:30].count("a") == order[10:30].count("b") == 10, "those that go on take turns"


async def test_a_tenant_alone_uses_every_place() -> None:
    turns, running, most = Turns(3), 0, 0

    async def work() -> None:
        nonlocal running, most
        async with turns.place("a"):
            running += 1
            most = max(most, running)
            await asyncio.sleep(0)
            running -= 1

    await asyncio.gather(*(work() for _ in range(20)))
    assert most == 3


async def test_whatever_is_cancelled_no_place_is_lost_and_none_is_given_twice() -> None:
    for seed in range(300):
        rng, turns, running = random.Random(seed), Turns(2), 0

        async def work(tenant: str, rng: random.Random = rng, turns: Turns = turns) -> None:
            nonlocal running
            async with turns.place(tenant):
                running += 1
                assert running <= 2
                try:
                    for _ in range(rng.randrange(3)):
                        await asyncio.sleep(0)
                    if rng.random() < 0.2:
                        raise ValueError
                finally:
                    running -= 1

        tasks = []
        for _ in range(rng.randrange(30)):
            tasks.append(asyncio.create_task(work(rng.choice("abc"))))
            if rng.random() < 0.5:
                await asyncio.sleep(0)
            if rng.random() < 0.4:
                rng.choice(tasks).cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        async with asyncio.timeout(10):  # two places are free
            async with turns.place("d"), turns.place("e"):
                pass


async def test_by_time_slow_tasks_of_a_tenant_delay_the_others_by_one_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order = 0.0, list[str]()
    monkeypatch.setattr("autotag.turns.time.monotonic", lambda: now)
    turns = Turns(1, by_time=True)

    async def work(tenant: str, seconds: float) -> None:
        nonlocal now
        async with turns.place(tenant):
            order.append(tenant)
            await asyncio.sleep(0)
            now += seconds

    slow = [asyncio.create_task(work("slow", 2.0)) for _ in range(20)]
    while len(order) < 5:  # noqa: ASYNC110
        await asyncio.sleep(0)
    quick = [asyncio.create_task(work("quick", 0.02)) for _ in range(50)]
    await asyncio.sleep(0)
    began = len(order)
    await asyncio.gather(*quick)
    last = len(order) - order[::-1].index("quick")
    assert order[began:last].count("slow") <= 1, "fifty quick ones take as long as half a slow one"
    await asyncio.gather(*slow)
