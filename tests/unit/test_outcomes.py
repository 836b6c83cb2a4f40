"""Outcomes reach the database one workspace at a time, whatever happens to the host's rows and the reports."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import cast

import psycopg
import pytest

from autotag.db import Busy, Database, Image, NotHeld, Settled, TooSlow, VersionsDiffer
from autotag.db.messages import Notice, ObservedLimits, Report, Sent, StageReport
from autotag.worker import outcomes as outcomes_module
from autotag.worker import stages as stages_module
from autotag.worker.claims import Claims
from autotag.worker.observations import Observations
from autotag.worker.outcomes import MAX_REPORTS, MAX_TRIES, SETTLES, WHOLE_TRIES, Outcomes
from autotag.worker.slow import SLOW_FOR, SlowWorkspaces
from autotag.worker.stages import Stages
from support import soon

PATIENCE = 20.0  # seconds; only a broken promise takes so long
BLUE, RED, GREEN, GREY = "blue", "red", "green", "grey"


@dataclass
class Call:
    """One call of settle."""

    workspace: str
    reports: list[Report]
    observed: ObservedLimits | None
    keep: bool

    @property
    def tasks(self) -> list[int]:
        return [report["task"] for report in self.reports]


class FakeDatabase:
    """Accepts every report, unless the test says otherwise."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.stages: list[tuple[str | None, list[int], Sent | None]] = []
        self.react: Callable[[Call], Awaitable[Settled | None]] | None = None
        self.refuse_stages: Callable[[str | None], Exception | None] = lambda _: None

    async def settle(
        self, workspace: str, reports: list[Report], observed: ObservedLimits | None, *, keep: bool
    ) -> Settled:
        call = Call(workspace, list(reports), observed, keep)
        self.calls.append(call)
        settled = await self.react(call) if self.react else None
        return settled or Settled(len(reports), [])

    async def report_stages(self, workspace: str | None, stages: list[StageReport], sent: Sent | None) -> list[Notice]:
        self.stages.append((workspace, [stage["task"] for stage in stages], sent))
        if error := self.refuse_stages(workspace):
            raise error
        return []


class Bench:
    """Outcomes with everything that they need."""

    def __init__(self) -> None:
        self.db, self.claims, self.slow, self.observations = FakeDatabase(), Claims(), SlowWorkspaces(), Observations()
        self.stages = Stages(cast("Database", self.db), self.observations, self.slow)
        self.outcomes = Outcomes(cast("Database", self.db), self.stages, self.observations, self.claims, self.slow)

    def add(self, workspace: str, *tasks: int, claim: int = 1) -> None:
        for task in tasks:
            self.outcomes.add(image(workspace, task, claim), {"called": True})

    async def idle(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self.outcomes.idle.wait()


def image(workspace: str, task: int, claim: int = 1) -> Image:
    return Image(task, f"asset {task}", "assets", "a.jpg", None, attempt=1, workspace=workspace, mark="m", claim=claim)


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    for name in ("BUSY_DELAY", "MAX_BUSY_DELAY", "ALONE_DELAY", "MAX_ALONE_DELAY"):
        monkeypatch.setattr(outcomes_module, name, 0.001)
    monkeypatch.setattr(stages_module, "STAGE_DELAY", 0.001)
    monkeypatch.setattr(stages_module, "FOLLOW_UP_DELAY", PATIENCE)
    made = Bench()
    running = [asyncio.create_task(made.outcomes.run()), asyncio.create_task(made.stages.run())]
    yield made
    assert not any(task.done() for task in running), "data ended the worker"
    for task in running:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def test_each_call_has_the_reports_of_one_workspace(bench: Bench) -> None:
    for task in range(0, 30, 3):
        bench.add(BLUE, task)
        bench.add(RED, task + 1)
        bench.add(GREEN, task + 2)
    await bench.idle()
    assert {call.workspace: call.tasks for call in bench.db.calls} == {
        BLUE: list(range(0, 30, 3)), RED: list(range(1, 30, 3)), GREEN: list(range(2, 30, 3)),
    }  # fmt: skip
    assert all(report.get("mark") == "m" for call in bench.db.calls for report in call.reports)


async def test_a_workspace_has_one_call_at_a_time_and_others_do_not_wait_for_it(bench: Bench) -> None:
    release = asyncio.Event()

    async def hold_blue(call: Call) -> None:
        if call.workspace == BLUE:
            await release.wait()

    bench.db.react = hold_blue
    bench.add(BLUE, 1)
    await soon(lambda: len(bench.db.calls) == 1)
    bench.add(BLUE, 2, 3)
    for task in range(10, 20):
        bench.add(RED, task)
        await soon(lambda task=task: task in bench.db.calls[-1].tasks)  # type: ignore[misc]
    assert [call.tasks for call in bench.db.calls if call.workspace == BLUE] == [[1]]
    release.set()
    await bench.idle()
    assert [call.tasks for call in bench.db.calls if call.workspace == BLUE] == [[1], [2, 3]]


async def test_a_few_workspaces_are_settled_at_the_same_time_in_turn(bench: Bench) -> None:
    running, most = 0, 0

    async def count(_: Call) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1

    bench.db.react = count
    bench.add(BLUE, *range(5 * MAX_REPORTS))
    for number in range(8):
        bench.add(f"workspace {number}", 10_000 + number)
    await bench.idle()
    assert most == SETTLES
    order = [call.workspace for call in bench.db.calls]
    assert order.index("workspace 7") < 9 + 1, f"the others waited for the large workspace: {order}"
    assert all(len(call.tasks) <= MAX_REPORTS for call in bench.db.calls)


@pytest.mark.parametrize("twice", [False, True])
async def test_what_takes_too_long_is_kept_at_once_and_for_a_while(bench: Bench, twice: bool) -> None:
    kept = 0

    async def slow_blue(call: Call) -> None:
        nonlocal kept
        kept += call.keep
        if call.workspace == BLUE and (not call.keep or (twice and kept == 1)):
            raise TooSlow("two seconds")

    bench.db.react = slow_blue
    bench.add(BLUE, 1, 2)
    await bench.idle()
    assert [(call.tasks, call.keep) for call in bench.db.calls] == [
        ([1, 2], False), ([1, 2], True), *([([1, 2], True)] if twice else []),
    ]  # fmt: skip
    bench.db.calls.clear()
    bench.add(BLUE, 3)
    bench.add(RED, 4)
    await bench.idle()
    assert [(call.tasks, call.keep) for call in bench.db.calls] == [([3], True), ([4], False)]


async def test_a_workspace_that_is_busy_gets_its_call_again(bench: Bench) -> None:
    answers: list[Settled | Exception] = [Settled(0, [], busy=True), Busy("deadlock"), Settled(2, [])]

    async def busy(_: Call) -> Settled:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    bench.db.react = busy
    bench.add(BLUE, 1, 2)
    await bench.idle()
    assert [(call.tasks, call.keep) for call in bench.db.calls] == [([1, 2], False)] * 3


@pytest.mark.parametrize("error", [psycopg.DataError("\\u0000"), TypeError("surrogate"), psycopg.InternalError("bug")])
async def test_a_report_that_raises_costs_its_image_alone(bench: Bench, error: Exception) -> None:
    settled: list[int] = []

    async def raise_on_13(call: Call) -> None:
        if any(report["task"] == 13 and "error" not in report for report in call.reports):
            raise error
        settled.extend(call.tasks)

    bench.db.react = raise_on_13
    bench.add(BLUE, *range(10, 20))
    bench.add(RED, 1)
    await bench.idle()
    assert sorted(settled) == [1, *range(10, 20)]
    tries = [call for call in bench.db.calls if call.tasks == [13]]
    assert len(tries) == WHOLE_TRIES + 1
    assert tries[-1].reports[0]["error"]["code"] == "internal_error"
    assert settled[-1] == 13, "the others did not wait for it"


@pytest.mark.parametrize("error", [
    NotHeld("PT409"), VersionsDiffer("PT426", "upgrade"), psycopg.OperationalError("gone"), KeyError("result"),
    RuntimeError("bug"), TimeoutError(), ExceptionGroup("several", [ValueError()]),
])  # fmt: skip
async def test_whatever_a_call_raises_no_answer_is_lost(bench: Bench, error: Exception) -> None:
    """Calls of other workspaces go on, and so do the workspace's own next calls."""
    settled: list[int] = []
    release, raised = asyncio.Event(), 0

    async def react(call: Call) -> None:
        nonlocal raised
        if call.workspace == RED:
            await release.wait()
        elif raised < 3:
            raised += 1
            raise error
        settled.extend(call.tasks)

    bench.db.react = react
    bench.add(RED, 1)
    await soon(lambda: len(bench.db.calls) == 1)
    bench.add(BLUE, 2, 3)
    await soon(lambda: sorted(settled) == [2, 3])
    bench.add(BLUE, 4)
    await soon(lambda: sorted(settled) == [2, 3, 4])
    release.set()
    await bench.idle()
    assert sorted(settled) == [1, 2, 3, 4]
    assert len([call for call in bench.db.calls if call.workspace == RED]) == 1, "it was not cancelled"


async def test_a_bug_after_a_call_stops_no_workspace(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("bug")

    monkeypatch.setattr(outcomes_module, "count_answers", fail)
    for task in (1, 2):
        bench.add(BLUE, task)
        await bench.idle()
    await soon(lambda: [call.tasks for call in bench.db.calls] == [[1], [2]])


async def test_a_report_that_always_raises_is_dropped(bench: Bench) -> None:
    async def refuse(call: Call) -> None:
        if 13 in call.tasks:
            raise psycopg.DataError("no")

    bench.db.react = refuse
    assert bench.claims.number() == 1
    bench.claims.receive(2)
    bench.add(BLUE, 12, 13)
    await bench.idle()
    assert len([call for call in bench.db.calls if call.tasks == [13]]) == MAX_TRIES
    bench.claims.number()
    assert bench.claims.listed() == [2], "the worker holds nothing of the first claim any more"


async def test_an_image_is_held_until_it_is_settled(bench: Bench) -> None:
    release = asyncio.Event()

    async def wait(_: Call) -> None:
        await release.wait()

    bench.db.react = wait
    for number in (1, 2):
        assert bench.claims.number() == number
        bench.claims.receive(1)
    bench.add(BLUE, 1, claim=1)
    await soon(lambda: len(bench.db.calls) == 1)
    assert bench.claims.listed() == [1, 2]
    release.set()
    await bench.idle()
    assert bench.claims.listed() == [2]
    bench.claims.number()
    assert bench.claims.listed() == [2, 3], "the last claim may be under way"


async def test_what_was_observed_is_reported_after_a_failure(bench: Bench) -> None:
    async def fail_once(_: Call) -> None:
        if len(bench.db.calls) == 1:
            raise TooSlow("two seconds")

    bench.db.react = fail_once
    bench.observations.count_sent()
    bench.observations.add_limits({"requests_left": 7}, sent=1.0)
    bench.add(BLUE, 1)
    await bench.idle()
    first, second = (call.observed for call in bench.db.calls)
    assert first is not None
    assert second is not None
    assert (second["sent"], second["requests_left"]) == (1, 7)
    assert second["age"] >= first["age"]
    assert bench.observations.take() is None


async def test_stages_are_reported_by_workspace_and_dropped_where_it_is_slow(bench: Bench) -> None:
    bench.db.refuse_stages = lambda workspace: TooSlow("two seconds") if workspace == BLUE else None
    for workspace, task in ((BLUE, 1), (RED, 2), (RED, 3), (GREEN, 4)):
        bench.stages.reach(image(workspace, task), "processing")
    bench.stages.forget(image(GREEN, 4))
    bench.observations.count_sent()
    await soon(lambda: len(bench.db.stages) == 2)
    assert [(workspace, tasks) for workspace, tasks, _ in bench.db.stages] == [(BLUE, [1]), (RED, [2, 3])]
    assert all(sent and sent["sent"] == 1 for _, _, sent in bench.db.stages), "a call that failed reported nothing"
    assert BLUE in bench.slow
    bench.stages.reach(image(BLUE, 5), "processing")
    bench.stages.reach(image(GREY, 6), "processing")
    await soon(lambda: len(bench.db.stages) == 3)
    assert bench.db.stages[-1] == (GREY, [6], None)


async def test_rows_that_no_message_has_told_of_yet_are_followed_up_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages_module, "FOLLOW_UP_DELAY", 1.0)

    async def hold_blue(call: Call) -> Settled:
        return Settled(len(call.reports), [], held=call.workspace == BLUE)

    bench.db.react = hold_blue
    for task in range(5):
        bench.add(BLUE, task)
        bench.add(RED, 10 + task)
        await bench.idle()
    await soon(lambda: bench.db.stages != [])
    bench.stages.follow_up(None)
    await soon(lambda: len(bench.db.stages) == 2)
    assert bench.db.stages == [(BLUE, [], None), (None, [], None)], "one report for all that was held in that time"


async def test_sent_calls_are_reported_although_every_workspace_is_slow(bench: Bench) -> None:
    bench.db.refuse_stages = lambda workspace: psycopg.DataError("no") if workspace else None
    bench.stages.reach(image(BLUE, 1), "processing")
    bench.observations.count_sent()
    await soon(lambda: len(bench.db.stages) == 2)
    workspace, tasks, sent = bench.db.stages[-1]
    assert (workspace, tasks) == (None, [])
    assert sent is not None
    assert sent["sent"] == 1


def test_a_workspace_that_is_slow_again_is_left_alone_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("autotag.worker.slow.time.monotonic", lambda: now)
    slow = SlowWorkspaces()
    slow.mark(BLUE)
    assert BLUE in slow
    assert RED not in slow
    now += SLOW_FOR
    assert BLUE not in slow
    slow.mark(BLUE)
    now += SLOW_FOR
    assert BLUE in slow, "twice as long the second time"
    now += SLOW_FOR
    assert BLUE not in slow
    now += 10 * SLOW_FOR
    slow.mark(BLUE)
    now += SLOW_FOR
    assert BLUE not in slow, "the first time again, after a good while"
