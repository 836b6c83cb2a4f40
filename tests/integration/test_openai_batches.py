"""Known behaviour of OpenAI's Batch API: each test covers one case and is named after it."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autotag.worker.submit import METADATA_KEY
from lab.openai_sim.faults import Fault
from lab.pictures import Drawing
from lab.stack import Stack
from support import Library, answered_pictures, audit, until, worker

FEW = {
    "realtime_max_images": 0, "chunk_max_images": 4, "batch_max_images": 20, "batch_split_images": 10,
    "express_images": 0, "batch_create_grace": "0.3 s",
}  # fmt: skip


@pytest.fixture
def few(library: Library) -> Library:
    """Uploads of more than 4 images are sent in a batch, and of more than 20 by several of 10."""
    library.stack.configure(**FEW)
    library.stack.simulator.plan.batch_latency = (0.3, 0.6)
    return library


def batches(library: Library) -> list[dict[str, Any]]:
    return library.stack.simulator.batches.describe_all()


def lines(library: Library) -> list[dict[str, Any]]:
    return [entry for entry in library.stack.simulator.request_log if entry["method"] == "BATCH"]


def single_calls(library: Library) -> int:
    return sum(
        entry["path"].endswith("/completions")
        for entry in library.stack.simulator.request_log
        if "POST" in entry["method"]
    )


def completions(library: Library) -> list[dict[str, Any]]:
    """All batch-complete messages of batches on the public topic."""
    rows = library.sql(
        "select payload from realtime.messages where event = 'batch-complete' and topic = 'batch-updates'"
        " and payload ->> 'batch_id' is not null"
    )
    return [row["payload"] for row in rows]


def check_books(library: Library) -> None:
    """Checks that every image has its own tags, that every batch was announced once, and that every token was counted
    once."""
    library.check_tags()
    audit(library.stack)
    announced = Counter(payload["batch_id"] for payload in completions(library))
    known = {row["id"] for row in library.sql("select openai_batch_id as id from autotag.batches where state = 'done'")}
    assert announced == Counter(known - {None}), "batch-complete once for every batch"
    book = [entry["usage"] for entry in library.stack.simulator.request_log if entry.get("usage")]
    billed = sum(usage["prompt_tokens"] + usage["completion_tokens"] for usage in book)
    [usage] = library.sql("select coalesce(sum(input_tokens + output_tokens), 0) as n from autotag.usage")
    assert int(usage["n"]) == billed, "tokens are counted as they were billed"


async def run(library: Library, images: int) -> dict[str, Any]:
    assets = await library.upload(images)
    async with worker(library.stack):
        [job] = await library.finished(library.enqueue(assets))
        await until(lambda: leftover_files(library) == [], "the files to be deleted")
    return job


def leftover_files(library: Library) -> list[str]:
    return list(library.stack.simulator.files)


async def test_files_and_batches_carry_our_id_and_expire(few: Library) -> None:
    """Checks the requests for /v1/files (purpose batch) and /v1/batches (window 24h, metadata)."""
    await run(few, 8)
    [batch] = batches(few)
    [row] = few.sql("select id::text from autotag.batches")
    assert batch["metadata"] == {METADATA_KEY: row["id"]}
    assert batch["completion_window"] == "24h"
    check_books(few)


async def test_a_file_holds_at_most_200_mb_so_the_rest_starts_the_next_batch(few: Library) -> None:
    few.stack.configure(batch_max_bytes=40_000)
    job = await run(few, 12)
    assert job["completed"] == 12
    assert len(batches(few)) > 1
    assert sum(batch["request_counts"]["completed"] for batch in batches(few)) == 12
    check_books(few)


@pytest.mark.parametrize("status", [400, 500])
async def test_both_files_may_be_missing_or_only_the_error_file_there(few: Library, status: int) -> None:
    """A batch whose lines all failed is `completed` without an output file."""
    code = "invalid_image" if status == 400 else "server_error"
    few.stack.simulator.faults.add(Fault(where="BATCH", status=status, code=code, times=8))
    job = await run(few, 8)
    assert batches(few)[0]["output_file_id"] is None
    assert batches(few)[0]["error_file_id"] is not None
    assert (job["completed"], job["failed"]) == ((0, 8) if status == 400 else (8, 0))
    if status == 500:
        check_books(few)


async def test_token_limit_exceeded_means_wait_and_the_file_is_used_again(few: Library) -> None:
    few.stack.simulator.plan.queued_batch_tokens = 10
    few.stack.configure(max_bad_answers=1000)  # so that it is not split, however often it is refused meanwhile
    few.watch_failures()
    assets = await few.upload(8)
    async with worker(few.stack):
        told = few.enqueue(assets)
        await until(lambda: any(b["status"] == "failed" for b in batches(few)), "the refusal")
        few.stack.simulator.plan.queued_batch_tokens = 2_000_000
        [job] = await few.finished(told)
        await until(lambda: leftover_files(few) == [], "the files to be deleted")
    assert job["completed"] == 8
    assert len({batch["input_file_id"] for batch in batches(few)}) == 1
    assert few.failures() == 0
    check_books(few)


async def test_a_batch_that_openai_never_accepts_gets_smaller(few: Library) -> None:
    """The account's queue of tokens fits only a part of the batch. The batch is split until its parts fit, and nothing
    waits for ever."""
    few.stack.configure(batch_poll_interval="0.2 s", batch_patience="1 day")
    few.watch_failures()
    assets = await few.upload(16)
    plan = few.stack.simulator.plan
    plan.queued_batch_tokens = (
        6 * few.sql("select tokens_per_image from autotag.provider_limits")[0]["tokens_per_image"]
    )
    async with worker(few.stack):
        [job] = await few.finished(few.enqueue(assets))
    assert job["completed"] == 16
    assert [b["status"] for b in batches(few)].count("failed") >= 3
    assert max(b["request_counts"]["total"] for b in batches(few) if b["status"] == "completed") <= 8
    assert (single_calls(few), few.failures()) == (0, 0)
    check_books(few)


async def test_a_batch_that_waited_for_openais_queue_can_be_a_new_workers_first(few: Library) -> None:
    """The only work for a new worker is a batch that the window has admitted already."""
    few.stack.simulator.faults.add(Fault(where="VALIDATE", code="token_limit_exceeded"))
    few.stack.configure(batch_poll_interval="0.5 s")
    told = few.enqueue(await few.upload(8))
    async with worker(few.stack):
        await until(lambda: few.sql("select 1 from autotag.batches where error is not null") != [], "the refusal")
    assert few.sql("select state from autotag.batches") == [{"state": "planned"}]
    async with worker(few.stack):
        [job] = await few.finished(told)
    assert job["completed"] == 8
    check_books(few)


async def test_a_failed_batch_falls_apart_into_single_calls(few: Library) -> None:
    """OpenAI refuses a batch three times without a usable reason. Its images become single calls, whose errors say
    more, and every image ends."""
    few.stack.simulator.faults.add(
        Fault(where="POST /v1/batches", status=400, code="invalid_request", message="No.", times=3)
    )
    job = await run(few, 8)
    assert job["completed"] == 8
    assert single_calls(few) == 8
    check_books(few)


async def test_output_order_is_not_input_order(few: Library) -> None:
    job = await run(few, 20)
    [batch] = batches(few)
    assert job["completed"] == 20
    assert batch["request_counts"] == {"total": 20, "completed": 20, "failed": 0}
    check_books(few)


@pytest.mark.parametrize("how", ["status_0", "error_only", "missing", "truncate", "duplicate", "unknown", "garbage"])
async def test_lines_of_a_completed_batch_may_be_wrong(few: Library, how: Any) -> None:
    """Lines with status 0, with `error` alone, with a repeated or unknown `custom_id`, missing lines, half a file: each
    usable line counts once."""
    few.stack.simulator.faults.add(Fault(where="OUTPUT", mangle=how))
    job = await run(few, 8)
    assert (job["completed"], job["failed"]) == (8, 0)
    few.check_tags()
    audit(few.stack)
    again = single_calls(few)
    assert again == {"status_0": 1, "error_only": 1, "missing": 2, "duplicate": 0, "unknown": 0, "garbage": 0}.get(
        how, again
    )
    if how == "truncate":
        assert 0 < again < 8, "what could be read of half a file is kept"


async def test_many_lines_without_an_answer_go_by_batch_again_and_few_as_single_calls(few: Library) -> None:
    few.stack.simulator.faults.add(Fault(where="BATCH", status=500, times=6))
    await run(few, 8)
    assert (len(batches(few)), single_calls(few)) == (2, 0)
    check_books(few)


async def test_lines_that_fail_for_ever_end_with_their_own_reason(few: Library) -> None:
    few.stack.configure(max_failures=2)
    few.stack.simulator.faults.add(Fault(where="BATCH", status=503, times=1000))
    job = await run(few, 8)
    assert (job["failed"], job["error"]) == (8, "The AI service had a problem.")
    audit(few.stack)


async def test_downloading_content_sometimes_answers_502(few: Library) -> None:
    few.stack.simulator.faults.add(Fault(where="GET /v1/files/", status=502, times=2))
    job = await run(few, 8)
    assert job["completed"] == 8
    assert single_calls(few) == 0
    check_books(few)


async def test_a_download_that_breaks_off_is_harvested_again_and_changes_nothing(few: Library) -> None:
    few.stack.simulator.faults.add(Fault(where="GET /v1/files/", cut=True, times=1))
    few.stack.simulator.faults.add(Fault(where="GET /v1/files/", slow=1, times=1))
    job = await run(few, 8)
    assert job["completed"] == 8
    check_books(few)


async def test_harvesting_the_same_file_twice_changes_nothing(few: Library) -> None:
    """Reads half of the file and then all, or all of it twice. Answers that were stored before are not accepted
    again."""
    assets = await few.upload(8)
    few.enqueue(assets)
    tasks = [row["id"] for row in few.sql("select id from autotag.tasks order by id")]
    [batch] = few.sql("select id from autotag.batches")
    name = "00000000-0000-4000-8000-000000000001"
    few.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", name)
    few.sql(
        "update autotag.batches set state = 'harvesting', worker_id = %s, attempt = 1, openai_batch_id = 'batch_x'",
        name,
    )
    answers = [
        {"task": task, "result": {"tags": [f"t{task}"], "confidence": {f"t{task}": 1}, "caption": "A."},
         "usage": {"input": 10, "cached": 0, "output": 5}}
        for task in tasks
    ]  # fmt: skip

    def harvest(part: list[dict[str, Any]]) -> int:
        row = few.sql("select autotag.batch_answers(%s, %s, 1, %s) as n", name, batch["id"], json.dumps(part))[0]
        return int(row["n"]["accepted"])

    assert [harvest(answers[:4]), harvest(answers), harvest(answers), harvest(answers[::-1] * 2)] == [4, 4, 0, 0]
    assert few.sql("select images, requests, input_tokens, output_tokens from autotag.usage") == [
        {"images": 8, "requests": 8, "input_tokens": 80, "output_tokens": 40}
    ]
    few.sql("select autotag.batch_finish(%s, %s, 1)", name, batch["id"])
    assert len(completions(few)) == 1
    audit(few.stack)


async def test_one_list_call_covers_every_batch_in_flight_and_pages_follow_where_others_came_between(
    few: Library,
) -> None:
    """Four batches of ours are older than 250 batches of another program. A poll reads three pages of the list and
    retrieves no single batch."""
    few.stack.simulator.plan.batch_latency = (3, 3)
    assets = await few.upload(40)
    async with worker(few.stack):
        told = few.enqueue(assets)
        await until(lambda: few.sql("select count(*) as n from autotag.batches where state = 'submitted'")[0]["n"] == 4,
                    "the batches")  # fmt: skip
        foreign = batches(few)[0]
        for i in range(250):
            name = f"batch_foreign_{i}"
            few.stack.simulator.batches._batches[name] = foreign | {"id": name, "metadata": {}}
        mark = len(few.stack.simulator.request_log)
        [job] = await few.finished(told)
    assert job["completed"] == 40
    looks = [
        e
        for e in few.stack.simulator.request_log[mark:]
        if e["path"].startswith("/v1/batches") and e["method"] == "GET"
    ]
    assert looks
    assert {e["path"] for e in looks} == {"/v1/batches"}, "none was retrieved by itself"


async def test_a_batch_that_404s_later_ends_and_its_images_go_by_another(few: Library) -> None:
    """The provider no longer knows the batch, or another project's key is in use. After some missing polls, its images
    are sent in a new batch."""
    few.stack.simulator.plan.batch_latency = (60, 60)
    assets = await few.upload(8)
    async with worker(few.stack):
        told = few.enqueue(assets)
        await until(lambda: few.sql("select 1 from autotag.batches where state = 'submitted'") != [], "the batch")
        few.stack.simulator.plan.batch_latency = (0.3, 0.6)
        few.stack.simulator.batches.hidden.add(batches(few)[0]["id"])
        [job] = await few.finished(told)
    assert (job["completed"], job["failed"]) == (8, 0)
    few.check_tags()
    audit(few.stack)
    assert len(batches(few)) == 2
    states = few.sql("select state, error from autotag.batches order by ordinal")
    assert [row["state"] for row in states] == ["done", "done"]
    assert "does not know this batch" in states[0]["error"]


async def test_a_single_look_in_vain_changes_nothing(few: Library) -> None:
    few.stack.configure(batch_max_missing_polls=1000)
    few.stack.simulator.plan.batch_latency = (1, 1)
    assets = await few.upload(8)
    async with worker(few.stack):
        told = few.enqueue(assets)
        await until(lambda: few.sql("select 1 from autotag.batches where state = 'submitted'") != [], "the batch")
        few.stack.simulator.batches.hidden.add(batches(few)[0]["id"])
        await until(lambda: few.sql("select 1 from autotag.batches where missing_polls > 0") != [], "a missing poll")
        few.stack.simulator.batches.hidden.clear()
        [job] = await few.finished(told)
    assert job["completed"] == 8
    assert len(batches(few)) == 1
    check_books(few)


async def test_right_after_an_upload_the_file_may_not_be_found(few: Library) -> None:
    message = "Cannot find file file-1, or project proj does not have access to it."
    few.stack.simulator.faults.add(
        Fault(where="POST /v1/batches", status=400, code="invalid_request_error", message=message)
    )
    job = await run(few, 8)
    assert job["completed"] == 8
    assert len(batches(few)) == 1
    check_books(few)


async def test_an_input_file_that_stays_unknown_is_built_again(few: Library) -> None:
    few.stack.configure(retry_delay="0.05 s")
    message = "Cannot find file file-1, or project proj does not have access to it."
    few.stack.simulator.faults.add(
        Fault(where="POST /v1/batches", status=400, code="invalid_request_error", message=message, times=4)
    )
    assets = await few.upload(8)
    async with worker(few.stack):
        [job] = await few.finished(few.enqueue(assets))
    assert job["completed"] == 8
    uploads = [e for e in few.stack.simulator.request_log if (e["method"], e["path"]) == ("POST", "/v1/files")]
    assert len(uploads) == 2
    check_books(few)


async def test_a_create_that_timed_out_but_happened_is_adopted(few: Library) -> None:
    few.stack.simulator.faults.add(Fault(where="POST /v1/batches", after=True))
    job = await run(few, 8)
    assert job["completed"] == 8
    assert len(batches(few)) == 1
    check_books(few)


async def test_an_upload_that_timed_out_but_happened_leaves_no_file(few: Library) -> None:
    few.stack.simulator.faults.add(Fault(where="POST /v1/files", after=True))
    job = await run(few, 8)
    assert job["completed"] == 8
    assert len(batches(few)) == 1
    check_books(few)


async def test_an_expired_batch_still_returns_and_bills_what_was_done(few: Library) -> None:
    """A batch expires at 40 %. The answered lines are stored and billed, and the other images are sent in a new
    batch."""
    few.stack.simulator.faults.add(Fault(where="RUN", expire_at=0.4))
    job = await run(few, 20)
    assert job["completed"] == 20
    assert [batch["status"] for batch in batches(few)] == ["expired", "completed"]
    assert [batch["request_counts"]["completed"] for batch in batches(few)] == [8, 12]
    assert set(Counter(answered_pictures(few.stack)).values()) == {1}, "nothing is paid twice"
    check_books(few)


async def test_a_cancelled_batch_still_returns_and_bills_what_was_done(few: Library) -> None:
    few.stack.simulator.plan.batch_latency = (4, 4)
    assets = await few.upload(20)
    async with worker(few.stack):
        told = few.enqueue(assets)
        await until(lambda: any(b["request_counts"]["completed"] > 2 for b in batches(few)), "some lines")
        few.rpc("public.cancel_tagging", told["job_id"])
        [job] = await few.finished(told)
        await until(lambda: leftover_files(few) == [], "the files to be deleted")
    [batch] = batches(few)
    assert batch["status"] == "cancelled"
    assert job["completed"] == batch["request_counts"]["completed"]
    assert job["completed"] + job["failed"] == 20
    audit(few.stack)
    assert len(completions(few)) == 1


async def test_a_batch_cancelled_before_openai_has_it_leaves_nothing_there(few: Library) -> None:
    few.stack.simulator.faults.add(Fault(where="POST /v1/files", delay=1))
    assets = await few.upload(8)
    async with worker(few.stack):
        told = few.enqueue(assets)
        await until(lambda: few.sql("select 1 from autotag.batches where state = 'uploading'") != [], "the upload")
        few.rpc("public.cancel_tagging", told["job_id"])
        [job] = await few.finished(told)
        await until(lambda: few.stack.simulator.request_log[-1]["method"] == "DELETE", "the file to be deleted")
    assert (job["failed"], batches(few), leftover_files(few)) == (8, [], [])


@pytest.mark.parametrize("cancelled", [True, False], ids=["cancelled", "given up"])
async def test_input_files_that_nobody_recorded_are_deleted_when_their_batch_is_over(
    few: Library, cancelled: bool
) -> None:
    """The provider stored the files, but its answers were lost."""
    few.stack.configure(batch_create_grace="0.2 s", max_failures=1)
    few.stack.simulator.faults.add(Fault(where="POST /v1/files", after=True, times=1000))
    assets = await few.upload(8)
    async with worker(few.stack):
        told = few.enqueue(assets)
        await until(lambda: leftover_files(few) != [], "the upload")
        if cancelled:
            few.rpc("public.cancel_tagging", told["job_id"])
        [job] = await few.finished(told)
        await until(lambda: leftover_files(few) == [], "the files to be deleted")
        await until(
            lambda: few.sql("select 1 from autotag.batches where unrecorded_files > 0") == [],
            "no file to be looked for",
        )
    assert (job["completed"] == 8, batches(few)) == (not cancelled, [])


async def test_a_stuck_batch_falls_back_to_single_calls(few: Library) -> None:
    """A batch without progress for batch_stuck_after is cancelled, and its other images are sent as single calls."""
    few.stack.configure(batch_stuck_after="0.5 s")
    few.stack.simulator.plan.batch_latency = (16, 16)  # a line every 1.6 seconds
    job = await run(few, 8)
    assert job["completed"] == 8
    assert job["fallback"] == "A batch made no progress, so the rest of its images are sent as single calls."
    assert batches(few)[0]["status"] == "cancelled"
    assert single_calls(few) + len(lines(few)) == 8, "nothing is asked twice"
    check_books(few)


async def test_a_stuck_batch_stays_where_the_limits_allow_no_single_calls(few: Library) -> None:
    few.stack.configure(batch_stuck_after="0.3 s", realtime_requests_per_minute=1, realtime_max_wait="1 min")
    few.stack.simulator.plan.batch_latency = (3, 3)
    job = await run(few, 8)
    assert (job["completed"], job["fallback"], single_calls(few)) == (8, None, 0)


async def test_a_batch_costs_half(few: Library) -> None:
    await run(few, 8)
    [row] = few.sql("select input_tokens, output_tokens, cost from autotag.usage")
    full = (row["input_tokens"] * Decimal("0.10") + row["output_tokens"] * Decimal("0.50")) / 1_000_000
    assert row["cost"] == full / 2


async def test_a_key_that_stops_working_stops_the_look_and_it_goes_on_by_itself(few: Library) -> None:
    few.stack.configure(account_probe_interval="0.3 s")
    few.stack.simulator.plan.batch_latency = (1, 1)
    assets = await few.upload(8)
    async with worker(few.stack):
        told = few.enqueue(assets)
        await until(lambda: few.sql("select 1 from autotag.batches where state = 'submitted'") != [], "the batch")
        few.stack.simulator.faults.add(Fault(where="GET /v1/batches", status=401, code="invalid_api_key", times=2))
        await until(
            lambda: few.sql("select 1 from autotag.provider_limits where account_error is not null") != [], "the stop"
        )
        [job] = await few.finished(told)
    assert job["completed"] == 8
    assert few.sql("select account_error from autotag.provider_limits") == [{"account_error": None}]
    check_books(few)


async def test_a_line_that_says_the_account_is_out_of_quota_stops_the_lanes(few: Library) -> None:
    few.stack.configure(account_probe_interval="0.3 s")
    few.stack.simulator.faults.add(Fault(where="BATCH", status=429, code="insufficient_quota", times=3))
    job = await run(few, 8)
    assert job["completed"] == 8
    check_books(few)


async def test_an_image_that_cannot_be_a_line_does_not_hold_up_the_others(few: Library) -> None:
    assets = await few.upload(7)
    bad = await few.upload_files([Drawing("x.jpg", "image/jpeg", b"no picture" * 9, frozenset())])
    assets += few.insert([path for path, _ in bad])
    async with worker(few.stack):
        [job] = await few.finished(few.enqueue(assets))
    assert (job["completed"], job["failed"]) == (7, 1)
    assert len(lines(few)) == 7


async def test_nothing_of_the_images_is_left_on_the_workers_disk(
    few: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is on disk without a name, so it disappears with the process, however that ends."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr("autotag.worker.submit.MAX_IN_MEMORY", 100)
    few.stack.simulator.faults.add(Fault(where="POST /v1/files", delay=0.5))
    assets = await few.upload(8)
    async with worker(few.stack):
        told = few.enqueue(assets)
        await until(lambda: few.sql("select 1 from autotag.batches where state = 'uploading'") != [], "the upload")
        assert os.listdir(tmp_path) == []
        await few.finished(told)
    assert os.listdir(tmp_path) == []


async def test_a_full_window_makes_batches_larger_and_then_wait_their_turn(few: Library) -> None:
    few.stack.configure(batch_batches_per_hour=2)
    first, second = await few.upload(24), await few.upload(8, seed=2)
    async with worker(few.stack):
        told = few.enqueue(first)
        waiting = few.enqueue(second)
        await few.finished(told)
        await until(
            lambda: few.sql(
                "select 1 from autotag.batches where job_id = %s and state = 'planned'"
                " and not_before between now() + interval '50 min' and now() + interval '1 h'", waiting["job_id"],
            ) != [],
            "the second upload to know when its turn comes",
        )  # fmt: skip
    assert (told["batches"], len(batches(few))) == (2, 2), "2 × 12 and not 10 + 10 + 4"
    assert lines_of(few, waiting["job_id"]) == 0


def lines_of(library: Library, job_id: str) -> int:
    of_job = {row["id"] for row in library.sql(
        "select openai_batch_id as id from autotag.batches where job_id = %s", job_id)}  # fmt: skip
    return sum(entry["batch"] in of_job for entry in lines(library))


# -- the planner


def best_plan(images: int, left: int, most: int, split: int, unsplit: int) -> int:
    """The best number of batches, found by trying every number.

    Batches of one upload run side by side, so those that start in this hour finish alike, whatever their number;
    what starts in a later hour ends at least an hour later. So: the fewest late ones; then pieces as small as is
    useful (`split`); then as few of them as make that. An upload of at most `unsplit` images is not split for speed.
    """
    goal = images if images <= unsplit else split

    def worth(batches: int) -> tuple[int, int, int]:
        largest = -(-images // batches)
        return max(0, batches - max(left, 1)), max(largest, min(goal, most)), batches

    return min((n for n in range(1, images + 1) if -(-images // n) <= most), key=worth)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    images=st.integers(1, 60), left=st.integers(-2, 12), window=st.integers(1, 30), requests=st.integers(1, 40),
    queued=st.integers(1, 40), split=st.integers(1, 12), unsplit=st.integers(0, 20),
)  # fmt: skip
def test_the_plan_is_the_best_one(
    planner: psycopg.Connection[Any],
    images: int,
    left: int,
    window: int,
    requests: int,
    queued: int,
    split: int,
    unsplit: int,
) -> None:
    planner.execute(
        "update autotag.settings set batch_max_images = %s, batch_split_images = %s, batch_max_requests = %s",
        (unsplit, split, requests),
    )
    planner.execute(
        "update autotag.provider_limits set queued_batch_tokens = %s, tokens_per_image = 10", (queued * 10,)
    )
    row = planner.execute("select autotag.plan_batches(%s, %s, %s)", (images, left, window)).fetchone()
    most = min(window, requests, queued)
    assert row == (best_plan(images, left, most, split, unsplit),)


@pytest.fixture
def planner(stack: Stack) -> Iterator[psycopg.Connection[Any]]:
    """A connection for all examples, each of which sets the settings anew."""
    stack.configure(realtime_max_images=0, chunk_max_images=0)
    with psycopg.connect(stack.database_url(), autocommit=True) as connection:
        yield connection
