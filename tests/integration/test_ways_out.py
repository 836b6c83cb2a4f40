"""Every state ends: no batch that is always refused or that no limit admits, and no upload without images, waits for
ever."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from lab.postgres import LocalPostgres

WORKER = uuid.UUID("99999999-0000-4000-8000-000000000001")
REFUSED = "Enqueued token limit reached. Please try again once batches end."


class Engine:
    """The engine with one worker, whose provider refuses batches, under a clock that the test sets."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._claims = 0
        self.sql("update autotag.settings set test_clock = true, express_images = 0, chunk_max_images = 10")
        self.set_time(0)
        self.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", WORKER)
        self.sql(
            "update autotag.provider_limits set proven_at = '-infinity', tokens_per_image = 1000, output_tokens = 100"
        )
        self.sql("insert into public.workspaces (name) values ('w')")

    def sql(self, query: str, *values: object) -> list[Any]:
        cursor = self._connection.execute(query.encode(), values or None)
        return cursor.fetchall() if cursor.description else []

    def set_time(self, at: float) -> None:
        self.sql(
            "select set_config('autotag.now', (timestamptz '2030-01-01' + make_interval(secs => %s))::text, false)", at
        )

    def upload(self, images: int) -> str:
        [(job,)] = self.sql(
            """with added as (
              insert into public.assets (workspace_id, storage_path)
              select w.id, w.id || '/p' from public.workspaces w, generate_series(1, %s) returning id)
            select (public.enqueue_tagging((select array_agg(id) from added))).job_id""", images,
        )  # fmt: skip
        return str(job)

    def submit(self) -> list[str]:
        """Claims batches and submits them. Returns OpenAI's ids of all batches in flight."""
        self._claims += 1
        [(claimed,)] = self.sql("select batches from autotag.claim_batches(%s, 100, %s)", WORKER, self._claims)
        for batch in claimed:
            self.sql(
                "update autotag.batches set state = 'submitted', worker_id = null, submitted_at = autotag.now(), progress_at = autotag.now(),"
                " openai_status = 'validating', input_file_id = 'file-' || id, openai_batch_id = 'batch-' || id || attempt where id = %s",
                batch["batch"],
            )
        return [
            i for (i,) in self.sql("select openai_batch_id from autotag.batches where state = 'submitted' order by 1")
        ]

    def poll(self, ids: list[str], **status: object) -> None:
        self.sql("update autotag.workers set poll_assigned_at = autotag.now()")
        self.sql("select autotag.record_poll(%s, %s)", WORKER, json.dumps([{"id": i, **status} for i in ids]))

    def refuse(self, ids: list[str], error: str = REFUSED) -> None:
        self.poll(ids, status="failed", error_code="token_limit_exceeded", error=error)

    def planned(self) -> list[int]:
        """The images of each planned batch, in order."""
        return [n for (n,) in self.sql(
            "select image_count - express_count from autotag.batches where state = 'planned' order by ordinal"
        )]  # fmt: skip


@pytest.fixture
def engine(postgres: LocalPostgres, database: str) -> Iterator[Engine]:
    with psycopg.connect(postgres.url("supabase_admin", database), autocommit=True) as connection:
        yield Engine(connection)


def test_a_batch_that_is_always_refused_gets_smaller_and_ends_as_single_calls(engine: Engine) -> None:
    engine.upload(40)
    sizes = []
    for minute in range(60):
        engine.set_time(70 * minute)
        engine.refuse(engine.submit())
        sizes.append(max(engine.planned(), default=0))
        if not engine.planned():
            break
    assert sizes[:3] == [40, 40, 20], "after three refusals it is halved"
    assert sizes[-1] == 0
    assert 10 in sizes
    assert minute >= 30 * 60 // 70, "single calls cost twice as much, so they are the last resort (batch_patience)"
    assert engine.sql("select count(*) from autotag.tasks where lane = 'realtime' and retry_at is not null") == [(40,)]
    [(reason,)] = engine.sql("select fallback from autotag.jobs")
    assert reason == "The AI service did not accept a batch of these images, so they are sent as single calls."
    # its files are deleted at OpenAI
    assert (
        engine.sql(
            "select count(*) from autotag.batches where input_file_id is not null and state in ('done', 'cancelled')"
        )[0][0]
        > 3
    )


def test_a_batch_that_is_refused_while_others_are_in_the_queue_waits_as_it_is(engine: Engine) -> None:
    engine.sql("update autotag.settings set batch_max_images = 40, batch_split_images = 20")
    engine.upload(60)
    for minute in range(1, 10):
        ids = engine.submit()
        assert len(ids) == 3
        [(running,)] = engine.sql("select openai_batch_id from autotag.batches where ordinal = 1")
        engine.refuse([i for i in ids if i != running])
        assert engine.planned() == [20, 20]
        engine.set_time(70 * minute)


def test_a_limit_that_the_provider_states_is_learned(engine: Engine) -> None:
    engine.upload(40)
    engine.refuse(
        engine.submit(),
        "Enqueued token limit reached for m in organization org-x. Limit: 15,000 enqueued tokens. Please try again.",
    )
    assert engine.sql("select queued_batch_tokens from autotag.provider_limits") == [(15_000,)]
    engine.sql("select autotag.tick()")
    assert max(engine.planned()) <= 15
    assert sum(engine.planned()) == 40
    engine.refuse(engine.submit())
    assert engine.sql("select queued_batch_tokens from autotag.provider_limits") == [(15_000,)], (
        "no figure, nothing learned"
    )


@pytest.mark.parametrize("limit", [
    "update autotag.settings set batch_images_per_hour = 15", "update autotag.settings set batch_max_requests = 15",
    "update autotag.provider_limits set queued_batch_tokens = 15000",
    "insert into public.workspace_rate_limits (workspace_id, request_type, max_units) select id, 'batch', 15 from public.workspaces",
])  # fmt: skip
def test_a_limit_lowered_below_a_planned_batch_splits_it(engine: Engine, limit: str) -> None:
    engine.upload(40)
    engine.sql(limit)
    if "hour" in limit or "max_units" in limit:
        assert engine.submit() == [], "no window admits it"
    engine.sql("select autotag.tick()")
    assert [n <= 15 for n in engine.planned()] == [True, True, True]
    assert sum(engine.planned()) == 40
    assert engine.sql(
        "select count(*) from autotag.tasks t join autotag.batches b on b.id = t.batch_id where b.state = 'planned'"
    ) == [(40,)]
    assert engine.submit(), "the first part goes on"


def test_a_split_batch_counts_its_images_once_in_the_window(engine: Engine) -> None:
    engine.sql("update autotag.settings set batch_images_per_hour = 40")
    engine.upload(40)
    for minute in range(3):
        engine.set_time(70 * minute)
        engine.refuse(engine.submit())
    assert engine.planned() == [20, 20]
    engine.set_time(300)
    assert len(engine.submit()) == 2, "both parts fit into the hour that had admitted the whole"
    [(requests, units)] = engine.sql(
        "select requests, units from public.workspace_rate_limits where request_type = 'batch'"
    )
    assert (sum(requests), sum(units)) == (2, 40)


def test_a_batch_that_never_ends_counts_as_lost_after_two_days(engine: Engine) -> None:
    engine.sql("update autotag.settings set realtime_max_wait = '1 s', realtime_requests_per_minute = 1")
    engine.upload(40)
    ids = engine.submit()
    engine.set_time(24 * 3600)
    engine.poll(ids, status="validating")
    assert engine.planned() == []
    engine.set_time(47 * 3600)
    engine.poll(ids, status="validating")
    assert sum(engine.planned()) == 40


def test_an_upload_without_images_ends(engine: Engine) -> None:
    job = engine.upload(3)
    engine.sql("delete from autotag.tasks where job_id = %s", job)
    engine.sql("select autotag.tick()")
    assert engine.sql("select failed, finished_at is not null from autotag.jobs") == [(3, True)]


def test_a_queue_whose_job_was_deleted_repairs_itself(engine: Engine) -> None:
    job = engine.upload(3)
    engine.sql("select from autotag.claim(%s, 1, 1)", WORKER)
    engine.sql("delete from autotag.jobs where id = %s", job)
    other = engine.upload(2)
    for number in range(2, 6):
        engine.sql("select from autotag.claim(%s, 10, %s)", WORKER, number)
    assert engine.sql("select job_id::text, count(*) from autotag.tasks where worker_id is not null group by 1") == [
        (other, 2)
    ]
    assert engine.sql("select queued from autotag.workspaces") == [(0,)]


def test_what_waits_without_a_time_has_a_reason(engine: Engine) -> None:
    engine.sql(
        "insert into public.workspace_rate_limits (workspace_id, request_type, max_units) select id, 'realtime', 500 from public.workspaces"
    )
    engine.upload(3)
    engine.sql("select from autotag.claim(%s, 10, 1)", WORKER)
    [(waiting,)] = engine.sql("select autotag.status() -> 'waiting'")
    assert [(w["kind"], w["images"], w["until"], w["reason"]) for w in waiting] == [
        ("workspace", 3, None, "One image reserves more than the workspace's 500 tokens a minute.")
    ]
    [(finding,)] = engine.sql("select autotag.diagnose_waiting()")
    assert finding["level"] == "warning"
    engine.sql("update public.workspace_rate_limits set max_units = 5000")
    engine.sql("select autotag.tick()")
    engine.sql("select from autotag.claim(%s, 10, 2)", WORKER)
    assert engine.sql("select autotag.status() -> 'waiting'") == [([],)]


def test_images_of_a_batch_become_single_calls_in_a_workspace_that_had_none(engine: Engine) -> None:
    engine.upload(40)
    engine.sql("select from autotag.claim(%s, 10, 1)", WORKER)  # it has seen the upload's queue, which is empty
    engine.sql(
        "update autotag.tasks set lane = 'realtime', batch_id = null, retry_at = autotag.now() where id = (select min(id) from autotag.tasks)"
    )
    for number in (2, 3):
        engine.sql("select from autotag.claim(%s, 10, %s)", WORKER, number)
    assert engine.sql("select count(*) from autotag.tasks where worker_id is not null") == [(1,)]


def test_a_batch_that_cannot_be_read_or_never_ends_is_over_after_two_days(engine: Engine) -> None:
    """Then its images are sent again, whatever its polls have reported."""
    engine.upload(40)
    [batch] = engine.submit()
    for hour in range(0, 47, 4):
        engine.set_time(3600 * hour)
        engine.poll([batch], status="unread" if hour % 8 else "validating")
        assert engine.sql("select state from autotag.batches") == [("submitted",)]
        engine.poll([batch], status="in_progress", total=40, done=1)  # such a provider changes it at every poll
    engine.set_time(3600 * 46)
    engine.poll([batch], status="unread")
    assert engine.sql("select state, error from autotag.batches where openai_batch_id = %s", batch) == [
        ("done", "OpenAI has not finished this batch within two days.")
    ]
    assert engine.sql("select failures, count(*) from autotag.tasks group by 1") == [(1, 40)]


def test_cancellations_are_few_at_a_time_and_of_all_workspaces(engine: Engine) -> None:
    """Batches that the provider is cancelling already are left out."""
    engine.sql(
        "insert into autotag.jobs (workspace_id, strategy, image_count, created_at)"
        " select gen_random_uuid(), 'batch', 5000, autotag.now() from generate_series(1, 2)"
    )
    engine.sql(
        "insert into autotag.batches (job_id, workspace_id, ordinal, image_count, created_at, state, openai_batch_id,"
        "  openai_status, submitted_at, cancel_requested)"
        " select j.id, j.workspace_id, n, 10, autotag.now(), 'submitted', j.id || '-' || n,"
        "  case when n % 2 = 0 then 'cancelling' else 'in_progress' end, autotag.now(), j.id = first.id or n < 8"
        " from (select id from autotag.jobs limit 1) first, autotag.jobs j, generate_series(1, 1000) n"
    )
    [(cancel,)] = engine.sql("select autotag.take_cancellations(false, autotag.now())")
    counts = engine.sql(
        "select openai_status, count(*) from autotag.batches where openai_batch_id in"
        " (select jsonb_array_elements_text(%s)) group by job_id, 1 order by 2", json.dumps(cancel),
    )  # fmt: skip
    assert counts == [("in_progress", 4), ("in_progress", 96)]
    [(more,)] = engine.sql("select autotag.take_cancellations(false, autotag.now())")
    assert not set(cancel) & set(more), "each once …"
    [(again,)] = engine.sql("select autotag.take_cancellations(true, autotag.now())")
    assert set(cancel) & set(again), "… and again with a poll"


class Crew:
    """Workers of the engine, of which the first may hold an image."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.others = [uuid.uuid4(), uuid.uuid4()]
        engine.sql("update autotag.settings set lease = '60 s'")
        for other in self.others:
            engine.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", other)
        engine.upload(1)
        assert engine.sql("select tasks from autotag.claim(%s, 1, 1)", WORKER) != [([],)]

    def beat(self, worker: uuid.UUID) -> None:
        """Sends a heartbeat, and runs the ticks that follow."""
        [(alive, due)] = self.engine.sql("select alive, tick_due from autotag.heartbeat(%s, '{1}', '{0}')", worker)
        assert alive
        if due:
            self.engine.sql("select autotag.tick_if_due()")
        self.engine.sql("select autotag.tick()")  # pg_cron

    def holds(self) -> bool:
        """Whether the first worker still has its image."""
        return self.engine.sql("select failures from autotag.tasks where worker_id is not null") == [(0,)]


def test_a_worker_that_stops_beating_loses_its_image_when_its_lease_ends(engine: Engine) -> None:
    crew = Crew(engine)
    for at in (20, 40, 59):
        engine.set_time(at)
        crew.beat(crew.others[0])
        assert crew.holds()
    engine.set_time(61)
    crew.beat(crew.others[0])
    assert not crew.holds()
    assert engine.sql("select failures from autotag.tasks") == [(1,)]


@pytest.mark.parametrize("outage", [55, 61, 200, 3600, 40_000])
def test_while_nobody_could_beat_nobody_is_taken_for_dead(engine: Engine, outage: int) -> None:
    """After an outage of the database, the first worker that sends a heartbeat does not take the others' images. They
    get one more lease."""
    crew = Crew(engine)
    engine.set_time(15)
    engine.sql("select autotag.heartbeat(%s, '{1}', '{0}')", crew.others[0])  # so the first worker's lease ends first
    engine.set_time(15 + outage / 2)
    engine.sql("select autotag.tick()")  # by pg_cron, if only the network is down
    engine.set_time(15 + outage)
    crew.beat(crew.others[0])
    assert crew.holds()
    engine.set_time(15 + outage + 20)
    crew.beat(crew.others[1])
    for later in (20, 40, 61, 70, 95):
        engine.set_time(15 + outage + later)
        crew.beat(WORKER)
        crew.beat(crew.others[0])
        assert crew.holds(), "it has sent a heartbeat within its lease"
        assert crew.engine.sql("select count(*) from autotag.workers where id = %s", crew.others[1]) == [
            (0 if later > 80 else 1,)
        ]


def test_the_lease_of_the_only_worker_ends_when_another_has_come_for_a_lease(engine: Engine) -> None:
    crew = Crew(engine)
    engine.sql("delete from autotag.workers where id = any (%s)", crew.others)
    engine.set_time(100)
    engine.sql("select autotag.tick()")
    engine.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", crew.others[0])
    for at in (120, 140, 159):
        engine.set_time(at)
        crew.beat(crew.others[0])
        assert crew.holds()
    engine.set_time(161)
    crew.beat(crew.others[0])
    assert not crew.holds()


def test_without_any_worker_what_they_held_is_free_after_a_day(engine: Engine) -> None:
    crew = Crew(engine)
    engine.set_time(100_000)
    for _ in range(3):
        engine.sql("select autotag.tick()")
    assert not crew.holds()
    assert engine.sql("select 1 from autotag.workers") == []
