"""The death of a worker fails no image that it merely held, but an image that kills its workers fails in the end."""

from __future__ import annotations

import random
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from engine import Engine
from lab.postgres import LocalPostgres

LEASE = 61  # seconds
ANOTHER = uuid.UUID("99999999-0000-4000-8000-00000000000b")


class Crashing(Engine):
    """The engine with workers that start and die."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        super().__init__(connection)
        self.at, self.worker, self.batch_claims = 0.0, uuid.UUID(int=0), 0

    def start(self) -> None:
        self.worker, self.claims, self.batch_claims = uuid.uuid4(), 0, 0
        self.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", self.worker)
        self.sql("update autotag.provider_limits set proven_at = '-infinity'")

    def crash(self) -> None:
        """Ends the worker's lease, as after its death. Another worker still sends heartbeats, so it is no outage of the
        database."""
        self.sql("select autotag.register_worker(%s, 'another', autotag.schema_version(), true)", ANOTHER)
        self.sql("update autotag.workers set resumed_at = '-infinity'")
        self.sql("update autotag.workers set lease_until = autotag.now() - interval '1 s' where id = %s", self.worker)
        self.sql("select autotag.tick()")
        self.sql("select autotag.tick()")

    def pass_time(self, seconds: float) -> None:
        self.at += seconds
        self.set_time(self.at)

    def claim(self) -> list[int]:
        """Claims images, which the worker holds together with its other ones."""
        self.claims += 1
        [(tasks,)] = self.sql("select tasks from autotag.claim(%s, 100, %s)", self.worker, self.claims)
        return list(tasks)

    def claim_of_batches(self) -> list[dict[str, Any]]:
        self.batch_claims += 1
        [(batches,)] = self.sql("select batches from autotag.claim_batches(%s, 4, %s)", self.worker, self.batch_claims)
        return list(batches)

    def finish(self, tasks: list[int]) -> None:
        """Reports these images as tagged."""
        self.sql("delete from autotag.tasks where id = any (%s)", tasks)


@pytest.fixture
def engine(postgres: LocalPostgres, database: str) -> Iterator[Crashing]:
    with psycopg.connect(postgres.url("supabase_admin", database), autocommit=True) as connection:
        engine = Crashing(connection)
        engine.sql("""update autotag.settings set chunk_size = 1000, chunk_delay = '0', realtime_requests_per_minute = 100000,
          realtime_tokens_per_minute = 1000000000, realtime_max_images = 50""")
        engine.sql("""update autotag.provider_limits set requests_per_minute = 1000000, tokens_per_minute = 1000000000,
          requests_left = 1000000, tokens_left = 1000000000, requests_per_day = null""")
        yield engine


def failed(engine: Engine) -> list[int]:
    return [task for (task,) in engine.sql(
        "select task_id from autotag.unstored where error_code = 'worker_lost' order by 1")]  # fmt: skip


@pytest.mark.parametrize("killers", [1, 3])
def test_an_image_that_kills_its_worker_fails_and_no_other_does(engine: Crashing, killers: int) -> None:
    """A call takes 4 seconds; a worker dies in the second in which it gets a killer, with all that it holds."""
    engine.sql("select setseed(0.5)")
    engine.upload(50)
    tasks = [task for (task,) in engine.sql("select id from autotag.tasks order by id")]
    bad = set(random.Random(1).sample(tasks, killers))
    held: dict[int, float] = {}
    engine.start()
    for _ in range(3000):
        if len(failed(engine)) == killers:
            break
        for task in engine.claim():
            held[task] = engine.at
        if bad & held.keys():
            engine.pass_time(LEASE)
            engine.crash()
            held = {}
            engine.start()
            continue
        done = [task for task, since in held.items() if engine.at - since >= 4]
        engine.finish(done)
        held = {task: since for task, since in held.items() if task not in done}
        engine.pass_time(1)
    assert failed(engine) == sorted(bad)


def test_workers_that_are_killed_again_and_again_fail_no_image(engine: Crashing) -> None:
    """Nine workers in a row are killed with everything that they hold, as on a machine with too little memory."""
    engine.sql("select setseed(0.5)")
    engine.upload(50)
    for _ in range(9):
        engine.start()
        for _ in range(60):
            engine.claim()
            engine.pass_time(1)
        engine.crash()
    assert failed(engine) == []
    [(failures,)] = engine.sql("select max(failures) from autotag.tasks")
    assert failures < 4, "they take turns"


def test_an_image_that_was_held_alone_is_the_one(engine: Crashing) -> None:
    engine.upload(1)
    for _ in range(8):
        assert failed(engine) == []
        engine.start()
        assert len(engine.claim()) == 1
        engine.pass_time(LEASE)
        engine.crash()
        engine.pass_time(LEASE)
    assert len(failed(engine)) == 1


def test_images_that_were_in_two_crashes_are_held_one_at_a_time(engine: Crashing) -> None:
    """So images that crash a worker only together are tagged. Other images do not wait for them."""
    engine.upload(5)
    for _ in range(2):
        engine.start()
        assert len(engine.claim()) == 5
        engine.pass_time(LEASE)
        engine.crash()
    engine.upload(3)
    engine.start()
    tagged: list[int] = []
    for _ in range(100):
        tasks = engine.claim()
        assert len(tasks) <= (1 if tagged else 4)
        engine.finish(tasks)
        tagged += tasks
        engine.pass_time(1)
    assert len(tagged) == 8
    assert failed(engine) == []


def test_a_worker_that_stops_or_loses_a_reply_is_no_crash(engine: Crashing) -> None:
    engine.upload(3)
    engine.start()
    engine.claim()
    engine.sql("select autotag.release_worker(%s)", engine.worker)
    assert engine.sql("select distinct failures, crashes from autotag.tasks") == [(0, None)]
    engine.start()
    engine.claim()
    engine.sql("select autotag.release_lost(%s, '{}', '{}')", engine.worker)
    assert engine.sql("select distinct failures, crashes from autotag.tasks") == [(1, None)]


def test_a_batch_that_kills_three_workers_goes_on_as_single_calls(engine: Crashing) -> None:
    job = engine.upload(60)
    for crashes in (1, 2, 3):
        engine.start()
        [batch] = engine.claim_of_batches()
        assert batch["state"] == "preparing", crashes
        engine.pass_time(LEASE)
        engine.crash()
    assert engine.sql("select state, reserved_tokens from autotag.batches") == [("done", 0)]
    assert engine.sql("select lane, failures, count(*) from autotag.tasks group by 1, 2") == [("realtime", 0, 60)]
    [(fallback,)] = engine.sql("select fallback from autotag.jobs where id = %s", job)
    assert fallback == "Workers stopped while they prepared a batch of these images, so they are sent as single calls."
    engine.start()
    assert len(engine.claim()) == 60


def test_a_batch_whose_upload_is_held_waits_for_nobody(
    engine: Crashing, postgres: LocalPostgres, database: str
) -> None:
    engine.upload(60)
    engine.sql("update autotag.batches set crashes = 2")
    engine.start()
    assert len(engine.claim_of_batches()) == 1
    with psycopg.connect(postgres.url("supabase_admin", database)) as other:
        other.execute("select from autotag.jobs for update")
        engine.sql("set lock_timeout = '10 s'")
        engine.crash()
        assert engine.sql("select state, worker_id, crashes from autotag.batches") == [("preparing", None, 3)]
    engine.start()
    assert len(engine.claim_of_batches()) == 1
    engine.crash()
    assert engine.sql("select state from autotag.batches") == [("done",)]
