"""Turns of batches: a full window causes few claims, and a batch that is retried waits like a single call."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from engine import WORKER, Engine
from lab.postgres import LocalPostgres

HOUR = 3600


@pytest.fixture
def engine(postgres: LocalPostgres, database: str) -> Iterator[Engine]:
    with psycopg.connect(postgres.url("supabase_admin", database), autocommit=True) as connection:
        yield Engine(connection)


# -- a full window


@pytest.mark.parametrize("sizes", [[60] * 100, [60 + n for n in range(100)], [160 - n for n in range(100)]])
def test_a_workspace_whose_window_is_full_costs_a_few_claims(engine: Engine, sizes: list[int]) -> None:
    engine.sql("update autotag.settings set live_images_max = 1000000")
    for second, images in enumerate(sizes):
        engine.set_time(second)
        engine.upload(images)
    claims, started = engine.claim_all()
    assert (started, claims) == (10, pytest.approx(5, abs=2))
    assert engine.due() == 0, "all others wait for the window"
    engine.set_time(HOUR + 200)
    claims, started = engine.claim_all()
    assert (started, claims) == (20, pytest.approx(5, abs=2)), "and start when it has room"


def test_a_batch_without_room_holds_back_only_larger_and_later_ones(engine: Engine) -> None:
    engine.sql("update autotag.settings set batch_images_per_hour = 200, chunk_max_images = 10")
    engine.upload(150)
    engine.claim_all()
    for second, images in enumerate([60, 60, 40, 70, 10 + 1], 1):
        engine.set_time(second)
        engine.upload(images)
    assert engine.claim_all()[1] == 2, "the one of 40 has room; that of 11 has not then"
    assert engine.sql("select image_count from autotag.batches where state = 'planned' order by created_at") == [
        (60,),
        (60,),
        (70,),
        (11,),
    ]


def test_a_minute_does_not_wake_batches_that_have_no_room(engine: Engine) -> None:
    """The window admits more batches, but only 40 more images, and each of these batches has 60."""
    engine.sql(
        "update autotag.settings set batch_images_per_hour = 100, chunk_max_images = 10, realtime_max_wait = '1 day'"
    )
    for second in range(20):
        engine.set_time(second)
        engine.upload(60)
    assert engine.claim_all()[1] == 1
    engine.set_time(60)
    engine.sql("select autotag.tick()")
    assert engine.due() == 0
    engine.sql("update autotag.settings set batch_images_per_hour = 240")
    engine.sql("select autotag.tick()")
    assert engine.due() == 3, "a raised limit wakes as many as it admits"
    assert engine.claim_all()[1] == 4


# -- slots of a worker


def test_a_large_upload_leaves_one_slot_of_a_worker_to_the_others(engine: Engine) -> None:
    engine.sql("insert into public.workspaces (name) values ('x'), ('y')")
    engine.sql(
        "update autotag.settings set batch_split_images = 60, batch_max_images = 100, batch_images_per_hour = 10000"
    )
    engine.upload(600)
    assert engine.due() >= 6
    first, _ = engine.claim_batches(4)
    assert len(first) == 3
    assert engine.claim_batches(1)[0] == [], "it has its share"
    engine.upload(60, "x")
    engine.upload(60, "y")
    [batch], _ = engine.claim_batches(1)
    assert engine.sql(
        "select w.name from autotag.batches b join public.workspaces w on w.id = b.workspace_id where b.id = %s",
        batch["batch"],
    ) == [("x",)]
    engine.sql("update autotag.batches set state = 'submitted', worker_id = null where id = %s", first[0]["batch"])
    assert len(engine.claim_batches(1)[0]) == 1, "when one of its batches has ended, whoever is next goes on"


def test_a_worker_with_one_slot_uses_it(engine: Engine) -> None:
    engine.upload(200)
    assert len(engine.claim_batches(1)[0]) == 1


# -- retries


def fail_to_build(engine: Engine, batch: dict[str, Any], **error: Any) -> None:
    """Reports a batch of which the worker could prepare no image."""
    failed = {
        "kind": "transient",
        "code": "storage_error",
        "message": "Storage answered 503.",
        "origin": "storage",
        **error,
    }
    reports = [
        {"task": task, "error": failed}
        for (task,) in engine.sql(
            "select id from autotag.tasks where batch_id = %s and finished_at is null", batch["batch"]
        )
    ]
    engine.sql(
        "select autotag.batch_answers(%s, %s, %s, %s)", WORKER, batch["batch"], batch["attempt"], json.dumps(reports)
    )
    engine.sql("select autotag.batch_finish(%s, %s, %s)", WORKER, batch["batch"], batch["attempt"])


def test_images_of_a_batch_wait_longer_with_each_failure(engine: Engine) -> None:
    engine.upload(100)
    at, waits = 0.0, []
    for _ in range(8):
        [batch], _ = engine.claim_batches()
        fail_to_build(engine, batch)
        if not engine.sql("select 1 from autotag.batches where state = 'planned'"):
            break
        [(wait,)] = engine.sql(
            "select extract(epoch from not_before - autotag.now())::float from autotag.batches where state = 'planned'"
        )
        assert engine.claim_batches()[0] == []
        engine.sql("select autotag.tick()")
        assert engine.claim_batches()[0] == [], "nor does the minute end the delay"
        waits.append(wait)
        at += wait + 0.001
        engine.set_time(at)
    assert waits == [pytest.approx(full * 0.9, rel=0.12) for full in (2, 4, 8, 16, 32, 60, 60)]
    assert engine.sql("select count(*) from autotag.unstored where error_code = 'storage_error'") == [(100,)]
    assert engine.sql("select requests from public.workspace_rate_limits where request_type = 'batch'") == [([1],)], (
        "OpenAI never had a batch, so all these rounds are one batch of the hour"
    )


@pytest.mark.parametrize("images", [100, 55])
def test_images_of_a_batch_wait_as_long_as_an_error_asks(engine: Engine, images: int) -> None:
    engine.upload(images)
    [batch], _ = engine.claim_batches()
    if images == 55:
        engine.sql("update autotag.settings set chunk_max_images = 60")  # they go on as single calls
    fail_to_build(engine, batch, retry_after=300)
    due = """select extract(epoch from coalesce(t.retry_at, b.not_before) - autotag.now())::integer, count(*)
      from autotag.tasks t left join autotag.batches b on b.id = t.batch_id group by 1"""
    assert engine.sql(due) == [(300, images)]


def test_a_batch_that_opened_with_an_error_is_harvested_as_soon_as_it_has_ended(engine: Engine) -> None:
    engine.upload(100)
    [batch], _ = engine.claim_batches()
    [(task,)] = engine.sql("select min(id) from autotag.tasks")
    error = {"kind": "transient", "code": "storage_error", "message": "503", "origin": "storage", "retry_after": 600}
    engine.sql(
        "select autotag.batch_answers(%s, %s, %s, %s)", WORKER, batch["batch"], batch["attempt"],
        json.dumps([{"task": task, "error": error}]),
    )  # fmt: skip
    for state, file in (("uploading", None), ("creating", "file-1")):
        engine.sql(
            "select autotag.batch_step(%s, %s, %s, %s, %s)", WORKER, batch["batch"], batch["attempt"], state, file
        )
    engine.sql(
        "select autotag.batch_submitted(%s, %s, %s, 'batch-1', 'validating', 'file-1')",
        WORKER,
        batch["batch"],
        batch["attempt"],
    )
    engine.set_time(120)
    engine.claim_batches()
    engine.sql("select autotag.record_poll(%s, %s)", WORKER, json.dumps([{"id": "batch-1", "status": "completed"}]))
    assert [b["state"] for b in engine.claim_batches()[0]] == ["harvesting"]


# -- costs that grow with what waits


def test_a_question_that_is_not_proven_reads_no_more_images(engine: Engine) -> None:
    """Every claim looks for an image that could try the question. Without an index, it would read all images while it
    holds the provider row."""
    engine.upload(100)
    engine.sql("update autotag.provider_limits set proven_at = null, probe_at = autotag.now() + interval '1 h'")
    scans = "select seq_scan from pg_stat_xact_all_tables where relid = 'autotag.tasks'::regclass"
    before = engine.sql(scans)
    with engine.connection.transaction():
        engine.claim_batches()
        engine.sql("select from autotag.claim(%s, 10, 1)", WORKER)
        engine.sql("select autotag.release_probe()")
        assert engine.sql(scans) == before


def test_a_single_call_in_flight_tries_the_question(engine: Engine) -> None:
    engine.upload(3)
    engine.upload(100)
    engine.sql("update autotag.provider_limits set proven_at = null, probe_at = null")
    assert engine.sql("select cardinality(tasks) from autotag.claim(%s, 10, 1)", WORKER) == [(1,)]
    engine.sql("update autotag.workspaces set queued = 0")
    assert engine.sql("select autotag.has_single_calls(), autotag.release_probe()") == [(True, False)]
    engine.sql("update autotag.tasks set worker_id = null where worker_id is not null")
    assert engine.sql("select autotag.has_single_calls()") == [(False,)]


@pytest.mark.parametrize(("images", "batches"), [(7, 3), (10, 10), (11, 4), (100, 7)])
def test_images_are_spread_evenly_over_batches_in_their_order(engine: Engine, images: int, batches: int) -> None:
    engine.sql(
        "update autotag.settings set realtime_max_images = 0, chunk_max_images = 0, batch_max_images = 0, batch_split_images = %s",
        -(-images // batches),
    )
    job = engine.upload(images)
    spread = """select array_agg(n order by o), bool_and(n = b), bool_and(lower > coalesce(before, 0)) from (
        select b.ordinal o, count(*) n, max(b.image_count) b, min(t.id) as lower, lag(max(t.id)) over (order by b.ordinal) as before
        from autotag.tasks t join autotag.batches b on b.id = t.batch_id where b.state = 'planned' group by 1) s"""
    [(sizes, counted, ordered)] = engine.sql(spread)
    assert (len(sizes), sum(sizes), max(sizes) - min(sizes) <= 1, counted, ordered) == (
        -(-images // -(-images // batches)),
        images,
        True,
        True,
        True,
    )
    engine.sql("update autotag.batches set state = 'cancelled'")
    engine.sql(
        "select autotag.place_in_batches(j, (select array_agg(id order by id) from autotag.tasks)) from autotag.jobs j where id = %s",
        job,
    )
    assert engine.sql(spread)[0][1:] == (True, True)
    assert sorted(engine.sql(spread)[0][0]) == sorted(sizes)


def test_many_images_are_placed_in_many_batches_at_once(engine: Engine) -> None:
    """50,000 images get a batch each. Comparing each image with each batch took hours, and the numbers overflowed an
    integer."""
    engine.sql("""update autotag.settings set realtime_max_images = 0, chunk_max_images = 0, batch_max_images = 0,
      batch_max_requests = 1""")
    engine.sql("set statement_timeout = '60 s'")
    job = engine.upload(50_000)
    engine.sql(
        "select autotag.place_in_batches(j, (select array_agg(id order by id) from autotag.tasks)) from autotag.jobs j where id = %s",
        job,
    )
    [(batch,)] = engine.sql("select id from autotag.batches where job_id = %s order by ordinal desc limit 1", job)
    engine.sql("update autotag.tasks set batch_id = %s where job_id = %s", batch, job)
    engine.sql("select autotag.split_batch(b, 50000, 'test') from autotag.batches b where id = %s", batch)
    assert engine.sql("select count(distinct batch_id) from autotag.tasks where job_id = %s", job) == [(50_000,)]


# -- single calls that would wait too long


def test_many_small_uploads_do_not_become_batches_that_wait_for_days(engine: Engine) -> None:
    """1,000 uploads of one image: single calls take half an hour, but 670 batches of one image would take three
    days."""
    for _ in range(1000):
        engine.upload(1)
    assert engine.sql("select count(*) from autotag.batches") == [(0,)]
    [(latest,)] = engine.sql("select max(extract(epoch from eta - autotag.now()))::float / 60 from autotag.jobs")
    assert latest < 40


def test_single_calls_become_batches_only_while_these_are_faster(engine: Engine) -> None:
    engine.sql("update autotag.provider_limits set blocked_until = autotag.now() + interval '2 h'")
    jobs = [engine.upload(1) for _ in range(40)]
    strategies = [engine.sql("select strategy from autotag.jobs where id = %s", job)[0][0] for job in jobs]
    assert strategies == ["batch"] * 20 + ["realtime"] * 20, "the batches of two hours, then single calls"


def test_waiting_calls_move_to_the_batch_api_only_while_it_is_faster(engine: Engine) -> None:
    """The day's requests are used up, and a limit of 240 a day is 10 an hour. Some calls move, and the others stay."""
    for _ in range(40):
        engine.upload(1)
    engine.sql(
        "update autotag.provider_limits set requests_per_day = 240, day_left = 0, refilled_at = autotag.now() + interval '11 min'"
    )
    engine.set_time(660)
    for number in range(1, 100):
        engine.sql("select from autotag.claim(%s, 10, %s)", WORKER, number)
    [(batches, wait)] = engine.sql(
        "select count(*), autotag.wait_for_day(autotag.refilled_provider(autotag.now()), 40) from autotag.batches"
    )
    assert 10 <= batches < 40, wait


def test_refused_calls_move_to_the_batch_api_while_batches_start_soon(engine: Engine) -> None:
    for _ in range(40):
        engine.upload(1)
    engine.set_time(660)
    engine.sql("""update autotag.provider_limits set limited_since = autotag.now() - interval '11 min', limited_at = autotag.now(),
      blocked_until = autotag.now() + interval '1 min'""")
    for number in range(1, 100):
        engine.sql("select from autotag.claim(%s, 10, %s)", WORKER, number)
    assert engine.sql("select count(*) from autotag.batches") == [(10,)], "an hour's"
