"""Failures of the provider, of images and of workers, and their consequences."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from autotag.db import Database
from autotag.db.messages import Beat, Registered
from lab.openai_sim.faults import Fault
from lab.pictures import Drawing, draw
from lab.stack import Stack, worker_process
from support import PATIENCE, Library, answered_pictures, audit, until, worker

ACCOUNT_FAULT = Fault(status=401, code="invalid_api_key", message="Incorrect API key provided.", times=1000)
CANCELLED_WITHIN = 2.0  # seconds: the provider knows that an upload is cancelled


def error_code(library: Library, asset: str) -> str:
    return str(library.sql("select error_code from autotag.tasks where asset_id = %s", asset)[0]["error_code"])


@pytest.mark.parametrize(
    "fault",
    [
        Fault(status=500, times=2),
        Fault(status=503, code="overloaded", times=2),
        Fault(cut=True, times=2),
        Fault(status=429, code="rate_limit_exceeded", headers={"retry-after": "0.2"}, times=2),
        Fault(status=429, code="rate_limit_exceeded", headers={"retry-after": "0"}, times=1),
        Fault(answer="length"),
        Fault(answer="bad_schema"),
        Fault(answer="no_json"),
        Fault(answer="no_tags"),
    ],
    ids=lambda fault: fault.answer or ("cut" if fault.cut else f"{fault.status}"),
)
async def test_what_passes_is_tried_again_until_it_works(library: Library, fault: Fault) -> None:
    library.stack.simulator.faults.add(fault)
    assets = await library.upload(3)
    async with worker(library.stack):
        [job] = await library.finished(library.enqueue(assets))
    assert (job["completed"], job["failed"]) == (3, 0)
    library.check_tags()
    audit(library.stack)


async def test_a_429_costs_no_try(library: Library) -> None:
    library.sql("update autotag.settings set max_failures = 1")
    library.stack.simulator.faults.add(
        Fault(status=429, code="rate_limit_exceeded", headers={"retry-after-ms": "50"}, times=6)
    )
    assets = await library.upload(3)
    async with worker(library.stack):
        [job] = await library.finished(library.enqueue(assets))
    assert (job["completed"], job["failed"]) == (3, 0)


async def test_an_image_that_always_fails_ends_with_a_sentence(library: Library) -> None:
    drawings = list(draw(3))
    unlucky = sorted(tag for tag in drawings[0].tags if tag not in drawings[1].tags & drawings[2].tags)
    library.stack.simulator.faults.add(Fault(status=500, times=1000, tags=list(drawings[0].tags)))
    assert unlucky
    library.sql("update autotag.settings set max_failures = 3")
    assets = await library.upload(drawings)
    async with worker(library.stack):
        [job] = await library.finished(library.enqueue(assets))
    assert (job["completed"], job["failed"], job["error"]) == (2, 1, "The AI service had a problem.")
    library.check_tags(assets[1:])
    assert library.assets()[assets[0]]["tagging_stage"] == "failed"
    audit(library.stack)


async def test_a_refusal_is_final_and_says_so(library: Library) -> None:
    library.stack.simulator.faults.add(Fault(answer="refusal", times=1))
    [asset] = await library.upload(1)
    async with worker(library.stack):
        [job] = await library.finished(library.enqueue([asset]))
    assert (job["failed"], job["error"]) == (1, "The AI declined to describe this image.")
    assert error_code(library, asset) == "refused"
    assert len(answered_pictures(library.stack)) == 1
    assert library.sql("select images, requests from autotag.usage") == [{"images": 0, "requests": 1}]


async def test_a_bad_key_stops_the_lane_and_it_goes_on_by_itself(library: Library) -> None:
    stack = library.stack
    stack.configure(account_probe_interval="0.2 s")
    stack.simulator.faults.add(ACCOUNT_FAULT.model_copy())
    assets = await library.upload(3)
    async with worker(stack):
        told = library.enqueue(assets)
        await until(
            lambda: library.sql("select account_error from autotag.provider_limits")[0]["account_error"] is not None,
            "the lane to stop",
        )
        library.watch_failures()
        calls = len(stack.simulator.request_log)
        assert library.job(told["job_id"])["failed"] == 0
        assert calls <= 5, "a stopped lane keeps calling"
        stack.simulator.faults.clear()
        await library.finished(told)
    library.check_tags()
    assert library.sql("select account_error from autotag.provider_limits")[0]["account_error"] is None
    assert library.failures() == 0


async def test_corrupt_files_fail_alone(library: Library) -> None:
    drawings = list(draw(4))
    corrupt = Drawing("corrupt.jpg", "image/jpeg", drawings[0].data[: len(drawings[0].data) // 3], frozenset())
    text = Drawing("holiday.jpg", "image/jpeg", b"Dear diary, today was a sunny day at the beach.\n" * 9, frozenset())
    assets = await library.upload([*drawings[1:], corrupt, text])
    missing = library.insert([f"{library.member.workspace}/never-uploaded.jpg"])
    async with worker(library.stack):
        [job] = await library.finished(library.enqueue(assets + missing))
    rows = library.assets()
    library.check_tags(assets[:3])
    assert [rows[asset]["tagging_error"] for asset in [*assets[3:], *missing]] == [
        "The image file is damaged or incomplete.",
        "This is a text, not an image. Upload a PNG or JPEG instead.",
        "The image's file is not in storage.",
    ]
    assert (job["completed"], job["failed"]) == (3, 3)


async def test_corrupt_files_inside_a_batch_fail_alone(library: Library) -> None:
    drawings = list(draw(60))
    drawings[30] = Drawing("holiday.jpg", "image/jpeg", b"not a picture" * 20, frozenset())
    assets = await library.upload(drawings)
    async with worker(library.stack):
        [job] = await library.finished(library.enqueue(assets))
    assert (job["completed"], job["failed"], job["error"]) == (
        59,
        1,
        "This is a text, not an image. Upload a PNG or JPEG instead.",
    )
    library.check_tags([asset for asset in assets if asset != assets[30]])
    audit(library.stack)


async def test_a_deleted_asset_does_not_hold_up_its_job(library: Library) -> None:
    assets = await library.upload(3)
    told = library.enqueue(assets)
    library.sql("delete from public.assets where id = %s", assets[1])
    async with worker(library.stack):
        [job] = await library.finished(told)
    assert (job["completed"], job["failed"], job["error"]) == (2, 1, "The image was deleted.")


async def test_failed_lines_and_missing_lines_of_a_batch_are_tried_again_alone(library: Library) -> None:
    stack = library.stack
    stack.simulator.faults.add(Fault(where="BATCH", status=500, times=2))
    stack.simulator.faults.add(Fault(where="BATCH", answer="bad_schema", times=1))
    assets = await library.upload(60)
    async with worker(stack):
        await library.finished(library.enqueue(assets))
    library.check_tags()
    batch = [e for e in stack.simulator.request_log if e["method"] == "BATCH"]
    assert Counter(e["status"] for e in batch) == {200: 53, 500: 2}
    audit(stack)


async def test_openai_saying_its_queue_is_full_means_wait(library: Library) -> None:
    stack = library.stack
    stack.simulator.plan.queued_batch_tokens = 10
    assets = await library.upload(60)
    async with worker(stack):
        told = library.enqueue(assets)
        await until(
            lambda: any(b["status"] == "failed" for b in stack.simulator.batches.describe_all()), "the first refusal"
        )
        stack.simulator.plan.queued_batch_tokens = 2_000_000
        [job] = await library.finished(told)
    assert (job["completed"], job["failed"]) == (60, 0)
    library.check_tags()
    audit(stack)


async def test_a_batch_created_by_a_worker_that_died_is_adopted(library: Library) -> None:
    """The worker dies after OpenAI has created the batch and before the database knows. The next worker creates no
    second one."""
    stack = library.stack
    assets = await library.upload(60)
    library.enqueue(assets)
    async with worker(stack):
        await until(lambda: len(stack.simulator.batches.describe_all()) == 1, "the batch at OpenAI")
    library.sql(
        "update autotag.batches set state = 'creating', worker_id = null, openai_batch_id = null, openai_status = null,"
        " attempt = attempt + 1 where state = 'submitted'"
    )
    async with worker(stack):
        await until(lambda: library.sql("select 1 from autotag.jobs where finished_at is null") == [], "the end")
    assert len(stack.simulator.batches.describe_all()) == 1
    library.check_tags()
    assert len(answered_pictures(stack)) == 60


async def test_cancelling_keeps_what_is_done_and_ends_the_job(library: Library) -> None:
    stack = library.stack
    stack.configure(chunk_delay="30 s")
    assets = await library.upload(20)
    async with worker(stack):
        told = library.enqueue(assets)
        await until(lambda: library.job(told["job_id"])["completed"] == 5, "the first chunk")
        assert library.rpc("public.cancel_tagging", told["job_id"]) == {"job_id": told["job_id"], "cancelled": 15}
        [job] = await library.finished(told)
    assert (job["completed"], job["failed"], job["cancelled"], job["error"]) == (5, 15, True, "Tagging was cancelled.")
    assert library.rpc("public.cancel_tagging", told["job_id"])["cancelled"] == 0
    again = library.rpc("public.retry_tagging", told["job_id"])
    assert again["image_count"] == 15
    async with worker(stack):
        stack.configure(chunk_delay="0.1 s")
        library.sql("update autotag.queues set ready_at = '-infinity'")
        await library.finished(again)
    library.check_tags()
    audit(stack)


async def cancel_a_submitted_batch(library: Library, seed: int) -> float:
    """Uploads by batch and cancels. Returns the seconds until the cancellation reaches the simulator."""
    stack = library.stack
    told = library.enqueue(await library.upload(60, seed=seed))

    def ours() -> list[dict[str, Any]]:
        return library.sql("select openai_batch_id as id from autotag.batches where job_id = %s and state = 'submitted'",
                           told["job_id"])  # fmt: skip

    await until(lambda: ours() != [], "the batch to be ours")
    [mine] = ours()
    batch = next(b for b in stack.simulator.batches.describe_all() if b["id"] == mine["id"])
    await until(lambda: batch["request_counts"]["completed"] > 3, "some lines to be done")
    asked = time.time()
    library.rpc("public.cancel_tagging", told["job_id"])
    assert library.job(told["job_id"])["status"] == "cancelling"
    await until(lambda: batch["status"].startswith("cancel"), "OpenAI to know")
    [job] = await library.finished(told)
    assert (job["status"], batch["status"]) == ("cancelled", "cancelled")
    assert job["completed"] == batch["request_counts"]["completed"] + 5
    assert job["completed"] + job["failed"] == 60
    cancels = [e["at"] for e in stack.simulator.request_log if e["path"] == f"/v1/batches/{batch['id']}/cancel"]
    return float(cancels[0]) - asked


async def test_a_cancelled_batch_is_cancelled_at_openai_within_two_seconds_and_harvested(library: Library) -> None:
    """The next poll is ten minutes away. The fastest of three cancellations counts, because the machine may be busy."""
    stack = library.stack
    stack.simulator.plan.batch_latency = (20.0, 20.0)
    stack.configure(batch_poll_interval="10 min")
    seconds: list[float] = []
    async with worker(stack):
        while not seconds or (min(seconds) > CANCELLED_WITHIN and len(seconds) < 3):
            seconds.append(await cancel_a_submitted_batch(library, len(seconds)))
    print("cancelled at OpenAI after", *(f"{second:.2f} s" for second in seconds))
    assert min(seconds) <= CANCELLED_WITHIN
    audit(stack)


async def test_a_batch_that_cannot_be_cancelled_any_more_ends_all_the_same(library: Library) -> None:
    stack = library.stack
    stack.simulator.plan.batch_latency = (3.0, 3.0)
    stack.simulator.faults.add(Fault(where="POST /v1/batches/", status=409, code="conflict", times=1000))
    assets = await library.upload(60)
    async with worker(stack):
        told = library.enqueue(assets)
        await until(lambda: stack.simulator.batches.describe_all() != [], "the batch at OpenAI")
        await until(
            lambda: library.sql("select 1 from autotag.batches where state = 'submitted'") != [], "the batch to be ours"
        )
        library.rpc("public.cancel_tagging", told["job_id"])
        [job] = await library.finished(told)
    assert job["completed"] + job["failed"] == 60
    assert job["cancelled"]
    audit(stack)


def test_retrying_a_job_without_failures_is_refused(library: Library) -> None:
    told = library.enqueue(library.insert(["a.jpg"]))
    with pytest.raises(psycopg.Error) as caught:
        library.rpc("public.retry_tagging", told["job_id"])
    assert caught.value.diag.sqlstate == "PT409"
    assert json.loads(caught.value.diag.message_detail or "")["code"] == "nothing_to_retry"


async def test_killing_the_only_worker_in_the_middle_loses_nothing(library: Library) -> None:
    """The worker gets SIGKILL while calls are in flight and a batch is being built. The next worker does the rest."""
    stack = library.stack
    stack.configure(lease="2 s", realtime_requests_per_minute=1000, realtime_tokens_per_minute=1000000)
    stack.simulator.plan.latency = (0.3, 0.6)
    assets = await library.upload(40)
    more = await library.upload(60, seed=2)
    told, batch = library.enqueue(assets), library.enqueue(more)
    async with worker_process(stack.worker_environment()) as process:
        await until(lambda: library.job(told["job_id"])["completed"] >= 5, "the first tags")
        process.send_signal(signal.SIGKILL)
        await process.wait()
    held = library.sql("select count(*) as n from autotag.tasks where worker_id is not null")[0]["n"]
    async with worker_process(stack.worker_environment()):
        await library.finished(told, batch)
    library.check_tags()
    audit(stack)
    # Only what the dead worker had in its hands may have been asked twice.
    repeated = sum(n - 1 for n in Counter(answered_pictures(stack)).values())
    assert repeated <= held
    assert len({b["metadata"]["autotag_batch"] for b in stack.simulator.batches.describe_all()}) == 1


async def test_sigterm_finishes_what_is_in_hand_and_gives_back_the_rest(library: Library) -> None:
    stack = library.stack
    stack.simulator.plan.latency = (0.5, 0.8)
    assets = await library.upload(20)
    library.watch_failures()
    told = library.enqueue(assets)
    async with worker_process(stack.worker_environment()) as process:
        await until(lambda: stack.simulator.in_flight > 0, "calls in flight")
        process.send_signal(signal.SIGTERM)
        assert await process.wait() == 0
    assert library.sql("select count(*) as n from autotag.tasks where worker_id is not null")[0]["n"] == 0
    assert library.sql("select count(*) as n from autotag.workers")[0]["n"] == 0
    assert len(answered_pictures(stack)) == library.job(told["job_id"])["completed"] > 0
    assert library.failures() == 0
    audit(stack)
    async with worker(stack):
        await library.finished(told)
    assert set(Counter(answered_pictures(stack)).values()) == {1}


async def test_a_worker_whose_heartbeat_loses_the_cancellation_stops_and_stays_away(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`asyncio.wait_for` can lose a cancellation before Python 3.12. Here the heartbeat does: it goes on, and must not
    register the stopped worker again."""
    beating, lost = asyncio.Event(), asyncio.Event()

    async def heartbeat(db: Database, *claims: Sequence[int]) -> Beat:
        beating.set()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        lost.set()
        return Beat(alive=False, lost=False, tick_due=False, settings=Registered(60, 1000))

    monkeypatch.setattr(Database, "heartbeat", heartbeat)
    async with worker(library.stack) as wake, asyncio.timeout(PATIENCE):
        wake.notify("version")  # makes the heart beat at once
        await beating.wait()
    assert lost.is_set()
    assert library.sql("select count(*) as n from autotag.workers")[0]["n"] == 0


async def test_a_late_report_is_refused(library: Library, stack: Stack) -> None:
    assets = library.insert(["a.jpg"])
    library.enqueue(assets)
    late, current = "00000000-0000-4000-8000-000000000001", "00000000-0000-4000-8000-000000000002"
    for name in (late, current):
        library.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", name)
    [first] = library.claim(late, 1)["images"]
    library.sql("select autotag.release_held(%s, '{}', '{}', 'crashed')", late)
    [second] = library.claim(current, 1)["images"]
    assert (first["task"], first["attempt"] + 1) == (second["task"], second["attempt"])
    result = {"tags": ["late"], "confidence": {"late": 1}, "caption": "Late."}
    report = {"task": first["task"], "attempt": first["attempt"], "result": result}
    for name in (late, current):
        assert library.settle(name, [report]) == 0
    assert library.assets()[assets[0]]["tags"] is None
    audit(stack)


async def test_an_idle_worker_is_woken_by_the_upload(library: Library) -> None:
    assets = await library.upload(1)
    async with worker(library.stack, poll_interval=3600):  # seconds: only the notification can wake it in time
        await until(lambda: library.sql("select listening from autotag.workers") == [{"listening": True}], "the worker")
        assert answered_pictures(library.stack) == []
        await library.finished(library.enqueue(assets))
    library.check_tags()


async def test_a_claim_that_fails_is_not_asked_again_in_a_hurry(library: Library) -> None:
    """While claims fail, the worker claims about once a second, however often it is notified."""
    library.enqueue(library.insert(["a.jpg"]))
    library.sql("""create function autotag.broken() returns trigger language plpgsql as $$
        begin perform pg_notify('autotag', 'realtime'); raise 'broken'; end $$;
        create trigger broken before update on autotag.queues for each row execute function autotag.broken()""")
    with capture_logs() as logs:
        async with worker(library.stack):
            await until(lambda: sum(entry["event"] == "claim_failed" for entry in logs) >= 2, "two failures")
            before = time.monotonic()
            for _ in range(200):
                library.sql("select pg_notify('autotag', 'realtime')")
            seconds = time.monotonic() - before
            library.sql("drop trigger broken on autotag.queues")
    assert sum(entry["event"] == "claim_failed" for entry in logs) < 6 + 2 * seconds


async def test_a_running_worker_follows_another_lease(library: Library) -> None:
    """Settings need no restart: with a shorter lease the worker sends heartbeats more often, so its lease does not end
    between two of them."""
    beats = "select last_heartbeat_at as at, lease_until - last_heartbeat_at as lease from autotag.workers"
    async with worker(library.stack) as wake:
        await until(lambda: library.sql(beats) != [], "the worker")
        library.stack.configure(lease="6 s")
        wake.notify("version")  # makes the heart beat at once
        # A beat that began before the change may still write the lease of before.
        await until(lambda: library.sql(beats)[0]["lease"].total_seconds() == 6, "a beat with the new lease")
        [second] = library.sql(beats)
        await until(lambda: library.sql(beats)[0]["at"] != second["at"], "the next beat")
        [third] = library.sql(beats)
    assert (third["at"] - second["at"]).total_seconds() < 12, "20 s with the former lease"
