"""Every call of the database that a worker makes.

Each function is one call of ``autotag.*``; what it does stands at its definition in the migrations. Calls
that a broken connection or a deadlock interrupts are made again until they work, because what they report
was paid for. They are idempotent: a report for what is settled already is refused. The two claims are not;
after one that failed, `Database.release_unacknowledged` gives back what was claimed without the worker ever hearing
of it.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import orjson
import psycopg
import structlog
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb, set_json_dumps, set_json_loads
from psycopg_pool import AsyncConnectionPool
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from autotag.db.listening import KEEPALIVES, MAX_RETRY_DELAY
from autotag.db.messages import (
    Batch,
    BatchAnswer,
    BatchClaim,
    Broadcast,
    Claim,
    DatabaseSettings,
    ErrorReport,
    Image,
    Metrics,
    NotHeld,
    ObservedLimits,
    PolledBatch,
    ProviderFacts,
    Question,
    Refused,
    Registered,
    Report,
    Sent,
    Settled,
    StageReport,
    Submitted,
    VersionsDiffer,
    make,
)  # fmt: skip
from autotag.redact import safe_message

POOL_SIZE = 4  # claim, settle, stages and the batch lane seldom meet

log = structlog.get_logger(__name__)

_TRANSIENT = (psycopg.OperationalError, psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)

set_json_dumps(orjson.dumps)
set_json_loads(orjson.loads)


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("database_retry", attempt=state.attempt_number, error=safe_message(error) if error else "")


class Database:
    """The calls, over a small pool of connections, in the name of one worker."""

    def __init__(self, url: str, worker: uuid.UUID, *, prepare: bool = True) -> None:
        """Args:
        url: connection URL.
        worker: the worker's id.
        prepare: use prepared statements (impossible behind a transaction pooler).
        """
        self.worker = worker
        self._registered: Registered | None = None
        self._question: Question | None = None
        self._pool = AsyncConnectionPool(
            url,
            min_size=1,
            max_size=POOL_SIZE,
            open=False,
            kwargs={
                "autocommit": True,
                "row_factory": dict_row,
                "application_name": "autotag",
                "prepare_threshold": 5 if prepare else None,
                **KEEPALIVES,
            },
        )

    def _settings(self, known: Question | None, changed: dict[str, Any] | None) -> DatabaseSettings:
        """The settings for what a claim released; see `_asked`."""
        if self._registered is None:
            raise RuntimeError("A worker registers before it claims.")
        return DatabaseSettings(
            self._asked(known, changed), self._registered.lease_seconds, self._registered.batch_max_bytes
        )

    def _asked(self, known: Question | None, changed: dict[str, Any] | None) -> Question:
        """What to ask about what a claim released: what the database says, or what was known when the claim was sent.
        The other lane may have learned of a newer question meanwhile."""
        if changed is None and known is not None:
            return known
        question = make(Question, changed or {})
        if self._question is None or self._question.version < question.version:
            self._question = question
            log.info("question_changed", **asdict(question))
        return question

    async def open(self) -> None:
        """Connects.

        Raises:
            psycopg_pool.PoolTimeout: no connection within 30 seconds.
        """
        await self._pool.open(wait=True)

    async def close(self) -> None:
        await self._pool.close()

    async def _call(self, statement: str, *arguments: object) -> dict[str, Any]:
        """One call; its row, with a broken connection or a deadlock met by another try."""
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(_TRANSIENT),
            wait=wait_random_exponential(0.1, max=MAX_RETRY_DELAY),
            before_sleep=_log_retry,
        ):
            with attempt:
                return await self._once(statement, *arguments)
        raise AssertionError("unreachable: it is tried until it works")

    async def _once(self, statement: str, *arguments: object) -> dict[str, Any]:
        async with self._pool.connection() as connection:
            try:
                cursor = await connection.execute(statement, arguments)
            except psycopg.DatabaseError as error:
                if error.sqlstate == "PT409":
                    raise NotHeld(str(error)) from None
                if error.sqlstate == "PT426":
                    raise VersionsDiffer(str(error.diag.message_primary), str(error.diag.message_hint)) from None
                raise
            return cast("dict[str, Any]", await cursor.fetchone())

    async def register(self, host: str, version: str, listening: bool, base_url: str, fingerprint: str) -> Registered:
        """Introduces the worker, at the start and after its lease has run out. Claims come after it.

        Args:
            host: the machine's name, for people.
            version: of this package.
            listening: whether notifications reach it.
            base_url: whom it asks.
            fingerprint: with which key (`provider.fingerprint`).

        Raises:
            VersionsDiffer: worker and schema do not fit.
        """
        row = await self._call(
            "select autotag.register_worker(%s, %s, %s, %s, %s, %s) as settings",
            self.worker, host, version, listening, base_url, fingerprint,
        )  # fmt: skip
        self._registered = make(Registered, row["settings"])
        return self._registered

    async def heartbeat(self) -> bool:
        """False when the lease had run out: the worker has to register again. Not tried again by itself.

        Raises:
            VersionsDiffer: the schema has been upgraded.
        """
        return bool((await self._once("select autotag.heartbeat(%s) as alive", self.worker))["alive"])

    async def release(self) -> int:
        return int((await self._call("select autotag.release_worker(%s) as n", self.worker))["n"])

    async def release_unacknowledged(
        self, *, tasks: Sequence[int] | None = None, batches: Sequence[str] | None = None
    ) -> None:
        """Gives back what this worker holds besides these tasks or these batches; None leaves that kind alone."""
        await self._call(
            "select autotag.release_unacknowledged(%s, %s::bigint[], %s::uuid[])", self.worker, tasks, batches
        )

    async def claim(self, slots: int) -> Claim:
        """Not tried again by itself: after an error call `release_unacknowledged`."""
        known = self._question
        row = await self._once(
            "select tasks, wait, bound, question from autotag.claim(%s, %s, %s)", self.worker, slots, _version(known)
        )
        images = [make(Image, task) for task in row["tasks"]]
        return Claim(images, row["wait"], row["bound"], self._settings(known, row["question"]))

    async def report_stages(self, stages: list[StageReport], sent: Sent | None) -> None:
        await self._call(
            "select autotag.report_stages(%s, %s, %s)", self.worker, Jsonb(stages), Jsonb(sent) if sent else None
        )

    async def settle(self, reports: list[Report], seen: ObservedLimits | None) -> Settled:
        row = await self._call(
            "select autotag.settle(%s, %s, %s) as told", self.worker, Jsonb(reports), Jsonb(seen) if seen else None
        )
        return make(Settled, row["told"])

    async def claim_batches(self, slots: int) -> BatchClaim:
        """Not tried again by itself: after an error call `release_unacknowledged`."""
        known = self._question
        row = await self._once(
            "select c.* from autotag.claim_batches(%s, %s, %s) c", self.worker, slots, _version(known)
        )
        return BatchClaim(
            batches=[make(Batch, batch) for batch in row["batches"]],
            wait=row["wait"],
            poll=[make(Submitted, batch) for batch in row["poll"] or []],
            cancel=row["cancel"] or [],
            files=row["files"],
            settings=self._settings(known, row["question"]),
            look_up=row["look_up"],
        )

    async def batch_images(self, batch: Batch, after: int, limit: int) -> list[Image]:
        row = await self._call(
            "select autotag.batch_images(%s, %s, %s, %s, %s) as page",
            self.worker, batch.batch, batch.attempt, after, limit,
        )  # fmt: skip
        return [make(Image, image) for image in row["page"]]

    async def batch_step(self, batch: Batch, state: str, input_file_id: str | None = None) -> None:
        await self._call(
            "select autotag.batch_step(%s, %s, %s, %s, %s)",
            self.worker, batch.batch, batch.attempt, state, input_file_id,
        )  # fmt: skip

    async def batch_split(self, batch: Batch, last_task: int) -> None:
        await self._call(
            "select autotag.batch_split(%s, %s, %s, %s)", self.worker, batch.batch, batch.attempt, last_task
        )

    async def batch_submitted(self, batch: Batch, openai_batch_id: str, status: str, input_file_id: str) -> None:
        await self._call(
            "select autotag.batch_submitted(%s, %s, %s, %s, %s, %s)",
            self.worker, batch.batch, batch.attempt, openai_batch_id, status, input_file_id,
        )  # fmt: skip

    async def report_batch_failure(self, batch: Batch, error: ErrorReport) -> None:
        await self._call(
            "select autotag.report_batch_failure(%s, %s, %s, %s)", self.worker, batch.batch, batch.attempt, Jsonb(error)
        )

    async def record_poll(self, seen: list[PolledBatch]) -> None:
        await self._call("select autotag.record_poll(%s, %s)", self.worker, Jsonb(seen))

    async def batch_answers(self, batch: Batch, answers: list[BatchAnswer]) -> Settled:
        """How many images have ended by that; the others are noted or were known."""
        row = await self._call(
            "select autotag.batch_answers(%s, %s, %s, %s) as told",
            self.worker, batch.batch, batch.attempt, Jsonb(answers),
        )  # fmt: skip
        return make(Settled, row["told"])

    async def provider_checked(self, facts: ProviderFacts) -> str | None:
        """Tells what the provider said of the model; a sentence for the log when the model's end is near."""
        row = await self._call("select autotag.provider_checked(%s, %s) as notice", self.worker, Jsonb(facts))
        return cast("str | None", row["notice"])

    async def report_poll_failure(self, error: ErrorReport) -> None:
        await self._call("select autotag.report_poll_failure(%s, %s)", self.worker, Jsonb(error))

    async def files_deleted(self, files: Sequence[str]) -> None:
        await self._call("select autotag.files_deleted(%s, %s::text[])", self.worker, list(files))

    async def batch_finish(self, batch: Batch) -> None:
        await self._call("select autotag.batch_finish(%s, %s, %s)", self.worker, batch.batch, batch.attempt)

    async def receive_webhook(self, webhook_id: str, event_type: str, openai_batch_id: str) -> str:
        """``accepted``, ``replayed``, ``unknown`` or ``ignored``.

        Raises:
            Refused: an id that no delivery or no batch has.
        """
        try:
            row = await self._call(
                "select autotag.receive_webhook(%s, %s, %s) as result", webhook_id, event_type, openai_batch_id
            )
        except psycopg.DatabaseError as error:
            if error.sqlstate != "PT400":
                raise
            raise Refused(str(error.diag.message_primary), error.diag.message_hint, None) from None
        return str(row["result"])

    async def metrics(self) -> Metrics:
        """Counts and ages of the whole system. Not tried again."""
        return cast("Metrics", (await self._once("select autotag.metrics() as m"))["m"])

    async def take_outbox(self, limit: int) -> list[Broadcast]:
        return cast("list[Broadcast]", (await self._call("select autotag.take_outbox(%s) as m", limit))["m"])


def _version(question: Question | None) -> int | None:
    return question.version if question else None
