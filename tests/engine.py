"""The engine alone, without workers or servers: a test makes a worker's calls, under a clock that it sets."""

from __future__ import annotations

import uuid
from typing import Any

import psycopg

WORKER = uuid.UUID("99999999-0000-4000-8000-000000000001")


class Engine:
    """The engine with one worker, whose question is proven, under a clock that the test sets."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self.connection = connection
        self.claims = 0
        self.sql("update autotag.settings set test_clock = true, express_images = 0")
        self.set_time(0)
        self.sql("select autotag.register_worker(%s, 'test', autotag.schema_version(), true)", WORKER)
        self.sql("""update autotag.provider_limits set proven_at = '-infinity', tokens_per_image = 1000, output_tokens = 100,
              queued_batch_tokens = 1000000000""")
        self.sql("insert into public.workspaces (name) values ('w')")

    def sql(self, query: str, *values: object) -> list[Any]:
        cursor = self.connection.execute(query.encode(), values or None)
        return cursor.fetchall() if cursor.description else []

    def set_time(self, at: float) -> None:
        """Sets autotag's clock, in seconds; the worker stays alive."""
        self.sql(
            "select set_config('autotag.now', (timestamptz '2030-01-01' + make_interval(secs => %s))::text, false)", at
        )
        self.sql("update autotag.workers set lease_until = autotag.now() + interval '1 day'")

    def upload(self, images: int, workspace: str = "w") -> str:
        """Enqueues images of a workspace of this name, which has to be there."""
        [(job,)] = self.sql(
            """with added as (
              insert into public.assets (workspace_id, storage_path)
              select w.id, w.id || '/p' from public.workspaces w, generate_series(1, %s) where w.name = %s returning id)
            select (public.enqueue_tagging((select array_agg(id) from added))).job_id""", images, workspace,
        )  # fmt: skip
        return str(job)

    def claim_batches(self, slots: int = 4) -> tuple[list[dict[str, Any]], float | None]:
        """The batches of one claim, and in how many seconds the worker would claim again."""
        self.claims += 1
        [(batches, wait)] = self.sql(
            "select batches, wait from autotag.claim_batches(%s, %s, %s)", WORKER, slots, self.claims
        )
        return batches, wait

    def claim_all(self) -> tuple[int, int]:
        """Claims as a worker does, until it would wait. Returns how many claims that takes, and the batches that it got."""
        for claims in range(1, 1000):
            batches, wait = self.claim_batches()
            self.sql(
                "update autotag.batches set state = 'done', worker_id = null, reserved_tokens = 0 where worker_id is not null"
            )
            self.started += len(batches)
            if not batches and wait != 0:
                return claims, self.started
        raise AssertionError("the worker never waits")

    started = 0

    def due(self) -> int:
        [(due,)] = self.sql(
            "select count(*) from autotag.batches where state = 'planned' and not_before <= autotag.now()"
        )
        return int(due)
