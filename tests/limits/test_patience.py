"""Within a workspace, small uploads pass large ones, but no upload is passed for longer than upload_patience."""

from __future__ import annotations

import math
import random
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field

import psycopg
import pytest

from lab.postgres import LocalPostgres

WORKER = uuid.UUID("99999999-0000-4000-8000-000000000001")
RATE = 30  # images a minute that the workspace's window admits
PATIENCE = 120  # seconds
MINUTE = 60


@dataclass
class Upload:
    """One upload: the second at which it arrived, and the seconds at which its images were released."""

    images: int
    came: float
    released: list[float] = field(default_factory=list)

    def left(self, at: float) -> int:
        return self.images - sum(1 for when in self.released if when <= at)


class Workspace:
    """One workspace with the engine's own claims and a clock that the test sets."""

    def __init__(self, connection: psycopg.Connection[tuple[object, ...]]) -> None:
        self._sql = connection
        self._claims = 0
        self.uploads: dict[uuid.UUID, Upload] = {}
        self._sql.execute(
            """update autotag.settings set test_clock = true, realtime_tokens_per_minute = 1000000000, realtime_max_wait = '1 day';
            update autotag.provider_limits set requests_per_minute = 1000000, tokens_per_minute = 1000000000, requests_left = 1000000,
              tokens_left = 1000000000, requests_per_day = null;
            insert into public.workspaces (name) values ('w')"""
        )
        self.set_time(0)
        self._sql.execute("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", (WORKER,))
        self._sql.execute("update autotag.provider_limits set proven_at = '-infinity'")

    def set_time(self, at: float) -> None:
        self._sql.execute(
            "select set_config('autotag.now', (timestamptz '2030-01-01' + make_interval(secs => %s))::text, false)",
            (at,),
        )

    def upload(self, images: int, at: float) -> Upload:
        row = self._sql.execute(
            """with added as (
              insert into public.assets (workspace_id, storage_path)
              select w.id, w.id || '/p' from public.workspaces w, generate_series(1, %s) returning id)
            select (public.enqueue_tagging((select array_agg(id) from added))).job_id""",
            (images,),
        ).fetchone()
        assert row is not None
        upload = self.uploads[uuid.UUID(str(row[0]))] = Upload(images, at)
        return upload

    def claim(self, at: float) -> None:
        self._claims += 1
        self._sql.execute("select from autotag.claim(%s, 1000, %s)", (WORKER, self._claims))
        for (job,) in self._sql.execute(
            "select t.job_id from autotag.tasks t where t.worker_id = %s and t.claim = %s", (WORKER, self._claims)
        ).fetchall():
            self.uploads[uuid.UUID(str(job))].released.append(at)

    def run(self, arrivals: dict[int, list[int]], until: int) -> None:
        """Claims once a second, as a woken worker would. Uploads arrive at the given seconds."""
        for second in range(until):
            self.set_time(second)
            for images in arrivals.get(second, []):
                self.upload(images, second)
            self.claim(second)


@pytest.fixture
def workspace(postgres: LocalPostgres, database: str) -> Iterator[Workspace]:
    with psycopg.connect(postgres.url("supabase_admin", database), autocommit=True) as connection:
        yield Workspace(connection)


def test_an_upload_of_40_is_not_passed_by_single_images_for_ever(workspace: Workspace) -> None:
    # A single image every two seconds uses up the whole window.
    arrivals = {second: [1] for second in range(0, 600, 2)}
    arrivals[0] = [40, 1]
    workspace.run(arrivals, 360)
    upload = next(iter(workspace.uploads.values()))
    assert upload.left(360) == 0, f"{upload.left(360)} of 40 images still wait"
    assert upload.released[-1] <= PATIENCE + MINUTE * (math.ceil(40 / RATE) + 1)
    passed = [u for u in workspace.uploads.values() if u.images == 1 and u.left(PATIENCE - 1) == 0]
    assert len(passed) > 25, "before that, small uploads pass it"
    assert upload.left(PATIENCE - 1) > 0


@pytest.mark.parametrize("seed", range(4))
def test_no_upload_waits_longer_than_the_patience_and_the_work_before_it(workspace: Workspace, seed: int) -> None:
    chance = random.Random(seed)
    arrivals: dict[int, list[int]] = {}
    for _ in range(chance.randrange(20, 60)):
        images = chance.choice((1, 1, 2, 5, 6, 20, 40, 50))
        arrivals.setdefault(chance.randrange(300), []).append(images)
    work = sum(sum(images) for images in arrivals.values())
    workspace.run(arrivals, 300 + MINUTE * (work // RATE + 3))
    for upload in workspace.uploads.values():
        patient_until = upload.came + PATIENCE
        # what came before it, or with it, and still waits then
        older = sum(u.left(patient_until) for u in workspace.uploads.values() if u.came <= upload.came)
        bound = patient_until + MINUTE * (math.ceil(older / RATE) + 1)
        assert upload.left(bound) == 0, f"an upload of {upload.images} that came at {upload.came}: {upload.released}"
