"""Providers: a wrong configuration costs a call or two and no image, and missing features of a server are noticed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from email.utils import formatdate
from typing import Any

import pytest
from structlog.testing import capture_logs

from lab.openai_sim.app import Plan
from lab.openai_sim.faults import Fault
from lab.postgres import free_port
from support import (
    Library,
    asked,
    audit,
    check_asked_once,
    check_money,
    compress,
    paid,
    pictures,
    refused,
    until,
    widen,
    worker,
)

SPEED = 4  # of autotag's clock, where a test has to wait for the next probe
ALL = frozenset({"json_schema", "json_object", "text"})
Change = Callable[[Plan], None]


@pytest.fixture
def fresh(library: Library) -> Library:
    """A workspace that meets no limit, of an installation whose provider has never answered."""
    widen(library.stack)
    library.sql("update autotag.provider_limits set fingerprint = null")
    return library


@pytest.fixture
def wide(library: Library) -> Library:
    """A workspace that meets no limit, and a provider that has answered before."""
    widen(library.stack)
    return library


def put(**fields: Any) -> Change:
    """Changes the simulator's plan."""

    def change(plan: Plan) -> None:
        for name, value in fields.items():
            assert hasattr(plan, name)
            setattr(plan, name, value)

    return change


def provider(library: Library) -> dict[str, Any]:
    row: dict[str, Any] = library.sql("select to_jsonb(p) as row from autotag.provider_limits p")[0]["row"]
    return row


def clock(library: Library) -> float:
    """Seconds on autotag's clock."""
    return float(library.sql("select extract(epoch from autotag.now()) as t")[0]["t"])


def held_by_workers(library: Library) -> int:
    """The number of single calls that workers hold."""
    return int(
        library.sql("select count(*) as n from autotag.tasks where worker_id is not null and finished_at is null")[0][
            "n"
        ]
    )


def failed(library: Library) -> int:
    return int(library.sql("select coalesce(sum(failed), 0) as n from autotag.jobs")[0]["n"])


async def check_repaired(library: Library, told: list[dict[str, Any]], repaired: float) -> None:
    """Checks that tagging resumes within forty seconds on autotag's clock, that everything is tagged, and that no image
    has a failure."""
    answered = len(paid(library.stack))
    await until(lambda: len(paid(library.stack)) > answered, "an answer")
    took = clock(library) - repaired
    assert took <= 40, f"{took:.0f} s after the mistake was repaired"
    await library.finished(*told)
    assert failed(library) == 0
    assert library.failures() == 0, "a failure was counted for an image that was not its cause"
    library.check_tags()
    check_asked_once(library.stack)
    check_money(library.stack)
    audit(library.stack)


# -- somebody has to repair it


@contextlib.asynccontextmanager
async def mistaken(library: Library, uploads: list[int], **changes: Any) -> AsyncIterator[list[dict[str, Any]]]:
    """Runs a wrongly configured worker while images wait. The context's body begins ten seconds (of autotag's clock)
    later."""
    stack = library.stack
    compress(stack, SPEED)
    drawings = pictures(sum(uploads))
    assets = await library.upload(drawings)
    library.watch_failures()
    told = [library.enqueue(assets[sum(uploads[:i]) : sum(uploads[: i + 1])]) for i in range(len(uploads))]
    started = clock(library)
    async with worker(stack, **changes):
        await until(lambda: clock(library) >= started + 9.5, "ten seconds")
        calls = [entry for entry in asked(stack) if (entry["status"] or 200) != 200]
        assert len(calls) <= 3, f"{len(calls)} calls were refused in ten seconds"
        assert failed(library) == 0
        assert not [entry for entry in stack.simulator.request_log if entry["method"] == "BATCH"], "a batch was begun"
        yield told


MISTAKES = {
    "wrong_key": (put(key="sk-another"), put(key="sk-local")),
    "unknown_model": (put(models=frozenset({"gpt-5.4-mini"})), put(models=None)),
    "no_credit": (put(credit=False), put(credit=True)),
    "no_vision": (put(vision=False), put(vision=True)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
async def test_a_mistake_costs_three_calls_in_ten_seconds_and_no_image_and_is_over_when_it_is_repaired(
    fresh: Library, mistake: str
) -> None:
    make, repair = MISTAKES[mistake]
    make(fresh.stack.simulator.plan)
    async with mistaken(fresh, [50, 60] if mistake == "no_credit" else [50]) as told:
        await until(lambda: provider(fresh)["account_error"] is not None, "what the operator is told")
        repaired = clock(fresh)
        repair(fresh.stack.simulator.plan)
        await check_repaired(fresh, told, repaired)
    assert provider(fresh)["account_error"] is None


async def test_a_model_that_nobody_knows_is_named_and_costs_no_image(fresh: Library) -> None:
    fresh.stack.configure(model="nope")
    async with mistaken(fresh, [50]) as told:
        await until(
            lambda: "`nope` does not exist" in (provider(fresh)["account_error"] or ""), "what the operator is told"
        )
        repaired = clock(fresh)
        fresh.stack.configure(model="gpt-6-luna")
        await check_repaired(fresh, told, repaired)


@pytest.mark.parametrize("address", ["no_v1", "closed_port"])
async def test_a_worker_with_a_wrong_address_costs_no_image_and_is_in_nobodys_way(fresh: Library, address: str) -> None:
    """A worker with the right address starts beside it, as in a rolling deployment."""
    stack = fresh.stack
    wrong = stack.openai_url.removesuffix("/v1") if address == "no_v1" else f"http://127.0.0.1:{free_port()}/v1"
    async with mistaken(fresh, [50, 60], openai_base_url=wrong) as told:
        repaired = clock(fresh)
        async with worker(stack):
            await check_repaired(fresh, told, repaired)
            # Nor when there is more to do.
            more = await fresh.upload(pictures(160)[110:], seed=2)
            await fresh.finished(fresh.enqueue(more))
    assert (failed(fresh), fresh.failures()) == (0, 0)
    fresh.check_tags()
    assert provider(fresh)["account_error"] is None


@pytest.mark.long
async def test_a_wrong_key_that_is_rolled_out_beside_the_right_one_costs_a_call_and_no_image(wide: Library) -> None:
    stack = wide.stack
    stack.simulator.plan.latency = (0.1, 0.2)
    assets = await wide.upload(pictures(80))
    wide.watch_failures()
    async with worker(stack, slots=4):
        told = [wide.enqueue(assets[i : i + 40]) for i in (0, 40)]
        await until(lambda: len(paid(stack)) > 10, "the first tags")
        with capture_logs() as logs:
            async with worker(stack, openai_api_key="sk-mistyped"):
                await check_repaired(wide, told, clock(wide))
    assert len(refused(stack)) == 1
    assert provider(wide)["account_error"] is None
    assert [e for e in logs if e["event"] == "worker_superseded"] != []


# -- the worker adapts by itself

FORMS = {
    "no_json_schema": (put(response_formats=ALL - {"json_schema"}), {"answer_format": "json_object"}, 1),
    "no_formats": (put(response_formats=frozenset({"text"})), {"answer_format": "text"}, 2),
    "max_tokens": (put(token_parameters=frozenset({"max_tokens"})), {"cap_parameter": "max_tokens"}, 1),
    "no_cap": (put(token_parameters=frozenset()), {"cap_parameter": "none"}, 2),
    "no_effort": (put(effort_parameter=False), {"sends_effort": False}, 1),
    "no_detail": (put(detail_parameter=False), {"sends_detail": False}, 1),
}


def check_form(library: Library, form: dict[str, Any]) -> None:
    """Checks the stored form of requests: the default one except for ``form``."""
    [row] = library.sql("select cap_parameter, answer_format, sends_effort, sends_detail, sends_tier"
                        " from autotag.models where name = 'gpt-6-luna'")  # fmt: skip
    before = {"cap_parameter": "max_completion_tokens", "answer_format": "json_schema", "sends_effort": True,
              "sends_detail": True, "sends_tier": True}  # fmt: skip
    assert row == before | form


@pytest.mark.parametrize("lacking", FORMS)
async def test_what_a_server_does_not_know_is_left_out_after_one_refusal_for_ever(fresh: Library, lacking: str) -> None:
    make, form, refusals = FORMS[lacking]
    stack = fresh.stack
    make(stack.simulator.plan)
    drawings = pictures(110)
    # with a batch once: the form is the same for both lanes
    assets = await fresh.upload(drawings if lacking == "no_json_schema" else drawings[:20])
    fresh.watch_failures()
    told = [fresh.enqueue(assets[:50]), *([fresh.enqueue(assets[50:])] if assets[50:] else [])]
    async with worker(stack):
        await check_repaired(fresh, told, clock(fresh))
        assert len(refused(stack)) == refusals
        assert [
            entry for entry in stack.simulator.request_log if entry["method"] == "BATCH" and entry["status"] != 200
        ] == []
        check_form(fresh, form)
    more = await fresh.upload(drawings[:5], seed=2)
    async with worker(stack):
        await fresh.finished(fresh.enqueue(more))
    assert len(refused(stack)) == refusals, "it was asked in the old form again"


@pytest.mark.parametrize("lost", ["no_json_schema", "max_tokens"])
async def test_a_form_that_is_refused_in_the_middle_of_a_run_makes_way_for_the_next_one_only(
    wide: Library, lost: str
) -> None:
    """Forty calls and a batch of fifty lines are in flight in the old form. All are refused, and the form changes by
    one step only."""
    stack = wide.stack
    make, form, _ = FORMS[lost]
    stack.simulator.plan.hold_answers = True
    drawings = pictures(110)
    assets = await wide.upload(drawings)
    wide.watch_failures()
    stack.configure(chunk_size=40, chunk_delay="0.3 s")
    async with worker(stack):
        told = [wide.enqueue(assets[:50]), wide.enqueue(assets[50:])]
        await until(lambda: stack.simulator.in_flight >= 30, "calls in flight")
        make(stack.simulator.plan)
        stack.simulator.plan.hold_answers = False
        await check_repaired(wide, told, clock(wide))
    assert refused(stack), "nothing was refused, so this shows nothing"
    check_form(wide, form)


# -- in the middle of a run


@pytest.mark.long
async def test_credit_that_runs_out_in_the_middle_of_a_run_fails_no_image(wide: Library) -> None:
    """Answers to calls that were in flight when the credit ran out do not resume tagging."""
    stack = wide.stack
    compress(stack, SPEED / 2)  # the machine's own slowness counts as often
    stack.configure(realtime_max_images=40)
    stack.simulator.plan.hold_answers = True
    stack.simulator.plan.batch_latency = (16.0, 16.0)
    assets = await wide.upload(pictures(180))
    wide.watch_failures()

    def under_way() -> bool:
        return any(batch["status"] == "in_progress" for batch in stack.simulator.batches.describe_all())

    async with worker(stack, slots=40):
        told = [wide.enqueue(assets[120:])]
        await until(under_way, "a batch under way")
        told += [wide.enqueue(assets[i : i + 40]) for i in (0, 40, 80)]
        await until(lambda: stack.simulator.in_flight >= 30, "calls in flight")
        assert under_way()
        stack.simulator.plan.credit = False
        stack.simulator.plan.hold_answers = False
        await until(lambda: provider(wide)["account_error"] is not None, "the account's trouble")
        held, answered = (
            held_by_workers(wide),
            len(refused(stack)),
        )  # some that are held are refused, and not reported yet
        started = clock(wide)
        await until(lambda: clock(wide) >= started + 20, "two probes")
        assert len(refused(stack)) <= answered + held + 3, "what was in hand, and the probes"
        assert failed(wide) == 0
        repaired = clock(wide)
        stack.simulator.plan.batch_latency = (0.5, 0.5)
        stack.simulator.plan.credit = True
        await check_repaired(wide, told, repaired)


# -- what a server lacks


async def test_without_a_batch_api_everything_goes_as_single_calls_and_says_so(wide: Library) -> None:
    stack = wide.stack
    stack.simulator.plan.batch_api = False
    stack.configure(chunk_max_images=10, batch_max_images=30, batch_split_images=20)
    assets = await wide.upload(pictures(60))
    wide.watch_failures()
    async with worker(stack):
        told = wide.enqueue(assets)
        assert told["strategy"] == "batch-parallel", "nobody knows it yet"
        [job] = await wide.finished(told)
        strategy = wide.rpc("public.tagging_strategy", 60)
    sentence = "The AI provider has no Batch API, so these images are sent as single calls."
    assert (job["completed"], job["failed"], job["fallback"]) == (60, 0, sentence)
    assert (strategy["type"], strategy["batches"], strategy["note"]) == ("realtime-chunked", 0, sentence)
    wide.check_tags()
    assert wide.failures() == 0
    assert len(paid(stack)) == 60
    check_asked_once(stack)
    check_money(stack)
    audit(stack)
    assert provider(wide)["has_batches"] is False
    later = wide.enqueue(wide.insert([f"{i}.jpg" for i in range(60)]))
    assert later["strategy"] == "realtime-chunked"


@pytest.mark.parametrize("batch_api", [True, False])
async def test_where_only_batches_wait_one_of_their_images_tries_the_question(fresh: Library, batch_api: bool) -> None:
    """If only batches wait, one of their images is sent as a single call to prove the question, so no batch starts
    unproven and none waits for ever."""
    stack = fresh.stack
    stack.simulator.plan.batch_api = batch_api
    stack.configure(express_images=0)
    assets = await fresh.upload(pictures(60))
    async with worker(stack):
        [job] = await fresh.finished(fresh.enqueue(assets))
    assert (job["completed"], job["failed"]) == (60, 0)
    assert sum(entry["method"] == "POST" for entry in paid(stack)) == (1 if batch_api else 60)
    assert provider(fresh)["has_batches"] is batch_api
    fresh.check_tags()
    check_asked_once(stack)
    audit(stack)


def test_to_have_a_batch_proves_nothing(fresh: Library) -> None:
    name = "00000000-0000-4000-8000-000000000001"
    fresh.enqueue(fresh.insert([f"{i}.jpg" for i in range(60)]))
    fresh.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true, 'http://x', 'a key')", name)
    [batch] = fresh.sql("update autotag.batches set state = 'creating', worker_id = %s, attempt = 1 returning id", name)
    fresh.sql("select autotag.batch_submitted(%s, %s, 1, 'batch_x', 'validating', 'file-x')", name, batch["id"])
    assert provider(fresh)["proven_at"] is None
    assert len(fresh.claim(name, 100)["tasks"]) == 1, "one image tries, however many wait"


async def test_one_image_that_draws_an_error_of_the_account_ends_and_stops_nobody_for_ever(wide: Library) -> None:
    """A gateway with a small limit for bodies refuses only this picture: 413, with an HTML page that gives no
    reason."""
    stack = wide.stack
    stack.configure(account_probe_interval="0.2 s", max_failures=3)
    drawings = pictures(8)
    page = "<html><head><title>413 Request Entity Too Large</title></head></html>"
    stack.simulator.faults.add(Fault(status=413, body=page, times=100, tags=sorted(drawings[2].tags)))
    assets = await wide.upload(drawings)
    async with worker(stack):
        [job] = await wide.finished(wide.enqueue(assets))
    assert (job["completed"], job["failed"]) == (7, 1)
    assert wide.assets()[assets[2]]["tagging_stage"] == "failed"
    wide.check_tags([asset for asset in assets if asset != assets[2]])
    audit(stack)


@pytest.mark.parametrize(("least", "kept"), [(1_209_600, 1_209_600), (10**9, None)], ids=["azure", "no_expiry"])
async def test_files_are_kept_as_long_as_the_provider_wants_after_one_refusal(
    wide: Library, least: int, kept: int | None
) -> None:
    """Several batches meet the refusal at the same time. It counts as one."""
    stack = wide.stack
    stack.simulator.plan.min_expires = least
    stack.configure(batch_max_images=60, batch_split_images=20, express_images=1)
    assets = await wide.upload(pictures(80))
    async with worker(stack):
        [job] = await wide.finished(wide.enqueue(assets))
        files = [e for e in stack.simulator.request_log if (e["method"], e["path"]) == ("POST", "/v1/files")]
        assert provider(wide)["keep_files"] == kept
        assert provider(wide)["account_error"] is None
        steps = 1 if kept else 2  # our week, and Azure's two
        assert sum(e["status"] == 400 for e in files) <= steps * 4, "more than once for each of four batches"
        refusals = sum(e["status"] == 400 for e in files)
        more = await wide.upload(pictures(80)[:60], seed=2)
        [again] = await wide.finished(wide.enqueue(more))
        files = [e for e in stack.simulator.request_log if (e["method"], e["path"]) == ("POST", "/v1/files")]
        assert sum(e["status"] == 400 for e in files) == refusals, "it was asked in the old form again"
    assert (job["failed"], again["failed"]) == (0, 0)
    assert len([e for e in paid(stack) if e["method"] == "BATCH"]) == 79 + 59
    wide.check_tags()
    audit(stack)


async def test_a_server_without_rate_headers_works_and_that_is_a_fact(wide: Library) -> None:
    stack = wide.stack
    stack.simulator.plan.rate_headers = False
    assets = await wide.upload(pictures(20))
    before = provider(wide)
    async with worker(stack):
        [job] = await wide.finished(wide.enqueue(assets))
    assert (job["completed"], job["failed"]) == (20, 0)
    after = provider(wide)
    assert after["has_rate_headers"] is False
    assert after["requests_per_minute"] == before["requests_per_minute"]
    status = wide.sql("select autotag.status() -> 'model' -> 'provider' as told")[0]["told"]
    assert status["rate_headers"] is False


# -- Retry-After


async def test_a_call_is_not_made_again_before_retry_after_is_over_whatever_its_status(wide: Library) -> None:
    """`retry-after` may be seconds or a date. Pictures that were not refused do not wait for it."""
    stack = wide.stack
    drawings = pictures(8)
    ends: list[float] = []  # of each picture's wait: seconds from its refusal, or a moment
    assets = await wide.upload(drawings)
    async with worker(stack):
        await until(lambda: wide.sql("select 1 from autotag.workers") != [], "the worker")
        until_then = time.time() + 4  # a date has whole seconds
        waits = [(503, "3"), (500, "3"), (408, "3"), (503, formatdate(until_then, usegmt=True))]
        for drawing, (status, header) in zip(drawings, waits, strict=False):
            stack.simulator.faults.add(Fault(status=status, headers={"retry-after": header}, tags=sorted(drawing.tags)))
        await wide.finished(wide.enqueue(assets))
    wide.check_tags()
    for drawing, (status, header) in zip(drawings, waits, strict=False):
        first, second = [e for e in asked(stack) if set(e["tags"]) == drawing.tags]
        assert (first["status"], second["status"]) == (status, 200)
        end = first["at"] + 3 if header == "3" else float(int(until_then))
        assert second["at"] >= end, f"{status} {header}: {second['at'] - first['at']:.2f} s"
        ends.append(end)
    others = [e["at"] for e in asked(stack) if not any(set(e["tags"]) == d.tags for d in drawings[:4])]
    assert max(others) < min(ends), "pictures that nobody refused waited"


@pytest.mark.parametrize("header", ["seconds", "date"])
async def test_after_a_429_nothing_is_called_before_retry_after_is_over(wide: Library, header: str) -> None:
    stack = wide.stack
    assets = await wide.upload(pictures(6))
    end = time.time() + 3
    value = "2" if header == "seconds" else formatdate(end, usegmt=True)
    stack.simulator.faults.add(Fault(status=429, code="rate_limit_exceeded", headers={"retry-after": value}))
    stack.configure(realtime_max_images=6, chunk_max_images=6)
    async with worker(stack, slots=1):
        await wide.finished(wide.enqueue(assets))
    first, *others = asked(stack)
    assert first["status"] == 429
    assert len(others) == 6
    end = first["at"] + 2 if header == "seconds" else int(end)
    # Calls may have been released already when the refusal was reported, which takes longer on a busy machine.
    early = [e for e in others if e["at"] < end]
    assert all(e["at"] < first["at"] + 0.7 for e in early)
    assert all(e["picture"] != first["picture"] for e in early)
    assert len(early) < len(others) - 1, "the rest waited"


@pytest.mark.parametrize(
    "request_line",
    ["POST /v1/files", "POST /v1/batches", "GET /v1/batches", "GET /v1/files/", "DELETE /v1/files/", "GET /v1/models/"],
)
async def test_the_batch_lane_keeps_to_retry_after_too(wide: Library, request_line: str) -> None:
    """One kind of request (upload, creation, list, download, deletion, look-up of the model) gets a 503 with
    `retry-after`. No such request follows before that time. While the list waits, another batch is submitted and a
    webhook arrives."""
    stack = wide.stack
    stack.configure(realtime_max_images=0, chunk_max_images=0, batch_create_grace="0.1 s", express_images=0)  # fmt: skip
    stack.simulator.plan.batch_latency = (0.3, 0.5)
    stack.simulator.faults.add(Fault(where=request_line, status=503, headers={"retry-after": "2"}))
    method, path = request_line.split()
    drawings = pictures(6)
    assets = await wide.upload(drawings)

    def those() -> list[dict[str, Any]]:
        return [e for e in stack.simulator.request_log if e["method"] == method and e["path"].startswith(path)]

    async with worker(stack):
        told = [wide.enqueue(assets[:3])]
        await until(lambda: any(e["status"] == 503 for e in those()), "the refusal")
        refusal = next(e for e in those() if e["status"] == 503)
        if method == "GET" and path == "/v1/batches":
            told.append(wide.enqueue(assets[3:]))
            await until(lambda: wide.sql("select 1 from autotag.batches where state = 'submitted' and ordinal = 1"
                                         " and job_id = %s", told[1]["job_id"]) != [], "the other batch")  # fmt: skip
            wide.sql("select autotag.receive_webhook('wh_1', 'batch.completed', openai_batch_id) from autotag.batches"
                     " where state = 'submitted' order by created_at limit 1")  # fmt: skip
        await wide.finished(*told)

        def asked_again() -> bool:
            # As if a day had passed, and whoever may is called.
            wide.sql(
                "update autotag.provider_limits set checked_at = '-infinity'; select pg_notify('autotag', 'batch')"
            )
            return any(e["at"] > refusal["at"] for e in those())

        await until(asked_again, "the next request")
    after = [e for e in those() if e["at"] > refusal["at"] and (path != "/v1/files/" or e["path"] == refusal["path"])]
    assert after, "it was never asked again"
    assert min(e["at"] for e in after) >= refusal["at"] + 2, f"asked again after {after[0]['at'] - refusal['at']:.2f} s"
    wide.check_tags([asset for job in (assets[:3], assets[3:])[: len(told)] for asset in job])
    assert failed(wide) == 0
    audit(stack)
