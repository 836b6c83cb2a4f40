"""The stage of a batch is shown on each of its images, even if another transaction holds the upload's row meanwhile."""

from __future__ import annotations

import asyncio
from typing import cast

import psycopg
import pytest

from autotag.db import Busy, Database, TooSlow
from autotag.worker import show
from autotag.worker.show import BatchStages
from support import soon

TASKS = 7
NEVER = 3600.0  # seconds


class FakeDatabase:
    """Each call shows the next two tasks of a batch, or raises the next of `errors`."""

    def __init__(self, *errors: Exception | None) -> None:
        self.errors = list(errors)
        self.shown: list[int] = []
        self.calls = 0
        self.pages = 0  # shown, and followed up

    async def show_batch(self, _batch: str, after: int, _limit: int) -> int | None:
        self.calls += 1
        await asyncio.sleep(0)
        if self.errors and (error := self.errors.pop(0)):
            raise error
        page = range(after + 1, min(after + 2, TASKS) + 1)
        self.shown += page
        return page[-1] if page else None

    def follow_up(self, _workspace: None) -> None:
        self.pages += 1


def stages_of(database: FakeDatabase) -> BatchStages:
    return BatchStages(cast("Database", database), database.follow_up)


@pytest.mark.parametrize("calls", range(5))
async def test_it_goes_on_after_the_last_page_that_was_shown(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "RETRY_DELAY", 0.001)
    database = FakeDatabase(*[None] * calls, Busy("held"), Busy("held"))
    stages_of(database).show(["batch"])
    await soon(lambda: database.calls == 5 + 2)
    assert database.shown == list(range(1, TASKS + 1))
    assert database.pages == 4, "each page that was shown is followed up, and no other call"


async def test_delays_grow_to_a_limit_and_begin_again_with_a_page_that_was_shown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(show, "RETRY_DELAY", 0.001)
    monkeypatch.setattr(show, "MAX_RETRY_DELAY", 0.004)
    database = FakeDatabase(*[Busy("held")] * 5, None, Busy("held"))
    stages, delays = stages_of(database), list[float]()
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    def later(seconds: float, callback: object, *arguments: object) -> asyncio.TimerHandle:
        if callback == stages._queue:
            delays.append(seconds)
        return call_later(seconds, callback, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "call_later", later)
    stages.show(["batch"])
    await soon(lambda: database.calls == 5 + 6)
    assert delays == [0.001, 0.002, 0.004, 0.004, 0.004, 0.001]
    assert database.shown == list(range(1, TASKS + 1))


@pytest.mark.parametrize("delay", [NEVER, 0.02])
async def test_a_new_stage_begins_with_the_first_image(delay: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not wait for the delayed try of the earlier stage, which is given up."""
    monkeypatch.setattr(show, "RETRY_DELAY", delay)
    database = FakeDatabase(None, None, Busy("held"))
    stages = stages_of(database)
    stages.show(["batch"])
    await soon(lambda: database.calls == 3)
    await asyncio.sleep(0.001)
    stages.show(["batch"])
    await soon(lambda: database.calls == 3 + 5)
    await asyncio.sleep(0.04)
    assert database.shown == [1, 2, 3, 4, *range(1, TASKS + 1)]
    assert database.calls == 3 + 5


async def test_a_new_stage_while_the_earlier_one_is_shown_begins_with_the_first_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(show, "RETRY_DELAY", 0.02)
    database = FakeDatabase(None, Busy("held"))
    stages = stages_of(database)
    stages.show(["batch"])
    await soon(lambda: database.calls == 2)  # under way: it has not raised yet
    stages.show(["batch"])
    await soon(lambda: database.calls == 2 + 5)
    await asyncio.sleep(0.04)
    assert database.shown == [1, 2, *range(1, TASKS + 1)]
    assert database.calls == 2 + 5


@pytest.mark.parametrize(
    "error", [TooSlow("four seconds"), psycopg.OperationalError("the connection is lost"), ValueError("a bug")]
)
async def test_after_an_error_the_rest_is_left_out_and_the_next_batch_is_shown(error: Exception) -> None:
    database = FakeDatabase(error)
    stages_of(database).show(["bad", "another"])
    await soon(lambda: database.calls == 1 + 5)
    assert database.shown == list(range(1, TASKS + 1))


async def test_nothing_is_tried_after_the_worker_has_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(show, "RETRY_DELAY", 0.02)
    database = FakeDatabase(Busy("held"))
    stages = stages_of(database)
    stages.show(["batch"])
    await soon(lambda: bool(stages._delayed))
    await stages.stop()
    await asyncio.sleep(0.04)
    assert database.shown == []
