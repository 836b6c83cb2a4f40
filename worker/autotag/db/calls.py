"""The database calls of a worker.

Each method calls one function ``autotag.*``, which is documented in its SQL source. After a broken connection, a call
is retried until it succeeds, because the answers that it reports were paid for (`Connections.call`). Retries are safe:
a second report of the same attempt is refused, and a claim with the same number returns the same work.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TypeVar

import psycopg
import structlog
from psycopg.types.json import Jsonb

from autotag.db.briefs import Briefs
from autotag.db.connections import Connections
from autotag.db.errors import Refused, refusal
from autotag.db.lanes import Sealed, Stored, Unstored
from autotag.db.messages import (
    Batch,
    BatchAnswer,
    BatchClaim,
    BatchNote,
    Beat,
    Broadcast,
    Claim,
    DatabaseSettings,
    ErrorReport,
    Image,
    Notice,
    ObservedLimits,
    PolledBatch,
    ProviderFacts,
    Question,
    Registered,
    Report,
    Sent,
    Settled,
    Sought,
    StageReport,
)  # fmt: skip
from autotag.db.operator_messages import Metrics
from autotag.db.readers import Reader, make, many, maybe, nothing, one
from autotag.db.rows import BatchClaimRow, BeatRow, ClaimRow

# Seconds that a call may take before it is cancelled. They limit the time that the host's triggers and locks can take.
LEASE_TIMEOUT = 10.0  # heartbeat, release_lost
DESCRIBE_TIMEOUT = 10.0  # describe_tasks, batch_images: a transaction of the host can lock its whole table
SETTLE_TIMEOUT = 2.0  # settle; after this time, the outcomes are kept for the store lane
STAGES_TIMEOUT = 2.0  # report_stages, show_batch; after this time, the stages are dropped
STORE_TIMEOUT = 10.0  # pick_unstored, store_waiting, postpone_stores, batch_answers
KEEP_TIMEOUT = 10.0  # settle and batch_answers, if they only keep outcomes and write no row of the host
BATCH_TIMEOUT = 30.0  # other steps of a batch
SEAL_TIMEOUT = 5.0  # seal_uploads; after this time, the upload is postponed; 50,000 images take about two seconds

R = TypeVar("R")

log = structlog.get_logger(__name__)


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
        self._connections = Connections(url, prepare=prepare)
        self.briefs = Briefs(self._connections, worker)

    def _settings(self, sent: Question | None, changed: Mapping[str, object] | None) -> DatabaseSettings:
        """The settings for the images of a claim; see `_question_of`."""
        if self._registered is None:
            raise RuntimeError("A worker must register before it claims.")
        return DatabaseSettings(self._question_of(sent, changed), self._registered.batch_max_bytes)

    def _question_of(self, sent: Question | None, changed: Mapping[str, object] | None) -> Question:
        """The question for the images of a claim.

        Args:
            sent: the question whose version was sent with the claim. ``self._question`` may be newer, because the other
                lane may have received a new one meanwhile.
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
        """See `Connections.open`."""
        await self._connections.open()

    async def close(self) -> None:
        """See `Connections.close`."""
        await self._connections.close()

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
        self._registered = await self._connections.call(
            "lease", one(Registered), "select autotag.register_worker(%s, %s, %s, %s, %s, %s)",
            self.worker, host, version, listening, base_url, fingerprint,
        )  # fmt: skip
        return self._registered

    async def heartbeat(self, claims: Sequence[int], batch_claims: Sequence[int]) -> Beat:
        """Extends the lease. Not retried.

        Args:
            claims: numbers of the claims of which the worker holds images (`Claims.listed`).
            batch_claims: the same for batches.

        Raises:
            VersionsDiffer: the schema has been upgraded.
        """
        row = await self._connections.call_once(
            "lease", one(BeatRow),
            "select alive, lost, tick_due, settings from autotag.heartbeat(%s, %s::integer[], %s::integer[])",
            self.worker, list(claims), list(batch_claims), within=LEASE_TIMEOUT,
        )  # fmt: skip
        self._registered = make(Registered, row["settings"])
        return Beat(row["alive"], row["lost"], row["tick_due"], self._registered)

    async def release_lost(self, claims: Sequence[int], batch_claims: Sequence[int]) -> int:
        """Releases what this worker holds by other claims than these, because their replies were lost; returns the
        number of tasks and batches. Not retried: the next heartbeat says so again."""
        return await self._connections.call_once(
            "lease", int, "select autotag.release_lost(%s, %s::integer[], %s::integer[])",
            self.worker, list(claims), list(batch_claims), within=LEASE_TIMEOUT,
        )  # fmt: skip

    async def tick_if_due(self) -> bool:
        """Runs the periodic work that is overdue. True: call again, because another lease has ended. Not retried."""
        return await self._connections.call_once("other", bool, "select autotag.tick_if_due()")

    async def release(self) -> int:
        """Releases everything that the worker holds, and ends its lease; returns the number of tasks and batches."""
        return await self._connections.call("lease", int, "select autotag.release_worker(%s)", self.worker)

    async def claim(self, number: int, slots: int) -> Claim:
        """Claims images for single calls. With the same number, it returns the same images (`Claims.number`)."""
        question = self._question
        row = await self._connections.call(
            "claim", one(ClaimRow), "select tasks, wait, bound, question from autotag.claim(%s, %s, %s, %s)",
            self.worker, slots, number, _version(question),
        )  # fmt: skip
        return Claim(row["tasks"], row["wait"], row["bound"], self._settings(question, row["question"]))

    async def seal_uploads(self, *, quiet: bool = False) -> Sealed:
        """Makes a job of one complete upload of automatic mode. Not retried. quiet: do not show the stage on the rows.

        Raises:
            Busy, TooSlow: writing the host's rows takes too long; the upload was postponed.
        """
        return await self._connections.call_once(
            "seal", one(Sealed), "select sealed, more, wait, notices from autotag.seal_uploads(%s, %s)",
            self.worker, quiet, within=SEAL_TIMEOUT)  # fmt: skip

    async def describe_tasks(self, number: int, tasks: Sequence[int]) -> list[Image]:
        """Describes images of the claim with this number. Images that the worker no longer holds are missing.

        Raises:
            Busy, TooSlow: the host's table is locked.
        """
        images = await self._connections.call(
            "describe", many(Image), "select autotag.describe_tasks(%s, %s::bigint[])",
            self.worker, list(tasks), within=DESCRIBE_TIMEOUT,
        )  # fmt: skip
        return [replace(image, claim=number) for image in images]

    async def report_unreadable(self, tasks: list[int]) -> None:
        """Reports images whose description raised `Lost` by itself."""
        statement = "select autotag.report_unreadable(%s, %s::bigint[])"
        await self._connections.call("other", nothing, statement, self.worker, tasks)

    async def report_stages(self, workspace: str | None, stages: list[StageReport], sent: Sent | None) -> list[Notice]:
        """Reports stages of images of one workspace, and calls that were sent (also without a workspace); returns
        notices for the log. Not retried: the next stage or the outcome follows.

        Raises:
            Busy, TooSlow: the workspace's rows are held, or writing them takes too long.
        """
        return await self._connections.call_once(
            "stages", many(Notice), "select autotag.report_stages(%s, %s, %s, %s)",
            self.worker, workspace, Jsonb(stages), Jsonb(sent) if sent else None, within=STAGES_TIMEOUT,
        )  # fmt: skip

    async def settle(
        self, workspace: str, reports: list[Report], observed: ObservedLimits | None, *, keep: bool
    ) -> Settled:
        """Reports the outcomes of single calls of one workspace, and the provider's limits.

        Args:
            workspace: of the images.
            reports: at most one per image.
            observed: see `ObservedLimits`.
            keep: the host's rows are slow: keep the outcomes for `store_waiting`.

        Raises:
            Busy, TooSlow: the workspace's rows are held, or writing them takes too long.
        """
        return await self._connections.call(
            "settle", one(Settled), "select autotag.settle(%s, %s, %s, %s, %s)",
            self.worker, workspace, Jsonb(reports), Jsonb(observed) if observed else None, keep,
            within=KEEP_TIMEOUT if keep else SETTLE_TIMEOUT,
        )  # fmt: skip

    async def list_unstored(self) -> Unstored:
        """What waits for the host's rows."""
        statement = "select workspaces::text[] as workspaces, wait from autotag.list_unstored(%s)"
        return await self._connections.call("other", one(Unstored), statement, self.worker)

    async def pick_unstored(self, workspace: str, limit: int) -> list[int]:
        """At most ``limit`` outcomes of a workspace that are due, by their tasks.

        Raises:
            Busy, TooSlow: as in `store_waiting`.
        """
        return await self._connections.call(
            "store", many(int), "select autotag.pick_unstored(%s, %s, %s)", self.worker, workspace, limit,
            within=STORE_TIMEOUT)  # fmt: skip

    async def store_waiting(self, workspace: str, tasks: Sequence[int]) -> Stored:
        """Stores outcomes of a workspace that waited for the host's rows.

        Raises:
            Busy, TooSlow: writing the rows takes too long; call `postpone_stores` with the same tasks next.
        """
        return await self._connections.call(
            "store", one(Stored), "select autotag.store_waiting(%s, %s, %s::bigint[])",
            self.worker, workspace, list(tasks), within=STORE_TIMEOUT,
        )  # fmt: skip

    async def postpone_stores(self, workspace: str, tasks: Sequence[int], *, lost: bool = False) -> list[Notice]:
        """Delays outcomes that `store_waiting` could not store; returns notices. lost: `store_waiting` raised `Lost`.

        Raises:
            Busy, TooSlow: as in `store_waiting`.
        """
        return await self._connections.call(
            "store", many(Notice), "select autotag.postpone_stores(%s, %s, %s::bigint[], %s)",
            self.worker, workspace, list(tasks), lost, within=STORE_TIMEOUT,
        )  # fmt: skip

    async def claim_batches(self, number: int, slots: int) -> BatchClaim:
        """Claims batches and polls. With the same number, it returns the same batches (`Claims.number`)."""
        question = self._question
        row = await self._connections.call(
            "claim", one(BatchClaimRow), "select c.* from autotag.claim_batches(%s, %s, %s, %s) c",
            self.worker, slots, number, _version(question),
        )  # fmt: skip
        return BatchClaim(
            batches=[make(Batch, batch) for batch in row["batches"]],
            wait=row["wait"],
            poll=[make(Sought, batch) for batch in row["poll"] or []],
            cancel=row["cancel"] or [],
            files=row["files"],
            unrecorded=[make(Sought, batch) for batch in row["unrecorded"] or []],
            settings=self._settings(question, row["question"]),
            look_up=row["look_up"],
        )

    # The calls of a batch raise `Busy` (locked rows) and `TooSlow` (slow rows). `BatchSlots.retry` repeats them.

    async def batch_images(self, batch: Batch, after: int, limit: int) -> list[Image]:
        """The next images of a batch: at most ``limit``, with task ids greater than ``after``."""
        statement = "select autotag.batch_images(%s, %s, %s, %s, %s)"
        return await self._batch(many(Image), statement, batch, after, limit, within=DESCRIBE_TIMEOUT)

    async def batch_step(self, batch: Batch, state: str, input_file_id: str | None = None) -> None:
        """Records that the next step of submitting a batch starts."""
        await self._batch(nothing, "select autotag.batch_step(%s, %s, %s, %s, %s)", batch, state, input_file_id)

    async def note_images(self, batch: Batch, notes: list[BatchNote]) -> None:
        """Notes what was done to images of a batch's file, until its answers are stored."""
        await self._batch(nothing, "select autotag.note_images(%s, %s, %s, %s)", batch, Jsonb(notes))

    async def batch_split(self, batch: Batch, last_task: int) -> None:
        """Moves the images after ``last_task``, which did not fit into the file, to another batch."""
        await self._batch(nothing, "select autotag.batch_split(%s, %s, %s, %s)", batch, last_task)

    async def batch_submitted(self, batch: Batch, openai_batch_id: str, status: str, input_file_id: str) -> None:
        """Records that the batch was created at the provider."""
        await self._batch(
            nothing, "select autotag.batch_submitted(%s, %s, %s, %s, %s, %s)",
            batch, openai_batch_id, status, input_file_id,
        )  # fmt: skip

    async def report_batch_failure(self, batch: Batch, error: ErrorReport) -> None:
        """Reports that a step of a batch failed, and releases the batch."""
        await self._batch(nothing, "select autotag.report_batch_failure(%s, %s, %s, %s)", batch, Jsonb(error))

    async def batch_answers(self, batch: Batch, answers: list[BatchAnswer], *, keep: bool = False) -> Settled:
        """Stores answers of a batch; returns how many images have ended without a retry. keep: as in `settle`."""
        return await self._batch(
            one(Settled), "select autotag.batch_answers(%s, %s, %s, %s, %s)", batch, Jsonb(answers), keep,
            within=KEEP_TIMEOUT if keep else STORE_TIMEOUT,
        )  # fmt: skip

    async def batch_finish(self, batch: Batch) -> None:
        """Ends a batch after its last answer, or without a submission."""
        await self._batch(nothing, "select autotag.batch_finish(%s, %s, %s)", batch)

    async def _batch(
        self, read: Reader[R], statement: str, batch: Batch, *arguments: object, within: float = BATCH_TIMEOUT
    ) -> R:
        return await self._connections.call(
            "batch", read, statement, self.worker, batch.batch, batch.attempt, *arguments, within=within
        )

    async def show_batch(self, batch: str, after: int, limit: int) -> int | None:
        """Shows the stage of a batch on its next images: at most ``limit``, with task ids greater than ``after``.
        Returns the last one; None: there are no more.

        Raises:
            Busy, TooSlow: the upload's row is held, or writing the images' rows takes too long.
        """
        return await self._connections.call(
            "stages", maybe(int), "select autotag.show_batch(%s, %s, %s, %s)",
            self.worker, batch, after, limit, within=STAGES_TIMEOUT,
        )  # fmt: skip

    async def record_poll(self, polled: list[PolledBatch]) -> list[str]:
        """Reports the state of batches at the provider; returns those whose stage has changed (`show_batch`)."""
        statement = "select autotag.record_poll(%s, %s)::text[]"
        return await self._connections.call("other", many(str), statement, self.worker, Jsonb(polled))

    async def provider_checked(self, facts: ProviderFacts) -> str | None:
        """Reports facts about the provider; returns a warning for the log if the model shuts down soon."""
        statement = "select autotag.provider_checked(%s, %s)"
        return await self._connections.call("other", maybe(str), statement, self.worker, Jsonb(facts))

    async def report_poll_failure(self, error: ErrorReport) -> None:
        """Reports that a poll failed, so that the next one is delayed."""
        statement = "select autotag.report_poll_failure(%s, %s)"
        await self._connections.call("other", nothing, statement, self.worker, Jsonb(error))

    async def files_deleted(self, files: Sequence[str], batches: Sequence[str] = ()) -> None:
        """Reports files that no longer exist at the provider, and batches that have no unrecorded files there."""
        statement = "select autotag.files_deleted(%s, %s::text[], %s::uuid[])"
        await self._connections.call("other", nothing, statement, self.worker, list(files), list(batches))

    async def receive_webhook(self, webhook_id: str, event_type: str, openai_batch_id: str) -> str:
        """Records a delivery of the webhook; returns ``accepted``, ``replayed``, ``unknown`` or ``ignored``.

        Raises:
            Refused: an id is not valid.
        """
        try:
            return await self._connections.call(
                "other", str, "select autotag.receive_webhook(%s, %s, %s)", webhook_id, event_type, openai_batch_id
            )
        except psycopg.DatabaseError as error:
            if (refusal(error) or {}).get("code") != "bad_webhook":
                raise
            raise Refused(str(error.diag.message_primary), error.diag.message_hint, None) from None

    async def metrics(self) -> Metrics:
        """Counts and ages of the whole system. Not retried."""
        return await self._connections.call_once("other", one(Metrics), "select autotag.metrics()")

    async def take_outbox(self, limit: int) -> list[Broadcast]:
        """Takes at most ``limit`` messages from the outbox."""
        return await self._connections.call("other", many(Broadcast), "select autotag.take_outbox(%s)", limit)


def _version(question: Question | None) -> int | None:
    return question.version if question else None
