"""However slow the downloads of one tenant are, they leave memory and places to the other tenants (`files.Space`)."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter

import pytest

from autotag.images import files
from autotag.images.decode import FILES
from autotag.images.files import POCKET, POCKETS, Download, Space
from autotag.images.load import FETCHES

LARGEST = 25_000_000
SIZES = (1_000, POCKET, POCKET + 1, 3_000_000, 12_000_000, LARGEST)


@pytest.fixture(autouse=True)
def _no_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces files by counters, because the tests only count bytes."""

    class File:
        def __init__(self) -> None:
            self.size = 0

        def write(self, data: bytes) -> None:
            self.size += len(data)

        def seal(self) -> None: ...

        def close(self) -> None: ...

    monkeypatch.setattr(files, "ImageFile", File)


@pytest.mark.parametrize("seed", range(12))
async def test_downloads_of_many_tenants_stay_within_the_space_and_all_end(seed: int) -> None:
    rng, held, zeros = random.Random(seed), Counter[tuple[int, str]](), bytes(LARGEST)
    space = Space(FILES, LARGEST)
    rest = FILES - POCKETS * POCKET

    async def read(number: int, tenant: str) -> None:
        size = rng.choice(SIZES)
        async with Download(space, LARGEST, tenant) as download:
            try:
                await download.begin(rng.choice((size, None)))
                while held[number, tenant] < size:
                    part = min(size - held[number, tenant], rng.choice((POCKET // 2, 1_000_000, LARGEST)))
                    await download.write(zeros[:part])
                    held[number, tenant] += part
                    large = {name: count for name, count in held.items() if count > POCKET}
                    assert sum(large.values()) <= rest
                    mine = [count for (_, whose), count in large.items() if whose == tenant]
                    assert len(mine) <= 1 or sum(mine) <= rest // 2
                    await asyncio.sleep(0)
                download.finish()
                for _ in range(rng.randrange(3)):  # it is decoded
                    await asyncio.sleep(0)
            finally:
                del held[number, tenant]

    tasks = [asyncio.create_task(read(number, rng.choice("aaaaaabc"))) for number in range(FETCHES)]
    for task in rng.sample(tasks, 6):
        await asyncio.sleep(0)
        task.cancel()
    async with asyncio.timeout(60):
        ends = await asyncio.gather(*tasks, return_exceptions=True)
    assert {type(end) for end in ends} <= {type(None), asyncio.CancelledError}
    async with asyncio.timeout(10):
        await space.take(rest, "")  # all is free again
    assert sum(space.take_pocket() for _ in range(100)) == POCKETS


@pytest.mark.parametrize("says", [None, LARGEST - 1])
@pytest.mark.parametrize("sent", [1, POCKET + 1])
async def test_slow_downloads_of_one_tenant_hold_off_nobody_else(says: int | None, sent: int) -> None:
    """The host sends nothing more, so these downloads keep their bytes for ever."""
    space = Space(FILES, LARGEST)

    async def drip() -> None:
        async with Download(space, LARGEST, "a") as download:
            await download.begin(says)
            await download.write(bytes(sent))
            await asyncio.Event().wait()

    slow = [asyncio.create_task(drip()) for _ in range(FETCHES)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    async with asyncio.timeout(10):
        for tenant in "bc":
            for size in SIZES:
                async with Download(space, LARGEST, tenant) as download:
                    await download.begin(None)
                    await download.write(bytes(size))
                    download.finish()
    for task in slow:
        task.cancel()
    await asyncio.gather(*slow, return_exceptions=True)


async def test_a_small_file_waits_for_nobody_and_a_large_one_only_for_its_turn() -> None:
    space, order = Space(FILES, LARGEST), list[str]()
    async with contextlib.AsyncExitStack() as held:
        for tenant in "ab":  # together they have nearly all
            download = await held.enter_async_context(Download(space, LARGEST, tenant))
            await download.begin(LARGEST)
            await download.write(bytes(POCKET + 1))

        async def read(tenant: str, size: int) -> None:
            async with Download(space, LARGEST, tenant) as download:
                await download.begin(size)
                await download.write(bytes(size))
                order.append(f"{tenant} {size}")
                await asyncio.sleep(0)

        waiting = [asyncio.create_task(read("c", LARGEST))]
        await asyncio.sleep(0)
        waiting += [asyncio.create_task(read("d", 4_000_000)) for _ in range(5)]
        await asyncio.sleep(0)
        await read("e", POCKET)
        assert order == [f"e {POCKET}"]
    await asyncio.gather(*waiting)
    assert order[1] == f"c {LARGEST}", "small files of others do not pass it for ever"


async def test_waiting_for_space_is_not_the_hosts_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_SECONDS", 0.2)
    space = Space(1000)
    async with Download(space, 1000, "a") as first, Download(space, 1000, "b") as second:
        await first.begin(None)

        async def read(seconds: float) -> None:
            async with second.in_time():
                await second.begin(1000)
                await asyncio.sleep(seconds)

        reading = asyncio.create_task(read(0))
        await asyncio.sleep(0.5)
        assert not reading.done()
        first.clear()
        await reading
        reading = asyncio.create_task(read(60))
        with pytest.raises(TimeoutError):
            await reading
