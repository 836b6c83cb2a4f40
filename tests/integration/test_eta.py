"""Predicted times: which ones are shown, and that they are plausible. `scripts/bench eta` measures how exact they are."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rich.console import Console

from benchmarks import eta
from lab.postgres import LocalPostgres
from lab.stack import Stack
from support import Library, until, worker

NOON = datetime(2026, 3, 10, 12, tzinfo=UTC)


def predict(library: Library, age: float = 0, running: float | None = None, share: float = 0) -> tuple[float, float]:
    """The median and the 90th percentile of a batch of 100 images that began `age` seconds before noon."""
    started = NOON - timedelta(seconds=age)
    [row] = library.sql(
        "select p50, p90 from autotag.predict_batch(100, %s, %s, %s, %s, null)",
        started, NOON, None if running is None else started + timedelta(seconds=running), share,
    )  # fmt: skip
    return float(row["p50"]), float(row["p90"])


def remember(library: Library, seconds: float, count: int = 20, images: int = 100, days_ago: float = 0.5) -> None:
    library.sql(
        "insert into autotag.durations (images, started_at, seconds)"
        " select %s, %s::timestamptz + i * interval '1 min', %s from generate_series(1, %s) i",
        images, NOON - timedelta(days=days_ago), seconds, count,
    )  # fmt: skip


def test_without_history_it_is_common_experience(library: Library) -> None:
    """Without a history, a batch is predicted to take 45 minutes, and at the 90th percentile 12 hours."""
    assert predict(library) == (2700, 16 * 2700)


def test_history_counts_and_the_newest_most(library: Library) -> None:
    remember(library, 5000, days_ago=6)
    assert predict(library)[0] == 5000
    remember(library, 600, days_ago=0.5)
    p50, p90 = predict(library)
    assert p50 == 600
    assert p90 >= 5000, "the slow ones of six days ago still count a little"


def test_history_of_other_sizes_counts_less(library: Library) -> None:
    remember(library, 9000, images=5000)
    remember(library, 1000, images=110)
    assert predict(library)[0] == 1000


def test_what_has_lasted_longer_will_not_be_shorter(library: Library) -> None:
    remember(library, 600)
    for age in (0, 300, 601, 3000, 100_000):
        p50, p90 = predict(library, age)
        assert age <= p50 <= p90


def test_a_batch_that_moves_is_predicted_by_its_own_pace(library: Library) -> None:
    """A batch that has waited 500 seconds, and was half done 1,000 seconds later, needs another 1,000 seconds."""
    remember(library, 600)
    p50, p90 = predict(library, 1500, running=500, share=0.5)
    assert p50 == pytest.approx(2500)
    assert 2500 < p90 < 3500
    assert predict(library, 1500, running=500, share=1.0)[0] == pytest.approx(1500)


def test_batches_in_flight_that_are_late_show_before_they_end(library: Library) -> None:
    remember(library, 600, count=3)
    before = predict(library)[0]
    assets = library.insert([f"{i}.jpg" for i in range(60)])
    library.enqueue(assets)
    library.sql("update autotag.batches set state = 'submitted', submitted_at = %s, predicted_seconds = 600",
                NOON - timedelta(hours=3))  # fmt: skip
    assert predict(library)[1] > 15_000 > before


async def test_a_batch_leaves_its_length_and_the_rows_show_the_time_left(library: Library) -> None:
    stack = library.stack
    stack.simulator.plan.batch_latency = (3, 3)
    assets = await library.upload(60)
    async with worker(stack):
        told = library.enqueue(assets)
        waiting = assets[-1]
        first = library.assets()[waiting]["tagging_eta"]
        assert (first - datetime.now(UTC)).total_seconds() == pytest.approx(2700, abs=60), "nothing is known yet"
        await until(lambda: library.job(told["job_id"])["progress"] > 50, "half of it")
        assert library.assets()[waiting]["tagging_stage"] == "processing"
        job = library.job(told["job_id"])
        assert (datetime.fromisoformat(job["eta"]) - datetime.now(UTC)).total_seconds() < 60, "its own pace says so"
        assert job["eta"] < job["eta_p90"]
        await library.finished(told)
    [row] = library.sql("select images, seconds from autotag.durations")
    assert row["images"] == 55  # five went express
    assert 2 < row["seconds"] < 10
    assert library.assets()[waiting]["tagging_eta"] is None
    assert library.job(told["job_id"])["eta"] is None


def test_single_calls_are_predicted_by_their_schedule(library: Library) -> None:
    library.stack.configure(chunk_delay="2 s", call_seconds=4)

    def seconds(images: int) -> float:
        told = library.enqueue(library.insert([f"{images}-{i}.jpg" for i in range(images)]))
        left = (datetime.fromisoformat(told["eta"]) - datetime.now(UTC)).total_seconds()
        library.rpc("public.cancel_tagging", told["job_id"])
        return left

    assert seconds(3) == pytest.approx(4, abs=1)
    assert seconds(20) == pytest.approx(4 + 3 * 2, abs=1), "four chunks, two seconds apart"
    # 45 images and a window of 30 a minute: the last fifteen wait for half a minute's worth of it
    assert seconds(45) == pytest.approx(4 + 30, abs=3)


def test_histories_are_replayed_with_what_was_known_then(tmp_path: Path) -> None:
    """`bench eta` replays a recorded history. Each prediction uses only what was known at its time."""
    file = tmp_path / "durations.csv"
    with file.open("w", newline="") as out:
        writer = csv.writer(out)
        writer.writerow(["images", "started_at", "seconds"])
        writer.writerows([100, (NOON + timedelta(hours=i)).isoformat(), 900] for i in range(30))
    chosen: dict[str, list[Any]] = {}
    original = eta.histories
    try:
        eta.histories = lambda: chosen  # type: ignore[assignment]
        result = eta.measure(Console(quiet=True), file)
    finally:
        eta.histories = original
    looks = result.details["recorded"]["by share done"]
    assert looks["0.00"]["median error of the time left"] < 0.01, "after some batches of 15 minutes it says 15 minutes"
    assert set(result.figures) == {"p90_coverage", "median_abs_error"}


def test_a_look_at_many_batches_predicts_once_an_upload(stack: Stack, postgres: LocalPostgres, database: str) -> None:
    """A poll that reports many moved batches predicts each batch of their uploads once, however many of them moved."""
    uploads, batches = 4, 10
    with psycopg.connect(postgres.url("supabase_admin", database), autocommit=True) as connection:
        connection.execute("set track_functions = 'pl'")
        connection.execute(
            "insert into autotag.jobs (workspace_id, strategy, image_count, created_at)"
            " select gen_random_uuid(), 'batch-parallel', 1000, now() from generate_series(1, %s)",
            (uploads,),
        )
        connection.execute(
            "insert into autotag.batches (job_id, workspace_id, ordinal, image_count, created_at, state, openai_batch_id,"
            "  openai_status, submitted_at, predicted_seconds)"
            " select j.id, j.workspace_id, n, 100, now(), 'submitted', j.id || '-' || n, 'validating', now(), 2700"
            " from autotag.jobs j, generate_series(1, %s) n",
            (batches,),
        )
        connection.execute("select autotag.register_worker(gen_random_uuid(), 'h', autotag.schema_version(), true)")
        connection.execute("update autotag.workers set poll_assigned_at = now()")
        look = """select autotag.record_poll((select id from autotag.workers), (select jsonb_agg(jsonb_build_object('id', b.openai_batch_id,
          'status', 'in_progress', 'total', 100, 'done', %s)) from autotag.batches b))"""
        predictions = []
        for done in (20, 24):  # a step of ten percent, and less than one
            connection.execute("select pg_stat_reset()")
            connection.execute(look, (done,))
            connection.execute("select pg_stat_force_next_flush()")
            row = connection.execute(
                "select sum(calls)::int from pg_stat_user_functions where funcname = 'predict_batch'"
            ).fetchone()
            predictions.append(row[0] if row else None)
    assert predictions == [uploads * batches, uploads * batches]


@pytest.mark.parametrize("half_life", [0.5, 0.01, 0.0001, 1e-6, 1e-300, 1e300, float("inf"), float("nan")])
def test_a_half_life_of_any_length_predicts_something(library: Library, half_life: float) -> None:
    """With a half-life of a fraction of a day, old weights underflow. They count as zero, and the prediction does not
    fail."""
    library.sql("update autotag.settings set eta_half_life_days = %s", half_life)
    remember(library, 5000, days_ago=6)
    remember(library, 4000, days_ago=400)
    p50, p90 = predict(library)
    assert 0 < p50 < p90
    if half_life <= 0.5:
        assert p50 == 2700, "twelve half-lives ago counts less than common experience"
    told = library.enqueue(library.insert([f"{i}.jpg" for i in range(60)]))
    assert told["strategy"] == "batch"
    assert datetime.fromisoformat(told["eta"]) > datetime.now(UTC)


def test_a_short_half_life_believes_what_ended_just_now(library: Library) -> None:
    library.sql("update autotag.settings set eta_half_life_days = 0.01")
    remember(library, 600, days_ago=600 / 86_400)
    assert predict(library)[0] == 600
    remember(library, 7000, count=300, days_ago=1)
    assert predict(library)[0] == 600, "a day ago is a hundred half-lives ago"


def test_a_batch_that_ended_in_the_future_fails_nothing(library: Library) -> None:
    """A clock that was set back or a restored backup can leave such a batch."""
    library.sql("update autotag.settings set eta_half_life_days = 0.001")
    remember(library, 600, days_ago=-30)
    assert predict(library)[0] == 600


COUNTS = st.integers(-1, 60_000) | st.sampled_from([0, 1, 95, 2**31, 10**30])
POSITIVE = st.floats(min_value=0, exclude_min=True) | st.sampled_from([1e-308, 0.5, 1e300, float("inf"), float("nan")])
STATUSES = st.sampled_from(["validating", "in_progress", "finalizing", "completed", "cancelling", "gone"])


@pytest.fixture
def polled(library: Library) -> Iterator[psycopg.Connection[Any]]:
    """A connection of the owner, with two batches in flight of one workspace and a worker that polls."""
    library.enqueue(library.insert([f"{i}.jpg" for i in range(300)]))
    with psycopg.connect(library.stack.database_url(), autocommit=True) as connection:
        connection.execute("update autotag.batches set state = 'submitted', openai_batch_id = 'b-' || ordinal,"
            " submitted_at = now() - interval '1 h', progress_at = now(), predicted_seconds = 600,"
            " openai_status = 'validating' where ordinal < 3")  # fmt: skip
        connection.execute("select autotag.register_worker(gen_random_uuid(), 'h', autotag.schema_version(), true)")
        connection.execute("update autotag.workers set poll_assigned_at = now()")
        yield connection


def test_a_batch_that_is_submitted_again_begins_to_count_again(polled: psycopg.Connection[Any]) -> None:
    """Otherwise the new batch would show no progress until it had passed the old one, and would count as stuck."""
    with polled.transaction(force_rollback=True):
        [[batch, worker]] = polled.execute(
            "update autotag.batches set state = 'creating', worker_id = (select id from autotag.workers), claim = 1, attempt = 1,"
            "  openai_batch_id = null, openai_status = null, request_total = 50, request_done = 50, submitted_at = null"
            " where ordinal = 1 returning id, worker_id"
        ).fetchall()
        polled.execute("select autotag.batch_submitted(%s, %s, 1, 'b-again', 'validating', 'f')", (worker, batch))
        poll = json.dumps([{"id": "b-again", "status": "in_progress", "total": 40, "done": 1}])
        polled.execute("select autotag.record_poll(%s, %s)", (worker, poll))
        counts = polled.execute("select request_total, request_done from autotag.batches where id = %s", (batch,))
        assert counts.fetchall() == [(40, 1)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    polls=st.lists(st.tuples(STATUSES, COUNTS, COUNTS), min_size=1, max_size=3),
    call_seconds=POSITIVE, batch_seconds=POSITIVE, half_life=POSITIVE,
    chunk_delay=st.sampled_from(["0", "2 s", "178000000 years"]),
)  # fmt: skip
@example(polls=[("in_progress", 0, 5)], call_seconds=4, batch_seconds=2700, half_life=1, chunk_delay="2 s")
@example(
    polls=[("validating", 0, 2), ("in_progress", 1, 0)], call_seconds=1, batch_seconds=1, half_life=1, chunk_delay="0"
)
@example(polls=[("in_progress", 95, 20)], call_seconds=1e300, batch_seconds=1e300, half_life=1, chunk_delay="2 s")
def test_no_poll_and_no_setting_makes_a_prediction_fail(
    polled: psycopg.Connection[Any],
    library: Library,
    polls: list[tuple[str, int, int]],
    call_seconds: float,
    batch_seconds: float,
    half_life: float,
    chunk_delay: str,
) -> None:
    """Polls, uploads and outcomes of all workspaces contain predictions, so an error of a prediction would fail
    them."""
    with polled.transaction(force_rollback=True):
        polled.execute(
            "update autotag.settings set call_seconds = %s, batch_seconds = %s, eta_half_life_days = %s, chunk_delay = %s",
            (call_seconds, batch_seconds, half_life, chunk_delay),
        )
        for status, total, done in polls:
            poll = json.dumps([{"id": "b-1", "status": status, "total": total, "done": done}])
            polled.execute("select autotag.record_poll((select id from autotag.workers), %s)", (poll,))
        [row] = polled.execute("select request_total, request_done, image_count - express_count"
            " from autotag.batches where ordinal = 1")  # fmt: skip
        assert 0 <= row[1] <= (row[0] or row[2]) <= row[2], "no more is done than there is"
        polled.execute("select autotag.show_batch((select id from autotag.workers), b.id, 0, 1) from autotag.batches b")
        polled.execute("update autotag.jobs set broadcast_at = '-infinity'")
        polled.execute("select autotag.report_job(id, 1, 0, '{}') from autotag.jobs")
        polled.execute("select autotag.status(), public.tagging_strategy(10), public.tagging_strategy(1000)")
        for images in (1, 20, 60):
            polled.execute(
                "with mine as (insert into public.workspaces (name) values ('another') returning id), added as ("
                "  insert into public.assets (workspace_id, storage_path) select m.id, m.id || '/' || i"
                "  from mine m, generate_series(1, %s) i returning id)"
                " select public.enqueue_tagging((select array_agg(id) from added))",
                (images,),
            )
