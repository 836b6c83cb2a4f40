"""Models: the cost of an image, the length of an answer, and the switch to another model."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from autotag.errors import KINDS
from lab.openai_sim.models import MODELS
from support import (
    Library,
    asked,
    audit,
    check_asked_once,
    check_money,
    paid,
    pictures,
    until,
    widen,
    worker,
)

MIXED = (4, 30, 60, 210)  # images of uploads, one for each strategy
STRATEGIES = ["realtime", "realtime-chunked", "batch", "batch-parallel"]


@pytest.fixture
def wide(library: Library) -> Library:
    """A workspace that meets no limit."""
    widen(library.stack)
    return library


async def upload_mixed(library: Library, sizes: tuple[int, ...] = MIXED) -> list[list[str]]:
    """Asset ids of uploads of these sizes; no two pictures are equal."""
    drawings, uploads, first = pictures(sum(sizes)), [], 0
    for size in sizes:
        uploads.append(await library.upload(drawings[first : first + size]))
        first += size
    return uploads


# -- money


async def test_each_image_of_each_strategy_is_one_paid_answer_at_the_exact_price(wide: Library) -> None:
    uploads = await upload_mixed(wide)
    async with worker(wide.stack):
        told = [wide.enqueue(assets) for assets in uploads]
        jobs = await wide.finished(*told)
    assert [job["strategy"] for job in told] == STRATEGIES
    assert [(job["completed"], job["failed"]) for job in jobs] == [(size, 0) for size in MIXED]
    wide.check_tags()
    assert len(paid(wide.stack)) == sum(MIXED)
    check_asked_once(wide.stack)
    assert {entry["effort"] for entry in paid(wide.stack)} == {"none"}
    assert {(r["model"], r["service_tier"]) for r in wide.sql("select model, service_tier from autotag.usage")} == {
        ("gpt-6-luna-2026-10-06", "default"), ("gpt-6-luna-2026-10-06", "batch")}  # fmt: skip
    check_money(wide.stack)
    audit(wide.stack)
    # What is reserved for an image is what the largest shape uses (a square has 256 patches, the others 150) and little more;
    # the means, which predict what a run costs, are those of the three shapes.
    used = [entry["usage"]["total_tokens"] for entry in paid(wide.stack)]
    [row] = wide.sql("select tokens_per_image, prompt_mean + output_mean as mean from autotag.provider_limits")
    assert row["tokens_per_image"] <= 1.07 * max(used)
    assert row["mean"] == pytest.approx(sum(used) / len(used), rel=0.03)
    assert all(entry["status"] == 200 for entry in asked(wide.stack)), "no call met a limit"


async def test_a_price_that_changes_in_the_middle_of_a_day_holds_from_then_on(wide: Library) -> None:
    uploads = [await wide.upload(pictures(10)[:5]), await wide.upload(pictures(10)[5:])]
    async with worker(wide.stack):
        await wide.finished(wide.enqueue(uploads[0]))
        before = list(paid(wide.stack))
        wide.sql("update autotag.models set input_price = 10, output_price = 50 where name = 'gpt-6-luna'")
        await wide.finished(wide.enqueue(uploads[1]))
    after = [entry for entry in paid(wide.stack) if entry not in before]
    assert (len(before), len(after)) == (5, 5)
    # the new prices are a hundred times the old ones
    expected = sum(Decimal(e["dollars"]) for e in before) + 100 * sum(Decimal(e["dollars"]) for e in after)
    [row] = wide.sql("select cost, requests from autotag.usage")
    assert (row["cost"], row["requests"]) == (expected, 10)


async def test_a_model_without_a_row_works_and_its_cost_is_unknown_until_it_has_a_price(wide: Library) -> None:
    """A quota in dollars neither refuses nor counts images without a price."""
    stack = wide.stack
    stack.simulator.plan.models = frozenset({"my-model"})
    stack.configure(model="my-model")
    wide.sql("insert into autotag.quotas (scope, period, max_cost) values ('workspace', 'day', 1)")
    assets = await wide.upload(pictures(10))
    async with worker(stack):
        [job] = await wide.finished(wide.enqueue(assets))
    assert job["completed"] == 10
    wide.check_tags()
    usage = "select cost from autotag.list_usage(%s, current_date - 1, current_date + 1)"
    assert [row["cost"] for row in wide.sql(usage, wide.member.workspace)] == [None]
    today = wide.sql("select autotag.status() -> 'today' as today")[0]["today"]
    assert (today["cost"], today["unpriced_requests"], today["unpriced_models"]) == (0, 10, ["my-model"])
    assert wide.sql("select (autotag.metrics() ->> 'unpriced_today')::integer as n") == [{"n": 10}]
    left = "select available from autotag.quotas_left(%s, null)"
    assert [row["available"] for row in wide.sql(left, wide.member.workspace)] == [1]
    wide.sql("insert into autotag.models (name, input_price, output_price) values ('my-model', 2, 8)")
    used = [entry["usage"] for entry in paid(stack)]
    cost = sum(Decimal(2 * u["prompt_tokens"] + 8 * u["completion_tokens"]) for u in used) / 1_000_000
    assert [row["cost"] for row in wide.sql(usage, wide.member.workspace)] == [cost]
    today = wide.sql("select autotag.status() -> 'today' as today")[0]["today"]
    assert (Decimal(str(today["cost"])), today["unpriced_requests"]) == (cost, 0)
    assert [row["available"] for row in wide.sql(left, wide.member.workspace)] == [1 - cost]


# -- how long an answer may be


@pytest.mark.parametrize(
    ("effort", "sizes"),
    [("medium", (4, 30, 60, 206)), ("high", (30,)), (None, (30,))],
    ids=["medium", "high", "not_sent"],
)
async def test_a_model_that_thinks_is_asked_hardly_more_often_than_there_are_images(
    wide: Library, effort: str | None, sizes: tuple[int, ...]
) -> None:
    """The cap leaves room for reasoning, because an answer that is cut off is paid for without use."""
    wide.sql("update autotag.models set reasoning_effort = %s where name = 'gpt-6-luna'", effort)
    uploads = await upload_mixed(wide, sizes)
    async with worker(wide.stack):
        jobs = await wide.finished(*[wide.enqueue(assets) for assets in uploads])
    assert sum(job["failed"] for job in jobs) == 0
    wide.check_tags()
    assert {entry["effort"] for entry in paid(wide.stack)} == {effort or "medium"}
    assert len(paid(wide.stack)) <= 1.2 * sum(sizes)
    check_money(wide.stack)
    audit(wide.stack)


def caps(library: Library) -> dict[str, list[int]]:
    """The caps of each picture's calls, in the order of the calls."""
    by_picture = defaultdict(list)
    for entry in paid(library.stack):
        by_picture[entry["picture"]].append(entry["cap"])
    return by_picture


async def test_a_cut_off_answer_is_asked_again_with_more_room_and_its_neighbours_are_not_kept_waiting(
    wide: Library,
) -> None:
    """Some pictures need 600 to 900 tokens of reasoning, and the cap fits pictures that need none."""
    stack = wide.stack
    stack.simulator.plan.reasoning_tokens["none"] = (600, 900)
    assets = await wide.upload(pictures(70))
    async with worker(stack):
        jobs = await wide.finished(wide.enqueue(assets[:10]), wide.enqueue(assets[10:]))
    assert [(job["completed"], job["failed"]) for job in jobs] == [(10, 0), (60, 0)]
    wide.check_tags()
    grown = caps(wide)
    assert any(len(tries) > 1 for tries in grown.values()), "no answer was cut off, so this shows nothing"
    assert any(e["method"] == "BATCH" and e["usage"]["completion_tokens"] == e["cap"] for e in paid(stack))
    for tries in grown.values():
        assert all(a < b for a, b in itertools.pairwise(tries)), tries
    check_money(stack)
    audit(stack)


@pytest.mark.parametrize("size", [5, 60], ids=["single", "batch"])
async def test_an_answer_that_no_cap_is_enough_for_fails_with_a_sentence_and_the_operator_is_told(
    wide: Library, size: int
) -> None:
    """For one picture, the model reasons beyond every cap. That image fails, a log line tells the operator, and the
    other images are tagged."""
    stack = wide.stack
    stack.configure(max_output_tokens=2000, express_images=1)
    # The first goes alone and is not of the batch; the last is.
    drawings = pictures(size)
    assets = await wide.upload(drawings)
    endless = drawings[-1]
    answer = stack.simulator.answer

    def think_without_end(asked: Any, picture: Any, name: str, wrong: Any) -> Any:
        it = picture is not None and set(picture.tags) == endless.tags
        stack.simulator.plan.reasoning_tokens["none"] = (10**6, 10**6) if it else (0, 0)
        return answer(asked, picture, name, wrong)

    stack.simulator.answer = think_without_end  # type: ignore[method-assign]
    with capture_logs() as logs:
        async with worker(stack):
            [job] = await wide.finished(wide.enqueue(assets))
    assert (job["completed"], job["failed"]) == (size - 1, 1)
    wide.check_tags(assets[:-1])
    assert wide.assets()[assets[-1]]["tagging_error"] == "The AI's answer for this image was cut off."
    [notice] = [entry for entry in logs if entry["event"] == "answer_cut_off"]
    assert assets[-1] in notice["notice"]
    assert "2000 tokens, the most that settings.max_output_tokens allows" in notice["notice"]
    tries = next(tries for tries in caps(wide).values() if len(tries) > 1)
    assert all(a < b for a, b in itertools.pairwise(tries))
    assert tries[-1] == 2000
    assert len(paid(stack)) == size - 1 + len(tries)
    check_money(stack)
    audit(stack)


# -- another model


async def test_the_model_is_switched_under_load_and_back_without_losing_or_repeating_anything(wide: Library) -> None:
    """In both lanes, calls that are claimed after the switch use the new model, and calls in flight end with the old
    one."""
    stack = wide.stack
    stack.simulator.plan.latency = (1.0, 1.5)
    stack.configure(batch_max_images=60, batch_split_images=20)
    drawings = pictures(210)
    # of each model a single-call upload and one of batches; the first ones are under way when the model is switched
    models = ("gpt-6-luna", "gpt-5.4-mini", "gpt-6-luna")
    assets = [await wide.upload(drawings[first : first + 70]) for first in (0, 70, 140)]
    told: list[dict[str, Any]] = []
    before: list[list[dict[str, Any]]] = []

    def lines(model: str) -> bool:
        book = stack.simulator.request_log
        return any(entry["method"] == "BATCH" and model in (entry.get("model") or "") for entry in book)

    async with worker(stack, slots=12):
        for number, (some, model) in enumerate(zip(assets, models, strict=True)):
            if number:
                stack.configure(model=model)
            batches = wide.enqueue(some[10:])
            if number < 2:
                await until(lambda model=model: lines(model), "lines of its batches")  # type: ignore[misc]
            told += [wide.enqueue(some[:10]), batches]
            if number < 2:
                await until(lambda: stack.simulator.in_flight > 0, "calls in flight")
                before.append(list(stack.simulator.request_log))
        jobs = await wide.finished(*told)
    assert [(job["completed"], job["failed"]) for job in jobs] == [(10, 0), (60, 0)] * 3
    wide.check_tags()
    assert len(paid(stack)) == 210
    check_asked_once(stack)
    check_money(stack)
    audit(stack)
    assert [entry["status"] for entry in asked(stack) if entry["status"] != 200] == []
    lanes = defaultdict(set)
    for entry in paid(stack):
        tags = frozenset(entry["tags"])
        number = next(i for i, drawing in enumerate(drawings) if drawing.tags == tags) // 70
        lanes[number, entry["method"]].add(entry["model"])
    luna, mini = MODELS["gpt-6-luna"].dated, MODELS["gpt-5.4-mini"].dated
    # All of the last upload was claimed after the last switch, and none of the others before the first.
    assert (lanes[2, "POST"], lanes[2, "BATCH"]) == ({luna}, {luna})
    assert mini in lanes[1, "POST"] & lanes[1, "BATCH"]
    for entry in before[0]:
        if entry.get("picture"):
            assert entry["model"] == luna, "a call in flight ends as it began"


async def test_a_snapshot_has_its_familys_price_also_after_the_provider_has_told_its_end(wide: Library) -> None:
    """The daily check gives the snapshot a row of its own, with its shutdown date and its family's prices."""
    stack = wide.stack
    model = "gpt-4.1-mini-2025-04-14"
    wide.sql("update autotag.models set shutdown_date = null where name = 'gpt-4.1-mini'")
    stack.configure(model=model)
    assets = await wide.upload(pictures(6))
    async with worker(stack):
        await wide.finished(wide.enqueue(assets[:3]))
        await until(
            lambda: wide.sql("select shutdown_date from autotag.find_model(%s)", model)[0]["shutdown_date"] is not None,
            "the model's end",
        )
        await wide.finished(wide.enqueue(assets[3:]))
    assert str(wide.sql("select shutdown_date from autotag.find_model(%s)", model)[0]["shutdown_date"]) == "2027-01-14"
    check_money(stack)
    [days] = wide.sql(
        "select (autotag.metrics() ->> 'shutdown_days')::integer as n,"
        " date '2027-01-14' - (now() at time zone 'utc')::date as so_many"
    )
    assert days["n"] == days["so_many"]


@pytest.mark.parametrize("model", ["gpt-4o-mini", "my-model"])
async def test_what_the_provider_says_of_a_models_end_is_kept(wide: Library, model: str) -> None:
    stack = wide.stack
    stack.simulator.plan.models = frozenset({model})
    stack.configure(model=model)
    wide.sql("update autotag.models set shutdown_date = null where name = %s", model)
    assets = await wide.upload(pictures(1))
    asked_for = f"/v1/models/{model}"
    async with worker(stack):
        await wide.finished(wide.enqueue(assets))
        await until(
            lambda: (
                wide.sql("select checked_at > '-infinity' as so from autotag.provider_limits")[0]["so"]
                and any(e["path"] == asked_for and e["status"] for e in stack.simulator.request_log)
            ),
            "the check",
        )
        end = MODELS[model].shutdown_date if model in MODELS else None
        await until(
            lambda: (
                str(wide.sql("select shutdown_date from autotag.find_model(%s)", model)[0]["shutdown_date"]) == str(end)
            ),
            "the date",
        )
        await asyncio.to_thread(wide.sql, "select pg_notify('autotag', 'batch')")
    assert sum(entry["path"] == asked_for for entry in stack.simulator.request_log) == 1, "once a day"


# -- errors


def test_python_and_the_database_agree_on_what_follows_from_an_error(library: Library) -> None:
    rows = library.sql("select kind, counts, delays, pauses, ends, suspects from autotag.error_kinds")
    assert {row.pop("kind"): {**row, "suspects": tuple(row["suspects"])} for row in rows} == {
        kind: what._asdict() for kind, what in KINDS.items()
    }


def test_an_unknown_kind_of_error_counts_as_passing_and_ends_after_its_tries(library: Library) -> None:
    library.stack.configure(max_failures=3, retry_delay="1 ms")
    library.enqueue(library.insert(["a.jpg"]))
    for tries in range(1, 4):
        [task] = claim(library)
        library.settle(WORKER, [{**task, "error": {"kind": "cosmic", "code": "ray", "message": "Zap.", "retry": "no"}}])
        [row] = library.sql("select stage, failures, error_code from autotag.tasks")
        assert row["stage"] == ("failed" if tries == 3 else "queued")
    assert row["error_code"] == "ray"
    audit(library.stack)


WORKER = "00000000-0000-4000-8000-000000000001"


def claim(library: Library, images: int = 100) -> list[dict[str, Any]]:
    """Claims as a worker does: {task, attempt}. Whatever is delayed is due."""
    library.sql("update autotag.tasks set retry_at = now() where retry_at is not null")
    library.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", WORKER)
    return [{"task": i["task"], "attempt": i["attempt"]} for i in library.claim(WORKER, images)["images"]]


def garbage() -> st.SearchStrategy[Any]:
    """Generates JSON that a stranger could send in the place of any value."""
    texts = st.text(st.characters(exclude_characters="\x00", exclude_categories=["Cs"]), max_size=200)
    leaves = st.none() | st.booleans() | texts | st.integers() | st.sampled_from(
        [0, -1, 2**31, 2**63, 10**400, -(10**400), 0.5, 1e300, -1e300, 1e-300, "9" * 500, "NaN", "Infinity", "-1", ""]
    )  # fmt: skip
    return st.recursive(
        leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=6
    )


def errors() -> st.SearchStrategy[Any]:
    """Generates errors with any values in any part, and values that are not errors."""
    kinds = st.sampled_from(["transient", "rate_limit", "account", "image", "cosmic"])
    parameters = st.sampled_from(["token_cap", "response_format", "detail", "expires_after"])
    return garbage() | st.fixed_dictionaries({}, optional={
        "kind": kinds | garbage(), "code": garbage(), "message": garbage(), "retry": st.booleans() | garbage(),
        "retry_after": garbage(), "origin": garbage(), "parameter": parameters | garbage(),
    })  # fmt: skip


def reports() -> st.SearchStrategy[dict[str, Any]]:
    """Generates reports about one image: an error or an invalid result, and usage with any values."""
    names = ["input", "cached", "cache_write", "output", "reasoning", "model", "tier"]
    usage = garbage() | st.fixed_dictionaries({}, optional={name: garbage() for name in names})
    return st.fixed_dictionaries({}, optional={"error": errors(), "result": garbage(), "usage": usage})


@given(told=st.lists(reports(), min_size=1, max_size=15))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_no_report_whatever_it_says_harms_another_or_fails_its_image_at_once(
    library: Library, told: list[dict[str, Any]]
) -> None:
    library.stack.configure(realtime_max_images=50)
    library.sql("delete from autotag.jobs; delete from autotag.workspaces; delete from public.workspace_rate_limits;"
                " delete from autotag.learned; delete from autotag.usage; delete from public.assets;"
                " update autotag.models set cap_parameter = 'max_completion_tokens', answer_format = 'json_schema',"
                " sends_detail = true")  # fmt: skip
    # A form that an earlier example had refused is another question: it is proven only after the claim has noticed.
    library.sql("select autotag.sync_question(p) from autotag.provider_limits p")
    library.sql("update autotag.provider_limits set proven_at = now(), account_error = null, probe_at = null,"
                " account_error_from = null, blocked_until = '-infinity', requests_left = 500, tokens_left = 200000,"
                " day_left = 10000")  # fmt: skip
    assets = library.insert([f"{i}.jpg" for i in range(len(told) + 1)])
    library.enqueue(assets)
    *strange, good = claim(library)
    assert len(strange) == len(told)
    result = {"tags": ["blue"], "confidence": {"blue": 1}, "caption": "Blue."}
    accepted = library.settle(WORKER, [{**task, **report} for task, report in zip(strange, told, strict=True)]
                    + [{**good, "result": result, "usage": {"input": 100, "output": 10}}])  # fmt: skip
    rows = library.assets()
    assert rows[assets[-1]]["tags"] == ["blue"]
    assert accepted == len(assets)
    for asset, report in zip(assets, told, strict=False):
        error = report.get("error")
        final = isinstance(error, dict) and error.get("kind") == "image" and error.get("retry") not in (True, "true")
        stage = rows[asset]["tagging_stage"]
        assert stage == "failed" if final else stage != "failed", (stage, report)
    audit(library.stack)
