"""The provider's limits are learned from its answers, shared with other programs, and kept by all workers at once."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from autotag.images.files import Download, ImageFile
from autotag.images.storage import Storage
from lab.openai_sim.faults import Fault
from lab.openai_sim.limits import QUANTISED_ABOVE, Bucket, Limits, SharedKeyClient
from lab.postgres import LocalPostgres
from lab.stack import WORKER_ROLE, Stack
from support import Library, answered_pictures, audit, compress, until, worker

WIDE = {"chunk_delay": "0", "realtime_requests_per_minute": 100_000, "realtime_tokens_per_minute": 2_000_000_000,
        "realtime_max_images": 50}  # fmt: skip


def refusals(stack: Stack) -> int:
    return sum(entry["status"] == 429 for entry in stack.simulator.request_log)


def narrow(library: Library) -> None:
    """A bucket of twelve images, whose minute is two seconds."""
    library.stack.configure(**WIDE)
    compress(library.stack, 30)
    library.stack.configure(provider_margin="7.5 s")  # a message takes real time: a quarter of a second, as ever
    library.stack.simulator.limits = Limits.of(120, 12_000, None, speed=30)
    library.sql("update autotag.provider_limits set requests_per_minute = 120, tokens_per_minute = 12000,"
                " requests_per_day = null")  # fmt: skip


async def test_a_burst_against_a_narrow_provider_never_meets_a_429(library: Library) -> None:
    """Forty images, and a bucket of twelve: the simulator refuses no call."""
    stack = library.stack
    narrow(library)
    assets = [await library.upload(20, seed=seed) for seed in (1, 2)]
    async with worker(stack):
        await library.finished(*[library.enqueue(some) for some in assets])
    assert refusals(stack) == 0
    assert set(Counter(answered_pictures(stack)).values()) == {1}
    audit(stack)


async def test_a_storage_that_stalls_does_not_make_the_bucket_run_over(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Released calls that are not sent yet do not empty the provider's bucket, which is full and does not refill. So no
    more calls are released."""
    stack = library.stack
    narrow(library)
    flows = asyncio.Event()
    read = Storage.read

    async def stall(self: Storage, bucket: str, path: str, download: Download) -> ImageFile:
        await flows.wait()
        return await read(self, bucket, path, download)

    def released() -> int:
        return int(library.sql("select count(*) as n from autotag.tasks where attempt > 0")[0]["n"])

    monkeypatch.setattr(Storage, "read", stall)
    assets = await library.upload(40)
    async with worker(stack):
        job = library.enqueue(assets)
        await until(lambda: released() > 0, "the first images")
        [row] = library.sql("select autotag.now() + interval '2 min' as later")
        await until(lambda: library.sql("select autotag.now() > %s as so", row["later"])[0]["so"], "two minutes")
        assert released() <= 12
        flows.set()
        await library.finished(job)
    assert refusals(stack) == 0
    audit(stack)


async def test_another_program_with_the_same_key_makes_us_slow_down_and_not_fail(library: Library) -> None:
    """Another program takes two thirds of the requests. Everything is tagged, and few calls get a 429."""
    stack = library.stack
    stack.configure(**WIDE)
    compress(stack, 20)
    stack.simulator.limits = Limits.of(600, 10_000_000, None, speed=20)  # 200 requests a second
    stack.simulator.limits.shared_key_client = SharedKeyClient(requests_per_second=130, tokens_each=1)
    stack.simulator.limits.requests.left = 0
    library.sql("update autotag.provider_limits set requests_per_minute = 600, tokens_per_minute = 10000000,"
                " requests_left = 0, refilled_at = autotag.now(), requests_per_day = null")  # fmt: skip
    assets = [await library.upload(40, seed=seed) for seed in (1, 2, 3)]
    library.watch_failures()
    async with worker(stack):
        jobs = await library.finished(*[library.enqueue(some) for some in assets])
    assert [(job["completed"], job["failed"]) for job in jobs] == [(40, 0)] * 3
    assert refusals(stack) < 120, "fewer refusals than images"
    assert library.failures() == 0, "a 429 costs no try"
    audit(stack)


async def test_retry_after_holds_for_everybody(library: Library) -> None:
    """One call is asked to wait a second. No workspace sends a call within that second."""
    stack = library.stack
    stack.configure(**WIDE)
    other = Library(stack)
    stack.simulator.faults.add(Fault(status=429, code="rate_limit_exceeded", headers={"retry-after": "1"}))
    first, late = await library.upload(1), await other.upload(5, seed=2)
    async with worker(stack):
        told = library.enqueue(first)
        await until(lambda: refusals(stack) == 1, "the 429")
        refused_at = next(entry["at"] for entry in stack.simulator.request_log if entry["status"] == 429)
        await until(
            lambda: library.sql("select blocked_until > clock_timestamp() as b from autotag.provider_limits")[0]["b"],
            "the block",
        )
        theirs = other.enqueue(late)
        await library.finished(told)
        await other.finished(theirs)
    after = [
        e["at"] for e in stack.simulator.request_log if e["path"].endswith("/completions") and e["at"] > refused_at
    ]
    assert min(after) - refused_at >= 1.0
    assert len(after) == 6


async def test_a_changed_limit_is_adopted_and_logged(library: Library) -> None:
    stack = library.stack
    stack.simulator.limits = Limits.of(5000, 2_000_000, None)
    assets = await library.upload(2)
    with capture_logs() as logs:
        async with worker(stack):
            await library.finished(library.enqueue(assets))
    [row] = library.sql("select requests_per_minute, tokens_per_minute, requests_per_day from autotag.provider_limits")
    assert row == {"requests_per_minute": 5000, "tokens_per_minute": 2_000_000, "requests_per_day": None}
    [change] = [entry for entry in logs if entry["event"] == "provider_limits_changed"]
    assert "5000 requests and 2000000 tokens a minute" in change["notice"]


def test_what_an_answer_says_counts_with_its_age(library: Library) -> None:
    """A remaining number counts with the refill since its call was sent. It lowers the mirror only if it is lower even
    so."""
    library.sql("update autotag.settings set test_clock = true, provider_margin = '0'")
    statement = (
        "select set_config('autotag.now', '2030-01-01 00:00:00+00', false);"
        "update autotag.provider_limits set requests_per_minute = 600, requests_left = 100, refilled_at = '2030-01-01 00:00:00+00'"
    )
    with psycopg.connect(library.stack.database_url(), autocommit=True) as one:

        def left(**seen: Any) -> float:
            one.execute(statement)
            one.execute("select autotag.update_provider_limits(%s)", (json.dumps(seen),))
            row = one.execute("select requests_left from autotag.provider_limits").fetchone()
            assert row is not None
            return float(row[0])

        assert left(requests_left=60, requests_limit=600, age=4.0) == 100  # 60 four seconds ago are 100 now
        assert left(requests_left=59, requests_limit=600, age=4.0) == 99
        assert left(requests_left=500, requests_limit=600, age=0) == 100  # more than we know is not believed
        assert left(requests_left=0, requests_limit=600, age=0) == 0
        assert left() == 100


def test_requests_of_the_day_are_counted_too(library: Library, stack: Stack) -> None:
    stack.configure(**WIDE)
    library.sql("update autotag.provider_limits set requests_per_day = 1440, day_left = 3, refilled_at = now()")
    library.enqueue(library.insert([f"{i}.jpg" for i in range(5)]))
    name = "00000000-0000-4000-8000-000000000001"
    library.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", name)
    row = library.claim(name, 10)
    assert len(row["tasks"]) == 3
    assert 50 < row["wait"] <= 60, "the next one of 1,440 a day is a minute away"


@pytest.mark.parametrize("called", [True, False])
def test_what_was_not_used_is_given_back(library: Library, called: bool) -> None:
    """A call that was never sent counts as nothing, and one that failed as a request without tokens."""
    library.sql("update autotag.provider_limits set tokens_per_image = 1000")
    library.enqueue(library.insert(["a.jpg"]))
    name = "00000000-0000-4000-8000-000000000001"
    library.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", name)
    [task] = library.claim(name, 1)["images"]
    error = {
        "kind": "transient" if called else "image",
        "code": "provider_error" if called else "not_an_image",
        "message": "No.",
    }
    report = [{"task": task["task"], "attempt": task["attempt"], "error": error, "called": called}]
    assert library.sql("select requests, units from public.workspace_rate_limits") == [
        {"requests": [1], "units": [1000]}
    ]
    library.settle(name, report)
    assert library.sql("select requests, units from public.workspace_rate_limits") == [
        {"requests": [1 if called else 0], "units": [0]}
    ]


# -- fallback to batch


async def test_an_upload_that_would_wait_too_long_goes_by_batch_and_says_so(library: Library) -> None:
    stack = library.stack
    stack.configure(realtime_requests_per_minute=5, realtime_max_wait="2 min", batch_seconds=60)
    assets = await library.upload(30)
    async with worker(stack):
        told = library.enqueue(assets)
        assert (told["strategy"], told["batches"]) == ("batch", 1)
        [job] = await library.finished(told)
    assert job["fallback"].startswith("Single calls would have waited about 5 min")
    library.check_tags()
    small = library.enqueue(library.insert(["a.jpg"]))
    assert small["strategy"] == "realtime"
    assert library.job(small["job_id"])["fallback"] is None


async def test_when_429s_persist_the_rest_moves_to_the_batch_api(library: Library) -> None:
    """No image is tagged twice or lost by the move, and the job gives the reason."""
    stack = library.stack
    stack.configure(**{**WIDE, "chunk_delay": "0.05 s"}, realtime_max_wait="2 s")
    library.sql("update autotag.settings set realtime_max_images = 5")
    assets = await library.upload(30)
    calls = Fault(status=429, code="rate_limit_exceeded", headers={"retry-after-ms": "300"}, times=100_000, skip=6)
    stack.simulator.faults.add(calls)
    async with worker(stack):
        told = library.enqueue(assets)
        assert told["strategy"] == "realtime-chunked"
        await until(lambda: library.job(told["job_id"])["fallback"] is not None, "the switch")
        [job] = await library.finished(told)
    assert (job["completed"], job["failed"]) == (30, 0)
    assert job["fallback"].startswith("The AI service kept refusing")
    assert sum(batch["image_count"] for batch in job["batches"]) == 24
    library.check_tags()
    assert set(Counter(answered_pictures(stack)).values()) == {1}
    audit(stack)


async def test_waiting_ends_when_the_limit_says_so_and_what_waited_goes_on_together(library: Library) -> None:
    """After a block, all images continue at once, and not one by one with growing delays: their calls overlap."""
    stack = library.stack
    stack.configure(**WIDE)
    stack.simulator.plan.latency = (3.0, 3.0)
    stack.simulator.faults.add(Fault(status=429, code="rate_limit_exceeded", headers={"retry-after": "1"}, times=20))
    assets = await library.upload(20)
    async with worker(stack):
        await library.finished(library.enqueue(assets))
    assert refusals(stack) == 20
    calls = [
        (entry["at"], entry["done"])
        for entry in stack.simulator.request_log
        if entry["status"] == 200 and "done" in entry
    ]
    assert len(calls) == 20
    together = max(sum(at <= moment < done for at, done in calls) for moment, _ in calls)
    assert together >= 15, calls


# -- the worker


@pytest.mark.long
async def test_an_idle_worker_asks_at_most_four_times_a_minute(
    postgres: LocalPostgres, library: Library, machine_postgres: bool
) -> None:
    """The server counts the statements of the worker's login in this database. The lease is a tenth of the default."""
    stack = library.stack
    stack.configure(lease="6 s")

    def commits() -> int:
        with psycopg.connect(postgres.url("supabase_admin"), autocommit=True) as admin:
            row = admin.execute(
                "select coalesce(sum(s.calls), 0) from extensions.pg_stat_statements s join pg_roles r on r.oid = s.userid"
                " join pg_database d on d.oid = s.dbid where r.rolname = %s and d.datname = %s",
                (WORKER_ROLE, stack.database_url().rsplit("/", 1)[1]),
            ).fetchone()
        assert row is not None
        return int(row[0])

    async with worker(stack):
        await until(lambda: library.sql("select 1 from autotag.workers") != [], "the worker")
        before = -1
        while before != (now := commits()):  # until its first questions are behind it
            before = now
            await asyncio.sleep(1.0)
        await asyncio.sleep(12.0)  # two leases; what is measured is what does not happen in them
        asked = commits() - before
    assert asked <= 4 * 2, f"{asked} statements in two leases"


# -- the simulator meters as the provider does


def test_the_simulator_refills_continuously_and_above_a_rate_by_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr("lab.openai_sim.limits.time.monotonic", lambda: now[0])
    limits = Limits.of(60, 6000, 3)
    assert [limits.take(10)[1] for _ in range(3)] == [0, 0, 0]
    headers, wait, which = limits.take(10)
    assert (wait > 0, which) == (True, "requests per day (RPD)")
    limits = Limits.of(60, 6000, None)
    for _ in range(60):
        limits.take(10)
    headers, wait, which = limits.take(10)
    assert (wait, which, headers["x-ratelimit-remaining-requests"]) == (1.0, "requests per min (RPM)", "0")
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("1", "1000")
    now[0] += 0.5
    assert limits.take(10)[1] == pytest.approx(0.5)
    now[0] += 0.5
    assert limits.take(10)[1] == 0
    fast = Limits.of(QUANTISED_ABOVE, 10**9, None)
    fast.requests.left = 0
    now[0] = 2000.4
    fast.requests.refill()
    fast.requests.left = 0
    now[0] = 2000.9
    assert fast.take(1)[1] > 0, "what this second brings comes at its end"
    now[0] = 2001.0
    assert fast.take(1)[1] == 0
    assert Bucket(60).seconds_until(61) == pytest.approx(1.0)
