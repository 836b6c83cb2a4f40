"""If another transaction has locked a batch's rows, the batch waits, and its slot is free meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, cast

import psycopg
import pytest

from autotag.db import Batch, Busy, Database, DatabaseSettings, Question, Settled, TooSlow
from autotag.db.messages import BatchAnswer
from autotag.openai.provider import Provider
from autotag.worker import slots as slots_module
from autotag.worker.files import Files
from autotag.worker.harvest import Harvester
from autotag.worker.slots import BatchSlots
from autotag.worker.wake import Wake

PATIENCE = 20.0  # seconds; only a broken promise takes so long
SETTINGS = DatabaseSettings(Question(1, "m", "low", 10, "English"), 1000)
MARK = "00000000-0000-4000-8000-000000000001"
LINE = (
    b'{"custom_id": "%d-' + MARK.encode() + b'", "response": {"status_code": 200, "body": {"choices": [{"message":'
    b' {"content": "{\\"caption\\": \\"A cat.\\", \\"tags\\": []}"}}]}}}'
)


@pytest.fixture(autouse=True)
def no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots_module, "BUSY_DELAY", 0.001)


async def test_a_busy_batch_gives_its_slot_back_and_waits_for_another() -> None:
    wake = Wake()
    slots = BatchSlots(wake, 1)
    calls = 0
    often, go, started, work = (asyncio.Event() for _ in range(4))

    async def step() -> str:
        nonlocal calls
        calls += 1
        if calls == 5:
            often.set()
        if not go.is_set():
            raise Busy("cancel_tagging") if calls % 2 else TooSlow("thirty seconds")
        return "done"

    async def busy_batch() -> str:
        async with slots:
            return await slots.retry(step)

    async def other_batch() -> None:
        async with slots:
            started.set()
            await work.wait()

    slots.take()
    held = asyncio.create_task(busy_batch())
    async with asyncio.timeout(PATIENCE):
        await wake.wait("batch", None)
        assert slots.free == 1, "another batch can be claimed"
        await often.wait()
        slots.take()
        other = asyncio.create_task(other_batch())
        await started.wait()
        assert slots.free == 0
        done = calls
        go.set()
        await asyncio.sleep(0.01)
        assert calls == done, "it goes on only with a slot"
        work.set()
        await other
        slots.leave()
        assert await held == "done"
        slots.leave()
    assert slots.free == 1


class FakeDatabase:
    """Collects the answers, after it has raised the errors that the test wants."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls: list[tuple[list[BatchAnswer], bool]] = []
        self.finished = 0
        self.odd: dict[int, Exception] = {}  # what an answer raises as it is, by task …
        self.lost: dict[int, Exception] = {}  # … and every report of it
        self.stored: dict[int, str] = {}
        self.briefs = self

    async def get(self, _: int | None) -> None:
        """Returns no brief."""

    async def batch_answers(self, _: Batch, answers: list[BatchAnswer], *, keep: bool = False) -> Settled:
        self.calls.append((answers, keep))
        if self.errors:
            raise self.errors.pop(0)
        codes = {answer["task"]: answer.get("error", {}).get("code", "") for answer in answers}
        for task, code in codes.items():
            if error := self.lost.get(task) or (code != "internal_error" and self.odd.get(task)):
                raise error
        self.stored |= codes
        return Settled(len(answers), [])

    async def batch_finish(self, _: Batch) -> None:
        self.finished += 1
        if self.finished == 1:
            raise Busy("cancel_tagging")

    async def files_deleted(self, _: list[str]) -> None:
        pass


class FakeProvider:
    """A provider with one output file of 1,200 lines."""

    def __init__(self) -> None:
        self.reads = 0

    async def read_file(self, _: str) -> AsyncIterator[bytes]:
        self.reads += 1
        for task in range(1, 1201):
            yield LINE % task

    async def delete_file(self, _: str) -> None:
        pass


async def harvest(db: FakeDatabase) -> FakeProvider:
    provider = FakeProvider()
    slots = BatchSlots(Wake(), 1)
    given: Any = (cast("Database", db), cast("Provider", provider))
    harvester = Harvester(*given, Files(*given), slots)
    batch = Batch("b", 1, "harvesting", 1200, 0, False, "batch_1", "file-in", "file-out", None)
    slots.take()
    async with asyncio.timeout(PATIENCE), slots:
        await harvester.harvest(batch, SETTINGS)
    return provider


async def test_a_harvest_that_is_busy_starts_anew_later() -> None:
    db = FakeDatabase(Busy("cancel_tagging"))
    provider = await harvest(db)
    assert provider.reads == 2
    assert [len(answers) for answers, _ in db.calls] == [1000, 1000, 200]
    assert db.finished == 2, "the last step is repeated by itself"
    assert db.calls[1][0][0] == {**db.calls[1][0][0], "task": 1, "mark": MARK}


async def test_answers_for_slow_rows_are_kept_for_the_store_lane() -> None:
    db = FakeDatabase(TooSlow("ten seconds"))
    provider = await harvest(db)
    assert provider.reads == 1
    assert [(len(answers), keep) for answers, keep in db.calls] == [(1000, False), (1000, True), (200, True)]


@pytest.mark.parametrize("error", [psycopg.errors.DivisionByZero("x"), TypeError("surrogates not allowed")])
async def test_an_answer_that_raises_costs_its_image(error: Exception) -> None:
    """Only the outcome of that image is lost, as for single calls. The other answers of its page are stored."""
    db = FakeDatabase()
    db.odd = {7: error, 1150: error}
    provider = await harvest(db)
    assert provider.reads == 1
    assert db.stored == {task: "internal_error" if task in db.odd else "no_tags" for task in range(1, 1201)}
    assert len(db.calls) < 2 + 2 * 25, "by halves"


async def test_an_answer_that_raises_in_every_form_costs_its_image() -> None:
    db = FakeDatabase()
    db.lost = {1: psycopg.errors.DivisionByZero("x")}
    await harvest(db)
    assert set(db.stored) == set(range(2, 1201))


async def test_where_no_answer_can_be_stored_the_batch_is_not_over() -> None:
    """If the batch ended, all its images would be sent, and paid for, again."""
    db = FakeDatabase()
    db.lost = dict.fromkeys(range(1, 1201), psycopg.errors.UndefinedFunction("x"))
    with pytest.raises(psycopg.errors.UndefinedFunction):
        await harvest(db)
    assert db.finished == 0
    assert len(db.calls) < 50
