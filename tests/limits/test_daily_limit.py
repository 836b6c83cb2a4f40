"""The provider's limit of requests per day: it is read from headers, never confused with a limit per minute, and
planned for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from lab.openai_sim.limits import Limits, RequestHeaders, as_duration
from support import Library, answered_pictures, audit, refused, worker

WORKER = "00000000-0000-4000-8000-000000000001"
WIDE = {"realtime_requests_per_minute": 100_000, "realtime_tokens_per_minute": 2_000_000_000}


def claim(library: Library, slots: int = 100) -> dict[str, Any]:
    library.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", WORKER)
    row = library.claim(WORKER, slots)
    return {"n": len(row["tasks"]), "wait": row["wait"], "bound": row["bound"]}


def limits(library: Library) -> tuple[int, int | None]:
    [row] = library.sql("select requests_per_minute, requests_per_day from autotag.provider_limits")
    return row["requests_per_minute"], row["requests_per_day"]


@pytest.fixture
def seen(library: Library) -> Any:
    """Reports limits while the clock stands still. Returns the requests that are left of the minute and of the day."""
    library.sql("update autotag.settings set test_clock = true, provider_margin = '0'")
    with psycopg.connect(library.stack.database_url(), autocommit=True) as one:
        one.execute("select set_config('autotag.now', '2030-01-01 00:00:00+00', false)")
        one.execute("update autotag.provider_limits set requests_per_minute = 600, requests_left = 600,"
                    " requests_per_day = 14400, day_left = 5000, refilled_at = '2030-01-01 00:00:00+00'")  # fmt: skip

        def report(**observed: Any) -> tuple[float, float]:
            one.execute("select autotag.update_provider_limits(%s)", (json.dumps(observed),))
            row = one.execute("select requests_left, day_left from autotag.provider_limits").fetchone()
            assert row is not None
            return float(row[0]), float(row[1])

        yield report


def test_a_daily_limit_leaves_the_minute_alone(seen: Callable[..., Any], library: Library) -> None:
    assert seen(day_limit=14400, day_left=4000, age=0) == (600, 4000), "a lower remainder is adopted"
    assert seen(day_limit=14400, day_left=3990, age=60) == (600, 4000), "3,990 a minute ago are 4,000 now"
    assert limits(library) == (600, 14400)
    assert seen(day_limit=10000, day_left=100, age=0) == (600, 100)
    assert limits(library) == (600, 10000)
    assert seen(requests_limit=600, requests_left=7, age=0) == (7, 100)
    assert limits(library) == (600, 10000), "both kinds may alternate"
    seen(requests_limit=700, requests_left=7, age=0)
    assert limits(library) == (700, 10000), "a higher limit per minute does not undo what the headers just said"


def test_a_higher_tier_has_no_daily_limit(seen: Callable[..., Any], library: Library) -> None:
    seen(requests_limit=5000, requests_left=5000, age=0)
    assert limits(library) == (5000, None), "10,000 a day was an assumption, and tier 1"


def test_a_day_that_begins_is_noticed(seen: Callable[..., Any], library: Library) -> None:
    """Some providers restore the whole day's limit at midnight. The mirror adopts that, minus the calls that the headers
    do not count yet."""
    library.sql("update autotag.provider_limits set requests_left = 580")  # 20 calls were released just now
    assert seen(day_limit=14400, day_left=14390, age=0)[1] == 14390 - 20
    library.sql("update autotag.provider_limits set day_left = 100, requests_left = 600")
    assert seen(day_limit=14400, day_left=110, age=6)[1] == 100, "60 calls may have been made in six seconds"
    assert seen(day_limit=14400, day_left=0, age=0)[1] == 0


def test_requests_of_an_unclear_period_count_a_minute_unless_they_are_the_known_day(
    seen: Callable[..., Any], library: Library
) -> None:
    seen(unclear_limit=480, unclear_left=400, age=0)
    assert limits(library) == (480, 14400)
    assert seen(unclear_limit=14400, unclear_left=3000, age=0)[1] == 3000
    assert limits(library) == (480, 14400)
    library.sql("update autotag.provider_limits set requests_per_day = 480")
    assert seen(unclear_limit=480, unclear_left=11, age=0)[0] == 11, "the same as the minute's is the minute's"
    seen(unclear_limit=480, unclear_left=1, requests_limit=490, requests_left=490, age=0)
    assert limits(library)[0] == 490, "what is clear goes first"
    seen(unclear_limit=500)
    assert limits(library)[0] == 500
    seen(unclear_limit="many", day_limit=-3, day_left="x")
    assert limits(library)[0] == 500


def test_a_small_daily_limit_can_be_corrected_within_the_hour(seen: Callable[..., Any], library: Library) -> None:
    seen(day_limit=1, day_left=0, age=0)
    assert limits(library) == (600, 24)


def test_an_upload_that_does_not_fit_into_the_day_goes_by_batch(library: Library) -> None:
    library.stack.configure(**WIDE)
    library.sql("update autotag.provider_limits set requests_per_day = 1440, day_left = 3, refilled_at = now()")
    told = library.enqueue(library.insert([f"{i}.jpg" for i in range(50)]))
    assert (told["strategy"], told["batches"]) == ("batch", 1)
    fallback = library.job(told["job_id"])["fallback"]
    assert (
        fallback == "Single calls would have waited about 47 min for the limits, so these images are sent in a batch."
    )
    large = library.enqueue(library.insert([f"b{i}.jpg" for i in range(100)]))
    assert large["strategy"] == "batch"
    assert claim(library)["n"] == 3, "its express images take what is left"


def test_what_the_day_has_left_shows_in_the_eta_and_the_preview(library: Library) -> None:
    library.stack.configure(**WIDE)
    library.sql("update autotag.provider_limits set requests_per_day = 1440, day_left = 1, refilled_at = now()")
    assert library.rpc("public.tagging_strategy", 5)["estimate_seconds"] == pytest.approx(240, abs=10)
    told = library.enqueue(library.insert([f"{i}.jpg" for i in range(5)]))
    [row] = library.sql(
        "select extract(epoch from eta - created_at)::float as s from autotag.jobs where id = %s", told["job_id"]
    )
    assert row["s"] == pytest.approx(244, abs=10), "four minutes, and a call"
    library.sql("update autotag.provider_limits set requests_per_day = null")
    assert library.rpc("public.tagging_strategy", 5)["estimate_seconds"] < 30


def test_a_block_of_an_hour_counts_as_a_wait(library: Library) -> None:
    """A 429 asked to wait an hour, for example because a limit of tokens per day is used up. A new upload goes by
    batch."""
    library.sql("update autotag.provider_limits set blocked_until = now() + interval '1 h'")
    told = library.enqueue(library.insert(["a.jpg"]))
    assert told["strategy"] == "batch"
    assert library.job(told["job_id"])["fallback"].startswith("Single calls would have waited about 60 min")


def test_no_express_image_waits_for_tomorrow(library: Library) -> None:
    library.sql("update autotag.provider_limits set requests_per_day = 24, day_left = 0, refilled_at = now()")
    library.enqueue(library.insert([f"{i}.jpg" for i in range(100)]))
    assert library.sql("select image_count, express_count from autotag.batches") == [
        {"image_count": 100, "express_count": 0}
    ]


def test_when_the_day_is_used_up_what_waits_moves_to_the_batch_api(library: Library) -> None:
    """The limit becomes known after the upload. Images that have waited for realtime_max_wait move, and the job gives
    the reason."""
    library.stack.configure(**WIDE)
    told = library.enqueue(library.insert([f"{i}.jpg" for i in range(20)]))
    assert told["strategy"] == "realtime-chunked"
    library.sql("update autotag.provider_limits set requests_per_day = 240, day_left = 0, refilled_at = now()")
    row = claim(library)
    assert (row["n"], row["bound"], row["wait"] <= 60) == (0, "provider_day", True)
    assert library.job(told["job_id"])["fallback"] is None
    library.sql("update autotag.jobs set created_at = created_at - interval '11 min'")
    claim(library)
    job = library.job(told["job_id"])
    assert (
        job["fallback"] == "The AI service allows no more single calls today, so the rest of these images go by batch."
    )
    assert [batch["image_count"] for batch in job["batches"]] == [20]
    audit(library.stack)


def test_status_and_doctor_name_the_daily_limit(library: Library) -> None:
    library.enqueue(library.insert(["a.jpg"]))
    library.sql("update autotag.provider_limits set requests_per_day = 240, day_left = -3, refilled_at = now()")
    [row] = library.sql("select autotag.status() as s, autotag.diagnose() as d")
    assert (row["s"]["limits"]["requests_per_day"], row["s"]["limits"]["requests_left_today"]) == (240, 0)

    def finding() -> tuple[str, str]:
        [row] = library.sql("select autotag.diagnose() as d")
        [found] = [f for f in row["d"]["findings"] if f["check"] == "daily limit"]
        return found["level"], found["message"]

    assert finding() == (
        "warning",
        "The provider's 240 requests of a day are used up: single calls go on at 10 an hour, and 1 image waits for one.",
    )
    library.sql("update autotag.provider_limits set day_left = 100, refilled_at = now()")
    assert finding() == ("ok", "100 of the provider's 240 requests of a day are left.")
    library.sql("update autotag.provider_limits set requests_per_day = null")
    assert finding()[0] == "ok"


@pytest.mark.parametrize("kind", ["day", "both", "alternating"])
async def test_a_day_that_ends_makes_no_storm_of_429s(library: Library, kind: RequestHeaders) -> None:
    """25 requests of 10,000 are left, which only the headers show. Each other image waits for the 8.64 s in which one
    request is refilled; a minute lasts 2 seconds."""
    stack = library.stack
    stack.configure(**WIDE, realtime_max_wait="1 day")
    stack.compress(30)
    stack.configure(chunk_delay="3 s")
    stack.simulator.limits = Limits.of(500, 10_000_000, 10_000, speed=30, request_headers=kind)
    assert stack.simulator.limits.day is not None
    stack.simulator.limits.day.left = 25
    library.sql(
        "update autotag.provider_limits set requests_per_minute = 500, tokens_per_minute = 10000000, tokens_left = 10000000"
    )
    assets = await library.upload(40)
    async with worker(stack):
        [job] = await library.finished(library.enqueue(assets))
    assert (job["completed"], job["failed"]) == (40, 0)
    assert limits(library) == (500, 10_000), "the minute's limit is still the minute's"
    assert set(Counter(answered_pictures(stack)).values()) == {1}
    # A call may be refused that was sent before an answer told how much is left, on a busy machine most of two chunks. A storm is
    # each of the 15 images again and again.
    assert len(refused(stack)) <= 10, "the others know how much is left"
    audit(stack)


# -- the simulator


def test_the_simulator_tells_the_limit_of_the_day() -> None:
    openai = Limits.of(500, 200_000, 10_000)
    headers, wait, _ = openai.take(10)
    assert wait == 0
    assert {name: headers[f"x-ratelimit-{name}-requests"] for name in ("limit", "remaining", "reset")} == {
        "limit": "10000", "remaining": "9999", "reset": "8.64s",
    }  # fmt: skip
    gateway = Limits.of(500, 200_000, 10_000, request_headers="alternating")
    assert [gateway.take(1)[0]["x-ratelimit-limit-requests"] for _ in range(4)] == ["10000", "500", "10000", "500"]
    both = Limits.of(500, 200_000, 10_000, request_headers="both").take(1)[0]
    assert (both["x-ratelimit-limit-requests"], both["x-ratelimit-limit-requests-day"]) == ("500", "10000")
    assert Limits.of(500, 200_000, None).take(1)[0]["x-ratelimit-limit-requests"] == "500"
    fast = Limits.of(500, 200_000, 10_000, speed=1000).take(1)[0]
    assert fast["x-ratelimit-reset-requests"] == "8.64s", "in the provider's time"


def test_durations_are_written_as_openai_writes_them() -> None:
    texts = {
        0.006: "6ms",
        8.64: "8.64s",
        60: "1m0s",
        90.5: "1m30.5s",
        3600: "1h0m0s",
        86_391.36: "23h59m51.36s",
        0: "0s",
    }
    assert {seconds: as_duration(seconds) for seconds in texts} == texts
