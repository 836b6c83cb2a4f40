"""Worker and database agree on what the worker holds, whatever replies are lost. A locked table delays no claim."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import cast

import psycopg
import pytest

from autotag.db import Busy, Claim, Database, DatabaseSettings, Image, Lost, Question, TooSlow
from autotag.db.messages import Notice, Sent, StageReport
from autotag.worker import realtime
from autotag.worker.claims import Claims
from autotag.worker.observations import Observations
from autotag.worker.slow import SlowWorkspaces
from autotag.worker.stages import Stages
from autotag.worker.wake import Wake
from support import soon

SETTINGS = DatabaseSettings(Question(1, "m", "low", 10, "English"), 1000)


def test_a_claim_without_a_reply_keeps_its_number() -> None:
    claims = Claims()
    assert [claims.number(), claims.number()] == [1, 1]
    claims.receive(0)
    assert [claims.number(), claims.number()] == [2, 2]


def test_a_heartbeat_lists_what_is_held_and_the_last_claim() -> None:
    claims = Claims()
    assert claims.listed() == [0], "an empty list would mean that the worker knows of none"
    for images in (2, 0, 1):
        claims.number()
        assert claims.listed()[-1] == claims.number(), "a claim that is under way"
        claims.receive(images)
    assert claims.listed() == [1, 3]
    claims.drop(1)
    assert claims.listed() == [1, 3]
    claims.drop(1)
    assert claims.listed() == [3]
    claims.drop(3)
    assert claims.listed() == [3]
    claims.number()
    assert claims.listed() == [4]


class FakeDatabase:
    """Releases the images of `queue`, and describes them."""

    def __init__(self, queue: Sequence[int]) -> None:
        self.queue = list(queue)
        self.claims: list[tuple[int, int]] = []
        self.descriptions: list[list[int]] = []
        self.lose: list[Exception] = []
        self.given: dict[int, list[int]] = {}
        self.refuse: Callable[[list[int]], Exception | None] = lambda _: None
        self.gone: set[int] = set()
        self.sent = 0
        self.unreadable: list[int] = []

    async def report_unreadable(self, tasks: list[int]) -> None:
        self.unreadable += tasks

    async def report_stages(self, workspace: str | None, stages: list[StageReport], sent: Sent | None) -> list[Notice]:
        assert workspace is None
        assert not stages
        assert sent
        self.sent += sent["sent"]
        return []

    async def claim(self, number: int, slots: int) -> Claim:
        self.claims.append((number, slots))
        if number not in self.given:
            self.given[number], self.queue = self.queue[:slots], self.queue[slots:]
        if self.lose:
            raise self.lose.pop(0)
        return Claim(self.given[number], 0 if self.queue else None, None, SETTINGS)

    async def describe_tasks(self, number: int, tasks: Sequence[int]) -> list[Image]:
        self.descriptions.append(list(tasks))
        if error := self.refuse(list(tasks)):
            raise error
        return [Image(task, "a", None, None, None, claim=number) for task in tasks if task not in self.gone]


class Bench:
    """The lane of single calls with a fake database. `tagged` lists the images that were tagged."""

    def __init__(self, queue: Sequence[int]) -> None:
        self.db, self.wake, self.claims = FakeDatabase(queue), Wake(), Claims()
        self.tagged: list[int] = []
        self.observations = Observations()
        self.stages = Stages(cast("Database", self.db), self.observations, SlowWorkspaces())

    async def tag(self, image: Image, _: DatabaseSettings) -> None:
        self.tagged.append(image.task)
        self.claims.drop(image.claim)

    @contextlib.asynccontextmanager
    async def running(self, slots: int = 4) -> AsyncIterator[None]:
        lane = asyncio.create_task(
            realtime.run(cast("Database", self.db), self.wake, self.claims, self.stages, slots, self.tag, deadline=1)
        )
        yield
        assert not lane.done(), "data ended the worker"
        self.wake.request_stop()
        await lane


@pytest.fixture(autouse=True)
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CLAIM_RETRY", "DESCRIBE_RETRY", "MAX_DESCRIBE_RETRY"):
        monkeypatch.setattr(realtime, name, 0.001)


async def test_a_claim_whose_reply_is_lost_is_repeated_with_its_number() -> None:
    bench = Bench(range(10))
    bench.db.lose = [psycopg.InternalError("first"), psycopg.InternalError("second")]
    async with bench.running():
        await soon(lambda: len(bench.tagged) == 10)
    assert [number for number, _ in bench.db.claims[:4]] == [1, 1, 1, 2]
    assert sorted(bench.tagged) == list(range(10)), "each image once"
    assert bench.claims.listed() == [bench.db.claims[-1][0]]


@pytest.mark.parametrize("error", [TooSlow("ten seconds"), Busy("deadlock"), psycopg.InternalError("bug")])
async def test_images_whose_description_fails_are_described_later_and_none_is_lost(error: Exception) -> None:
    bench = Bench(range(8))
    fails = {4: 7}  # this image's row makes every description fail for a while

    def refuse(tasks: list[int]) -> Exception | None:
        if 4 in tasks and fails[4]:
            fails[4] -= 1
            return error
        return None

    bench.db.refuse = refuse
    async with bench.running(slots=20):
        await soon(lambda: len(bench.tagged) == 8)
    assert bench.tagged[-1] == 4, "the others did not wait for it"
    assert bench.db.descriptions[:3] == [list(range(8))] * 3, "together at first"


async def test_an_odd_image_is_isolated_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The halves of the list are tried without a delay. Only the odd image itself gets the growing delay."""
    pauses: list[float] = []
    sleep = asyncio.sleep

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    bench = Bench(range(8))
    bench.db.refuse = lambda tasks: psycopg.InternalError("bug") if 4 in tasks and pauses.count(5.0) < 1 else None
    for name, seconds in (("DESCRIBE_RETRY", 1.0), ("MAX_DESCRIBE_RETRY", 5.0)):
        monkeypatch.setattr(realtime, name, seconds)
    monkeypatch.setattr("autotag.worker.realtime.asyncio.sleep", pause)
    async with bench.running(slots=20):
        async with asyncio.timeout(10):
            while len(bench.tagged) < 8:
                await sleep(0.001)
    assert pauses == [1.0, 2.0, 5.0]
    assert bench.tagged[-1] == 4


async def test_the_lane_goes_on_while_a_description_is_held() -> None:
    bench = Bench(range(3))
    release = asyncio.Event()
    describe = bench.db.describe_tasks

    async def held(number: int, tasks: Sequence[int]) -> list[Image]:
        if 0 in tasks:
            await release.wait()
        return await describe(number, tasks)

    bench.db.describe_tasks = held  # type: ignore[method-assign]
    async with bench.running(slots=4):
        await soon(lambda: len(bench.db.claims) >= 1)
        bench.db.queue = [7]
        bench.wake.notify("realtime")
        await soon(lambda: bench.tagged == [7])
        assert bench.db.claims[1] == (2, 1), "undescribed images have slots"
        assert bench.claims.listed()[0] == 1
        release.set()
        await soon(lambda: sorted(bench.tagged) == [0, 1, 2, 7])


async def test_images_that_nobody_has_looked_at_yet_are_described_again_and_keep_nobody_waiting() -> None:
    """The database looks at replaced files for a second only. It looks at one of them in every call."""
    bench = Bench(range(8))
    replaced = {1, 2, 3}
    describe = bench.db.describe_tasks

    async def slow(number: int, tasks: Sequence[int]) -> list[Image]:
        later = [task for task in tasks if task in replaced][1:]
        images = await describe(number, tasks)
        return [replace(image, refused="unchecked" if image.task in later else None) for image in images]

    bench.db.describe_tasks = slow  # type: ignore[method-assign]
    async with bench.running(slots=20):
        await soon(lambda: len(bench.tagged) == 8)
    assert bench.tagged[-2:] == [2, 3], "the others did not wait for them"
    assert bench.db.descriptions[:3] == [list(range(8)), [2, 3], [3]]


async def test_an_image_that_is_gone_frees_its_slot_and_its_claim() -> None:
    bench = Bench(range(8))
    bench.db.gone = {0, 1, 2, 3}
    async with bench.running(slots=4):
        await soon(lambda: sorted(bench.tagged) == [4, 5, 6, 7])
    assert 1 not in bench.claims.listed()


async def test_calls_for_images_that_are_gone_count_as_sent_soon() -> None:
    """Until a released call counts as sent, the database keeps room for it in the provider's limits."""
    bench = Bench(range(8))
    bench.db.gone = set(range(8))
    reporting = asyncio.create_task(bench.stages.run())
    async with bench.running(slots=20):
        await soon(lambda: bench.db.sent == 8)
    reporting.cancel()


async def test_an_image_whose_row_ends_the_session_is_given_up_and_the_others_are_tagged() -> None:
    bench = Bench(range(8))
    bench.db.refuse = lambda tasks: Lost("each time") if 4 in tasks else None
    async with bench.running(slots=20):
        await soon(lambda: len(bench.tagged) == 7 and 1 not in bench.claims.listed()[:-1])
        assert bench.db.descriptions.count([4]) == 1
        assert bench.db.descriptions.count(list(range(8))) == 1, "halved at once"
        assert bench.db.unreadable == [4]
        await soon(lambda: bench.claims.listed() == [bench.db.claims[-1][0]])


async def test_a_stopping_worker_does_not_wait_for_descriptions() -> None:
    bench = Bench(range(3))
    bench.db.refuse = lambda _: TooSlow("for ever")
    async with bench.running():
        await soon(lambda: len(bench.db.descriptions) > 5)
