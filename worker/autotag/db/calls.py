"""The database calls of a worker.

Each method calls one function ``autotag.*``, which is documented in its SQL source. After a broken connection or a
deadlock, a call is retried until it succeeds, because the answers that it reports were paid for. Retries are safe: a
second report of the same attempt is refused. The two claims are not retried, because they are not idempotent. After a
claim that failed, `Database.release_unacknowledged` releases what was claimed without the worker's knowledge.
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
    Sealed,
    Sent,
    Settled,
    StageReport,
    Submitted,
    VersionsDiffer,
    make,
)  # fmt: skip
from autotag.redact import safe_message

POOL_SIZE = 4  # connections; claim, settle, stages and the batch lane rarely run at the same time
SEAL_TIMEOUT = 5.0  # seconds; 50,000 images take about two

log = structlog.get_logger(__name__)

_TRANSIENT = (psycopg.OperationalError, psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)

set_json_dumps(orjson.dumps)
set_json_loads(orjson.loads)


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("database_retry", attempt=state.attempt_number, error=safe_message(error) if error else "")


class Database:
    """The database calls of one worker, over a small connection pool."""

    def __init__(self, url: str, worker: uuid.UUID, *, prepare: bool = True) -> None:
        """
        Args:
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

    def _settings(self, sent: Question | None, changed: dict[str, Any] | None) -> DatabaseSettings:
        """The settings for the images of a claim; see `_question_of`."""
        if self._registered is None:
            raise RuntimeError("A worker must register before it claims.")
        return DatabaseSettings(
            self._question_of(sent, changed), self._registered.lease_seconds, self._registered.batch_max_bytes
        )

    def _question_of(self, sent: Question | None, changed: dict[str, Any] | None) -> Question:
        """The question for the images of a claim.

        Args:
            sent: the question whose version was sent with the claim. ``self._question`` may be newer, because the
                other lane may have received it meanwhile.
            changed: the question in the database's result; None: ``sent`` is still the current one.
        """
        if changed is None and sent is not None:
            return sent
        question = make(Question, changed or {})
        if self._question is None or self._question.version < question.version:
            self._question = question
            log.info("question_changed", **asdict(question))
        return question

    async def open(self) -> None:
        """Opens the pool.

        Raises:
            psycopg_pool.PoolTimeout: no connection within 30 seconds.
        """
        await self._pool.open(wait=True)

    async def close(self) -> None:
        """Closes the pool."""
        await self._pool.close()

    async def _call(self, statement: str, *arguments: object) -> dict[str, Any]:
        """Executes one statement and returns its row. Retries after a broken connection or a deadlock."""
        async for attempt in AsyncRetrying(
            retry=retry_if_exception_type(_TRANSIENT),
            wait=wait_random_exponential(0.1, max=MAX_RETRY_DELAY),
            before_sleep=_log_retry,
        ):
            with attempt:
                return await self._call_once(statement, *arguments)
        raise AssertionError("unreachable: the loop ends with a result")

    async def _call_once(self, statement: str, *arguments: object) -> dict[str, Any]:
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
        """Registers the worker: at its start, before the first claim, and after its lease has ended.

        Args:
            host: the machine's name, for operators.
            version: this package's version.
            listening: whether LISTEN works.
            base_url: the provider's address.
            fingerprint: of address and key (`provider.fingerprint`).

        Raises:
            VersionsDiffer: the schema has another version.
        """
        row = await self._call(
            "select autotag.register_worker(%s, %s, %s, %s, %s, %s) as settings",
            self.worker, host, version, listening, base_url, fingerprint,
        )  # fmt: skip
        self._registered = make(Registered, row["settings"])
        return self._registered

    async def heartbeat(self) -> tuple[bool, bool]:
        """Extends the lease. Not retried.

        Returns:
            Whether the worker still has its lease (if not, it must register again), and whether `tick_if_due` has
            something to do.

        Raises:
            VersionsDiffer: the schema has been upgraded.
        """
        row = await self._call_once("select alive, tick_due from autotag.heartbeat(%s)", self.worker)
        return bool(row["alive"]), bool(row["tick_due"])

    async def tick_if_due(self) -> bool:
        """Runs the periodic work that is overdue. True: call again, because another lease has ended. Not retried."""
        return bool((await self._call_once("select autotag.tick_if_due() as more"))["more"])

    async def release(self) -> int:
        """Releases everything that the worker holds, and ends its lease; returns the number of tasks and batches."""
        return int((await self._call("select autotag.release_worker(%s) as n", self.worker))["n"])

    async def release_unacknowledged(
        self, *, tasks: Sequence[int] | None = None, batches: Sequence[str] | None = None
    ) -> None:
        """Releases this worker's tasks and batches, except those in the lists. None: keeps all of that kind."""
        await self._call(
            "select autotag.release_unacknowledged(%s, %s::bigint[], %s::uuid[])", self.worker, tasks, batches
        )

    async def claim(self, slots: int) -> Claim:
        """Claims images for single calls. Not retried: after an error, call `release_unacknowledged`."""
        question = self._question
        row = await self._call_once(
            "select tasks, wait, bound, question from autotag.claim(%s, %s, %s)", self.worker, slots, _version(question)
        )
        images = [make(Image, task) for task in row["tasks"]]
        return Claim(images, row["wait"], row["bound"], self._settings(question, row["question"]))

    async def seal_uploads(self) -> Sealed:
        """Makes a job of one upload of automatic mode that is complete. Not retried.

        A trigger of the host that takes long is canceled after `SEAL_TIMEOUT`, and that upload is postponed.
        """
        async with self._pool.connection() as connection, connection.transaction():
            await connection.execute(f"set local statement_timeout = '{SEAL_TIMEOUT:g}s'".encode())
            cursor = await connection.execute(
                "select sealed, more, wait, notices from autotag.seal_uploads(%s)", (self.worker,)
            )
            return make(Sealed, cast("dict[str, Any]", await cursor.fetchone()))

    async def report_stages(self, stages: list[StageReport], sent: Sent | None) -> None:
        """Reports stages of images, and calls that were sent."""
        await self._call(
            "select autotag.report_stages(%s, %s, %s)", self.worker, Jsonb(stages), Jsonb(sent) if sent else None
        )

    async def settle(self, reports: list[Report], observed: ObservedLimits | None) -> Settled:
        """Reports the outcomes of single calls, and the provider's limits."""
        row = await self._call(
            "select autotag.settle(%s, %s, %s) as result",
            self.worker, Jsonb(reports), Jsonb(observed) if observed else None,
        )  # fmt: skip
        return make(Settled, row["result"])

    async def claim_batches(self, slots: int) -> BatchClaim:
        """Claims batches and polls. Not retried: after an error, call `release_unacknowledged`."""
        question = self._question
        row = await self._call_once(
            "select c.* from autotag.claim_batches(%s, %s, %s) c", self.worker, slots, _version(question)
        )
        return BatchClaim(
            batches=[make(Batch, batch) for batch in row["batches"]],
            wait=row["wait"],
            poll=[make(Submitted, batch) for batch in row["poll"] or []],
            cancel=row["cancel"] or [],
            files=row["files"],
            settings=self._settings(question, row["question"]),
            look_up=row["look_up"],
        )

    async def batch_images(self, batch: Batch, after: int, limit: int) -> list[Image]:
        """The next images of a batch: at most ``limit``, with task ids greater than ``after``."""
        row = await self._call(
            "select autotag.batch_images(%s, %s, %s, %s, %s) as page",
            self.worker, batch.batch, batch.attempt, after, limit,
        )  # fmt: skip
        return [make(Image, image) for image in row["page"]]

    async def batch_step(self, batch: Batch, state: str, input_file_id: str | None = None) -> None:
        """Records that the next step of submitting a batch starts."""
        await self._call(
            "select autotag.batch_step(%s, %s, %s, %s, %s)",
            self.worker, batch.batch, batch.attempt, state, input_file_id,
        )  # fmt: skip

    async def batch_split(self, batch: Batch, last_task: int) -> None:
        """Moves the images after ``last_task``, which did not fit into the file, to another batch."""
        await self._call(
            "select autotag.batch_split(%s, %s, %s, %s)", self.worker, batch.batch, batch.attempt, last_task
        )

    async def batch_submitted(self, batch: Batch, openai_batch_id: str, status: str, input_file_id: str) -> None:
        """Records that the batch was created at the provider."""
        await self._call(
            "select autotag.batch_submitted(%s, %s, %s, %s, %s, %s)",
            self.worker, batch.batch, batch.attempt, openai_batch_id, status, input_file_id,
        )  # fmt: skip

    async def report_batch_failure(self, batch: Batch, error: ErrorReport) -> None:
        """Reports that a step of a batch failed, and releases the batch."""
        await self._call(
            "select autotag.report_batch_failure(%s, %s, %s, %s)", self.worker, batch.batch, batch.attempt, Jsonb(error)
        )

    async def record_poll(self, polled: list[PolledBatch]) -> None:
        """Reports the state of batches at the provider."""
        await self._call("select autotag.record_poll(%s, %s)", self.worker, Jsonb(polled))

    async def batch_answers(self, batch: Batch, answers: list[BatchAnswer]) -> Settled:
        """Stores answers of a batch; returns how many images have ended (not those that are retried)."""
        row = await self._call(
            "select autotag.batch_answers(%s, %s, %s, %s) as result",
            self.worker, batch.batch, batch.attempt, Jsonb(answers),
        )  # fmt: skip
        return make(Settled, row["result"])

    async def provider_checked(self, facts: ProviderFacts) -> str | None:
        """Reports facts about the provider; returns a warning for the log if the model shuts down soon."""
        row = await self._call("select autotag.provider_checked(%s, %s) as notice", self.worker, Jsonb(facts))
        return cast("str | None", row["notice"])

    async def report_poll_failure(self, error: ErrorReport) -> None:
        """Reports that a poll failed, so that the next one is delayed."""
        await self._call("select autotag.report_poll_failure(%s, %s)", self.worker, Jsonb(error))

    async def files_deleted(self, files: Sequence[str]) -> None:
        """Reports files that no longer exist at the provider."""
        await self._call("select autotag.files_deleted(%s, %s::text[])", self.worker, list(files))

    async def batch_finish(self, batch: Batch) -> None:
        """Ends a batch after its last answer, or without a submission."""
        await self._call("select autotag.batch_finish(%s, %s, %s)", self.worker, batch.batch, batch.attempt)

    async def receive_webhook(self, webhook_id: str, event_type: str, openai_batch_id: str) -> str:
        """Records a delivery of the webhook; returns ``accepted``, ``replayed``, ``unknown`` or ``ignored``.

        Raises:
            Refused: an id is not valid.
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
        """Counts and ages of the whole system. Not retried."""
        return cast("Metrics", (await self._call_once("select autotag.metrics() as metrics"))["metrics"])

    async def take_outbox(self, limit: int) -> list[Broadcast]:
        """Takes at most ``limit`` messages from the outbox."""
        row = await self._call("select autotag.take_outbox(%s) as messages", limit)
        return cast("list[Broadcast]", row["messages"])


def _version(question: Question | None) -> int | None:
    return question.version if question else None
