"""`autotag compare` asks another model about tagged images, within all limits and without a trace in the host's
rows."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from typer.testing import CliRunner

from autotag.cli.app import app
from conftest import TEMPLATE, copied_database, quicken
from forked import run_command
from lab.openai_sim.faults import Fault
from lab.pictures import Drawing
from lab.postgres import LocalPostgres
from lab.stack import OPERATOR_ROLE, Member, Stack, local_stack
from support import (
    PATIENCE,
    Library,
    answered_pictures,
    audit,
    close_connections,
    compress,
    connected,
    until,
    worker,
)

CURRENT, SECOND = "gpt-4.1-mini", "gpt-6-luna"


@dataclass
class Kept:
    """A database with twelve tagged images, of which each test gets a copy, and their files."""

    database: str
    member: Member
    drawings: dict[str, Drawing]
    files: Path


@pytest.fixture(scope="session")
def kept(postgres: LocalPostgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kept]:
    files = tmp_path_factory.mktemp("kept")
    with copied_database(postgres, TEMPLATE) as database, ThreadPoolExecutor(1) as thread:
        # a session fixture cannot use a test's event loop
        yield thread.submit(asyncio.run, tag_twelve(postgres, database, files)).result()


async def tag_twelve(postgres: LocalPostgres, database: str, files: Path) -> Kept:
    async with local_stack(postgres, database) as stack:
        quicken(stack)
        library = Library(stack)
        stack.configure(model=CURRENT, realtime_requests_per_minute=1000, realtime_tokens_per_minute=10_000_000)
        library.sql("update autotag.provider_limits set question = autotag.describe_question()")
        assets = await library.upload(12)
        async with worker(stack):
            await library.finished(library.enqueue(assets))
        library.sql("select from autotag.lock_provider()")  # the next claim would apply the last reports
        assert stack.files
        shutil.copytree(stack.files, files, dirs_exist_ok=True)
    close_connections()  # a database that is in use cannot be copied
    return Kept(database, library.member, library.drawings, files)


@pytest.fixture
async def tagged(postgres: LocalPostgres, kept: Kept) -> AsyncIterator[Library]:
    """A workspace with twelve images that the model in use has tagged; its window holds many comparisons."""
    with copied_database(postgres, kept.database) as database:
        async with local_stack(postgres, database) as stack:
            assert stack.files
            shutil.copytree(kept.files, stack.files, dirs_exist_ok=True)
            stack = replace(stack, connect=connected)
            quicken(stack)
            library = Library(stack, replace(kept.member, token=stack.token(kept.member.user)))
            library.drawings = dict(kept.drawings)
            yield library


async def compare(
    library: Library, *arguments: str, model: str = SECOND, yes: tuple[str, ...] = ("--yes",), **more: str
) -> tuple[int, str, str]:
    """Runs the command with consent. Returns exit code, stdout and stderr."""
    stack = library.stack
    environment = {"PATH": os.environ["PATH"], "COLUMNS": "140", **stack.operator_environment(), **more}
    return await run_command(
        "compare", "--workspace", library.member.workspace, "--model", model, *yes, *arguments, environment=environment
    )


async def figures(library: Library, *arguments: str, **more: str) -> dict[str, Any]:
    """The output of --json of a comparison that succeeds."""
    code, out, error = await compare(library, "--json", *arguments, **more)
    assert code == 0, error
    told: dict[str, Any] = json.loads(out)
    return told


def traces(library: Library) -> dict[str, Any]:
    """The rows of all tables that a comparison must not change."""
    tables = ("public.assets", "public.workspaces", "autotag.jobs", "autotag.tasks", "autotag.batches", "autotag.queues",
              "autotag.outbox", "realtime.messages")  # fmt: skip
    return {
        table: library.sql(f"select to_jsonb(x) as row from {table} x order by to_jsonb(x)::text") for table in tables
    }


def calls(library: Library, status: int = 200) -> list[dict[str, Any]]:
    """The calls for completions that the simulator has recorded with this status."""
    return [
        e for e in library.stack.simulator.request_log if e["path"].endswith("/completions") and e["status"] == status
    ]


def billed(library: Library) -> Decimal:
    """The dollars of all completions that the simulator has billed."""
    return sum((Decimal(entry["dollars"]) for entry in calls(library)), Decimal(0))


async def test_nothing_of_the_host_changes_and_the_usage_is_what_the_provider_bills(tagged: Library) -> None:
    before = traces(tagged)
    used = tagged.sql("select sum(cost) as cost, sum(requests) as n from autotag.usage")[0]
    told = await figures(tagged)
    assert traces(tagged) == before
    dollars = billed(tagged)
    assert dollars > 0
    [row] = tagged.sql(
        "select model, service_tier, user_id, images, requests, cost from autotag.usage where images = 0"
    )
    assert row == {"model": "gpt-6-luna-2026-10-06", "service_tier": "default", "user_id": None, "images": 0,
                   "requests": 12, "cost": dollars}  # fmt: skip
    assert tagged.sql("select sum(cost) as cost, sum(requests) as n from autotag.usage") == [
        {"cost": used["cost"] + dollars, "n": used["n"] + 12}
    ]
    assert told["cost"] == pytest.approx(float(dollars))
    assert told["cost_per_1000"] == pytest.approx(float(dollars) / 12 * 1000)
    audit(tagged.stack)


async def test_without_consent_json_is_the_price_and_nothing_is_asked(tagged: Library) -> None:
    code, out, error = await compare(tagged, "--json", yes=())
    told = json.loads(out)
    assert (code, told["started"], told["predicted"]["images"]) == (2, False, 12)
    assert told["predicted"]["cost"] > 0
    assert "Add --yes to start" in error
    assert calls(tagged) == []


async def test_the_profile_and_the_vocabulary_are_asked_too(tagged: Library) -> None:
    """The other model gets the same question and brief as a new upload, and its tokens are learned for these."""
    workspace = tagged.member.workspace
    tagged.sql("select autotag.edit_vocabulary(%s, %s)", workspace, '[{"tag": "Kreis"}, {"tag": "Quadrat"}]')
    changes = {"instructions": "Name the shape.", "vocabulary_mode": "prefer", "language": "German", "tag_count": 3}
    tagged.sql("select autotag.set_profile(%s, %s)", workspace, json.dumps(changes))
    tagged.sql("select autotag.make_brief(%s)", workspace)
    before = tagged.sql("select answers from autotag.learned where brief_id = 0 and model = %s", SECOND)
    await figures(tagged, "--sample", "2")
    asked = [entry["prefix"] for entry in calls(tagged)]
    tagged.stack.configure(model=SECOND)
    async with worker(tagged.stack):
        await tagged.finished(tagged.enqueue(await tagged.upload(1, seed=7)))
    assert asked == [calls(tagged)[-1]["prefix"]] * 2, "the same words"
    assert tagged.sql("select answers from autotag.learned where brief_id > 0 and model = %s", SECOND) == [
        {"answers": 3}
    ]
    assert tagged.sql("select answers from autotag.learned where brief_id = 0 and model = %s", SECOND) == before


async def test_json_has_every_figure_and_every_image(tagged: Library) -> None:
    asset = sorted(tagged.drawings)[0]
    tagged.sql("update public.assets set tags = tags || array['By Hand', 'Moon'] where id = %s", asset)
    told = await figures(tagged, "--effort", "low", "--sample", "100")
    drawn = len(tagged.drawings[asset].tags)
    assert {name: told[name] for name in (
        "model", "reasoning_effort", "current_model", "current_reasoning_effort", "sample", "answered", "failed", "cut_off",
        "not_asked", "stopped", "shutdown_date")} == {
        "model": SECOND, "reasoning_effort": "low", "current_model": CURRENT, "current_reasoning_effort": None,
        "sample": 12, "answered": 12, "failed": 0, "cut_off": 0, "not_asked": 0, "stopped": None, "shutdown_date": None,
    }  # fmt: skip
    assert told["stored_models"] == {"gpt-4.1-mini-2025-04-14": 12}
    assert told["agreement"]["jaccard"] == pytest.approx((11 + drawn / (drawn + 2)) / 12)
    assert 0.9 < told["agreement"]["kept"] < 1
    assert told["added"] == []
    assert told["missing"] == [{"tag": "by hand", "images": 1}, {"tag": "moon", "images": 1}]
    assert 0 < told["seconds"]["p50"] <= told["seconds"]["p95"]
    assert told["current_answers"] == 12
    [expected] = tagged.sql("select 1000 * autotag.expected_cost() as cost")
    assert told["current_cost_per_1000"] == pytest.approx(float(expected["cost"]), abs=0.0001)
    assert [one["asset_id"] for one in told["images"]] == sorted(tagged.drawings)
    for one in told["images"]:
        assert set(one["answer"]["tags"]) == tagged.drawings[one["asset_id"]].tags
        assert set(one["answer"]["confidence"]) == tagged.drawings[one["asset_id"]].tags
        assert one["stored"]["caption"] == one["answer"]["caption"]
        assert one["error"] is None
    assert {entry["effort"] for entry in calls(tagged)} == {"low"}


async def test_a_smaller_sample_is_spread_evenly_and_the_same_every_time(tagged: Library) -> None:
    first = [one["asset_id"] for one in (await figures(tagged, "--sample", "4"))["images"]]
    again = [one["asset_id"] for one in (await figures(tagged, "--sample", "4"))["images"]]
    assert first == again == sorted(tagged.drawings)[2::3], "one of every three"
    untagged = tagged.insert(["new.jpg"])[0]
    assert untagged not in [one["asset_id"] for one in (await figures(tagged))["images"]]


async def test_what_it_learns_serves_the_model_once_it_is_in_use(tagged: Library) -> None:
    tagged.stack.simulator.plan.requests_per_minute = 500
    await figures(tagged)
    [row] = tagged.sql("select answers from autotag.learned where model = %s", SECOND)
    assert row == {"answers": 12}
    [own] = tagged.sql("select answers from autotag.learned where model = %s", CURRENT)
    assert own == {"answers": 12}, "nothing is learned about the model in use"
    [bucket] = tagged.sql("select question ->> 'model' as model from autotag.provider_limits")
    assert bucket == {"model": CURRENT}


async def test_a_workspaces_window_makes_it_wait(tagged: Library) -> None:
    """The window allows five requests a minute, and a minute lasts a second and a half. No window ever has more."""
    compress(tagged.stack, 40)
    tagged.stack.configure(realtime_requests_per_minute=5)
    code, out, error = await compare(tagged, "--json")
    assert (code, json.loads(out)["answered"]) == (0, 12), error
    assert "waiting: the workspace's limit per minute is used up" in error
    moments = sorted(entry["at"] for entry in calls(tagged))
    # what a call takes to arrive varies by less than a fifth of the window
    assert all(later - earlier > 1.2 for earlier, later in zip(moments, moments[5:], strict=False))
    [window] = tagged.sql("select requests from public.workspace_rate_limits where request_type = 'realtime'")
    assert sum(window["requests"]) <= 5


async def test_the_providers_bucket_makes_it_wait_and_there_is_no_429(tagged: Library) -> None:
    compress(tagged.stack, 60)
    tagged.sql(
        "update autotag.provider_limits set requests_per_minute = 60, requests_left = 0, refilled_at = autotag.now()"
    )
    told = await figures(tagged)
    assert (told["answered"], calls(tagged, 429)) == (12, [])


def admit(library: Library, **question: Any) -> dict[str, Any]:
    """Calls admit_comparison once as the operator's role and rolls back, so the window stays as it is."""
    with psycopg.connect(library.stack.database_url(OPERATOR_ROLE)) as connection:
        row = connection.execute(
            "select autotag.admit_comparison(%s, %s::jsonb)", (library.member.workspace, json.dumps(question))
        ).fetchone()
        connection.rollback()
    assert row is not None
    answer: dict[str, Any] = row[0]
    return answer


def question(library: Library, model: str = SECOND) -> dict[str, Any]:
    [row] = library.sql("select autotag.question_for(%s) as question", model)
    asked: dict[str, Any] = row["question"]
    return asked


async def test_live_work_the_account_and_a_429_hold_it_up(tagged: Library) -> None:
    asked = question(tagged)
    admitted = admit(tagged, **asked)
    assert admitted["admitted"]
    assert admitted["reserved"] > admitted["cap"] > 0
    tagged.sql("update autotag.provider_limits set blocked_until = autotag.now() + interval '7 s'")
    held = admit(tagged, **asked)
    assert (held["admitted"], held["reason"]) == (False, "retry_after")
    assert 6 < held["wait"] <= 7
    tagged.sql(
        "update autotag.provider_limits set blocked_until = '-infinity', account_error = 'Storage refused the key.',"
        " account_error_from = 'storage', account_error_at = autotag.now()"
    )
    held = admit(tagged, **asked)
    assert (held["reason"], held["message"]) == ("account", "Storage refused the key.")
    tagged.sql(
        "update autotag.provider_limits set account_error = 'The model was shut down.', account_error_from = 'provider'"
    )
    assert admit(tagged, **asked)["admitted"], "the end of the model in use is the reason to compare"
    tagged.sql("update autotag.provider_limits set account_error = null")
    tagged.enqueue(tagged.insert(["live.jpg"]))
    held = admit(tagged, **asked)
    assert (held["admitted"], held["reason"], held["wait"]) == (False, "live", pytest.approx(1, abs=0.1))
    # what no limit can ever hold is no live work, and no comparison either
    tagged.sql("select autotag.join_queues(virtual_time) from autotag.provider_limits")  # as the next claim does
    held = admit(tagged, **asked)
    assert (held["admitted"], held["reason"]) == (False, "live")
    tagged.sql("update autotag.workspaces set ready = false, ready_at = 'infinity'")
    assert admit(tagged, **asked)["admitted"]
    tagged.sql("update public.workspace_rate_limits set max_units = 10")
    with pytest.raises(psycopg.Error, match="more than this workspace may use in a minute"):
        admit(tagged, **asked)


async def test_what_was_reserved_is_corrected_to_what_was_used(tagged: Library) -> None:
    tagged.sql("update public.workspace_rate_limits set admitted_at = '{}', requests = '{}', units = '{}'")
    await figures(tagged)
    used = sum(e["usage"]["prompt_tokens"] + e["usage"]["completion_tokens"] for e in calls(tagged))
    [window] = tagged.sql("select requests, units from public.workspace_rate_limits where request_type = 'realtime'")
    assert (sum(window["requests"]), sum(window["units"])) == (12, used)


@pytest.mark.parametrize(("quota", "sentence"), [
    ({"max_images": 15}, "The daily quota of this workspace allows 3 more images today. Compare fewer images"),
    ({"max_cost": 0.005}, "quota of this workspace allows"),
])  # fmt: skip
async def test_a_quota_refuses(tagged: Library, quota: dict[str, Any], sentence: str) -> None:
    [name] = quota
    tagged.sql(f"insert into autotag.quotas (scope, period, {name}) values ('workspace', 'day', %s)", quota[name])
    code, out, error = await compare(tagged, "--json")
    assert (code, json.loads(out).keys()) == (1, {"error"})
    assert sentence in " ".join(error.split())
    assert calls(tagged) == []
    if "max_images" in quota:
        assert (await figures(tagged, "--sample", "3"))["answered"] == 3


async def test_a_quota_that_is_used_up_meanwhile_ends_it(tagged: Library) -> None:
    tagged.stack.simulator.plan.latency = (0.2, 0.3)
    tagged.stack.configure(realtime_requests_per_minute=100)
    run = asyncio.create_task(compare(tagged, "--json"))
    await until(lambda: len(calls(tagged)) > 0, "the first answer")
    tagged.sql("insert into autotag.quotas (scope, period, max_images) values ('workspace', 'day', 1)")
    code, out, error = await run
    told = json.loads(out)
    assert (code, told["answered"] + told["not_asked"]) == (1, 12), error
    assert told["not_asked"] > 0
    assert "quota" in told["stopped"]
    assert len(calls(tagged)) == told["answered"], "what was in flight is in the report"


async def test_a_model_without_a_price_costs_nobody_knows_what(tagged: Library, tmp_path: Path) -> None:
    tagged.stack.simulator.plan.models = frozenset({"vision-9000"})
    code, out, error = await compare(tagged, "--yes", "--html", str(tmp_path / "page.html"), model="vision-9000")
    assert code == 0, error
    assert "12 images for vision-9000, at an unknown cost." in out
    assert "cost of 1,000 images" in out
    told = await figures(tagged, model="vision-9000")
    assert (told["cost"], told["cost_per_1000"], told["answered"]) == (None, None, 12)
    assert all(one["cost"] is None for one in told["images"])
    [row] = tagged.sql("select requests, cost from autotag.usage where model = 'vision-9000'")
    assert row == {"requests": 24, "cost": None}


async def test_hostile_words_stay_words_on_the_page(tagged: Library, tmp_path: Path) -> None:
    asset = sorted(tagged.drawings)[0]
    nasty = "<script>alert(1)</script>"
    tagged.sql("""update public.assets set tags = tags || array[%s, '"><img src=x onerror=alert(2)>'],
        tagging_result = jsonb_build_object('caption', %s::text, 'model', %s::text, 'confidence', '[1]'::jsonb) where id = %s""",
               nasty, "</p><style>*{}</style>" + nasty, nasty, asset)  # fmt: skip
    page = tmp_path / "page.html"
    code, out, error = await compare(tagged, "--yes", "--html", str(page))
    assert code == 0, error
    assert f"{page} shows every image with both answers." in "".join(out.splitlines())
    text = page.read_text()
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert "<script" not in text
    assert "<img src=x" not in text
    assert text.count("<style>") == 1
    assert text.count('<img src="data:image/jpeg;base64,') == 12
    assert "http://" not in text
    assert "https://" not in text
    assert "prefers-color-scheme: dark" in text


async def test_an_answer_that_is_cut_off_is_asked_for_once_more_and_counted(tagged: Library) -> None:
    tagged.stack.simulator.faults.add(Fault(answer="length", times=1))
    told = await figures(tagged)
    assert (told["cut_off"], told["answered"], told["failed"], told["calls_billed"]) == (1, 12, 0, 13)
    caps = sorted(entry["cap"] for entry in calls(tagged))
    assert caps[-1] >= 4 * caps[0]
    assert told["cost"] == pytest.approx(float(billed(tagged)))
    tagged.stack.simulator.faults.add(Fault(answer="length", times=1000))
    told = await figures(tagged, "--sample", "2")
    tagged.stack.simulator.faults.clear()
    assert (told["cut_off"], told["answered"], told["failed"], told["calls_billed"]) == (2, 0, 2, 4)
    assert told["failures"] == [
        {"code": "answer_too_long", "message": "The AI's answer for this image was cut off.", "images": 2}
    ]
    assert told["agreement"] == {"jaccard": None, "kept": None}
    [row] = tagged.sql("select requests from autotag.usage where images = 0")
    assert row == {"requests": 17}, "both are billed"


async def test_refusals_and_pictures_that_are_gone_are_told_with_their_reasons(tagged: Library) -> None:
    gone = sorted(tagged.drawings)[0]
    tagged.sql("update public.assets set storage_path = storage_path || '.gone' where id = %s", gone)
    tagged.stack.simulator.faults.add(Fault(answer="refusal"))
    told = await figures(tagged)
    assert (told["answered"], told["failed"]) == (10, 2)
    assert {f["code"]: f["images"] for f in told["failures"]} == {"file_missing": 1, "refused": 1}
    assert len(calls(tagged)) == 11


async def test_a_moment_of_trouble_is_passed_over(tagged: Library) -> None:
    tagged.stack.simulator.faults.add(Fault(status=500))
    tagged.stack.simulator.faults.add(Fault(status=429, code="rate_limit_exceeded", headers={"retry-after": "1"}))
    told = await figures(tagged)
    assert (told["answered"], told["failed"]) == (12, 0)


async def test_forms_that_the_model_does_not_take_are_left_out(tagged: Library) -> None:
    tagged.stack.simulator.plan.response_formats = frozenset({"text"})
    tagged.stack.simulator.plan.detail_parameter = False
    told = await figures(tagged)
    assert (told["answered"], told["failed"]) == (12, 0)
    [row] = tagged.sql("select answer_format, sends_detail, sends_effort from autotag.models where name = %s", SECOND)
    assert row == {"answer_format": "text", "sends_detail": False, "sends_effort": True}


async def test_an_effort_that_was_tried_out_changes_nothing_of_the_models_row(tagged: Library) -> None:
    """The model does not support the effort `minimal`. Its row stays as it is, so uploads still use its own effort."""
    code, _, error = await compare(tagged, "--json", "--effort", "minimal")
    assert code == 1
    assert "autotag: Ended after" in error
    assert "minimal" in error
    [row] = tagged.sql("select sends_effort, reasoning_effort from autotag.models where name = %s", SECOND)
    assert row == {"sends_effort": True, "reasoning_effort": "none"}


@pytest.mark.parametrize(("arguments", "more", "sentence"), [
    ([], {"OPENAI_API_KEY": "sk-wrong"}, "Incorrect API key provided."),
    (["--effort", "enormous"], {}, "'enormous' is not a reasoning effort."),
    (["--workspace", str(uuid.UUID(int=7))], {}, "Unknown workspace"),
    (["--workspace", "mine"], {}, "invalid input syntax for type uuid"),
    (["--html", "/nowhere/at/all.html"], {}, "/nowhere/at/all.html cannot be written"),
    ([], {"OPENAI_API_KEY": ""}, "OPENAI_API_KEY is"),
    ([], {"SUPABASE_SECRET_KEY": "wrong"}, "Storage refused the key"),
])  # fmt: skip
async def test_what_cannot_work_is_one_sentence(
    tagged: Library, arguments: list[str], more: dict[str, str], sentence: str
) -> None:
    before = traces(tagged)
    code, _, error = await compare(tagged, "--json", *arguments, **more)
    assert code in (1, 2)
    assert sentence in " ".join(error.split())
    assert "Traceback" not in error
    assert error.count("autotag: ") == 1
    assert traces(tagged) == before
    [provider] = tagged.sql("select account_error from autotag.provider_limits")
    assert provider == {"account_error": None}, "the live lanes go on"


async def interrupt(process: asyncio.subprocess.Process) -> None:
    """Sends Ctrl-C, and waits for the sentence about the calls in flight."""
    process.send_signal(signal.SIGINT)
    assert process.stderr
    assert await process.stderr.readline() == b"Ctrl-C: finishing the calls in flight. Ctrl-C again stops at once.\n"


async def test_ctrl_c_ends_it_with_what_there_is(tagged: Library) -> None:
    stack = tagged.stack
    stack.simulator.plan.hold_answers = True
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "autotag", "compare", "--workspace", tagged.member.workspace, "--model", SECOND, "--yes", "--json",
        env={"PATH": os.environ["PATH"], **stack.operator_environment()}, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        await until(lambda: stack.simulator.in_flight == 8, "eight calls in flight")
        await interrupt(process)
        stack.simulator.plan.hold_answers = False
        out, error = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    told = json.loads(out)
    assert (process.returncode, told["answered"], told["not_asked"]) == (130, 8, 4)
    assert "Ended after 8 of 12 images: stopped by Ctrl-C." in error.decode()
    [row] = tagged.sql("select requests from autotag.usage where images = 0")
    assert row == {"requests": 8}
    assert len(answered_pictures(stack)) == 8


async def test_a_second_ctrl_c_ends_it_at_once(tagged: Library) -> None:
    stack = tagged.stack
    stack.simulator.plan.hold_answers = True
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "autotag", "compare", "--workspace", tagged.member.workspace, "--model", SECOND, "--yes", "--json",
        env={"PATH": os.environ["PATH"], **stack.operator_environment()}, stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        await until(lambda: stack.simulator.in_flight == 8, "eight calls in flight")
        await interrupt(process)
        assert process.returncode is None, "the first lets the calls finish"
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(PATIENCE):
            out, error = await process.communicate()
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    assert (process.returncode, json.loads(out).keys()) == (130, {"error"})
    assert "Stopped at once" in error.decode()
    assert "Traceback" not in error.decode()


async def test_it_asks_before_it_spends(tagged: Library, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    done = await asyncio.to_thread(
        CliRunner().invoke, app, ["compare", "--workspace", tagged.member.workspace, "--model", SECOND],
        input="n\n", env=tagged.stack.operator_environment(),
    )  # fmt: skip
    assert done.exit_code == 1
    assert f"12 images for {SECOND} (effort none), about $0.00" in done.output
    assert calls(tagged) == []
    assert os.listdir(tmp_path) == [], "no page either"


def test_tags_in_a_jsonb_column_are_read_as_far_as_they_are_strings(stack: Stack) -> None:
    library = Library(stack)
    library.sql("alter table public.assets alter column tags type jsonb using null")
    values = ['["a", 1]', "[]", '{"a": 1}', '"a"', "[1]", None]
    for value in values:
        library.sql("insert into public.assets (workspace_id, tags, image_url) values (%s, %s::jsonb, 'https://x.test/1')",
                    library.member.workspace, value)  # fmt: skip
    [row] = library.sql("select autotag.comparison_sample(%s, 10) as sample", library.member.workspace)
    assert [one["tags"] for one in row["sample"]] == [["a"]]
