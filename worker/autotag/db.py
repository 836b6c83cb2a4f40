"""Every call of the database that a worker makes. No other module of the product holds SQL.

Each function is one call of ``autotag.*``; what it does stands at its definition in the migrations. Calls
that a broken connection or a deadlock interrupts are made again until they work, because what they report
was paid for. They are idempotent: a report for what is settled already is refused. The two claims are not;
after one that failed, `Database.release_unheld` gives back what was claimed without the worker ever hearing
of it.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from typing import Any, TypeVar, cast

import orjson
import psycopg
import structlog
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb, set_json_dumps, set_json_loads
from psycopg_pool import AsyncConnectionPool
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_delay, wait_random_exponential

from autotag.redact import said
from autotag.tags import Question

RETRY_MOST = 5.0  # seconds between tries while the database is away
POOL_SIZE = 4  # claim, settle, stages and the batch lane seldom meet
CONNECT_MOST = 30.0  # seconds that the database may be out of reach when a worker starts
LISTEN_PROOF = 5.0  # seconds that a notification of our own may take to arrive
#: A peer that is gone without a word is noticed within a minute (milliseconds where libpq says so).
KEEPALIVES: dict[str, Any] = {
    "keepalives_idle": 30, "keepalives_interval": 10, "keepalives_count": 3, "tcp_user_timeout": 60_000,
}  # fmt: skip
CHANNEL = "autotag"

log = structlog.get_logger(__name__)

T = TypeVar("T")

_TRANSIENT = (psycopg.OperationalError, psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure)

set_json_dumps(orjson.dumps)
set_json_loads(orjson.loads)


def _log_retry(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    log.warning("database_retry", attempt=state.attempt_number, error=said(error) if error else "")


class NotHeld(Exception):
    """The batch belongs to somebody else by now; the worker lets go of it."""


class VersionsDiffer(Exception):
    """This worker and the database's schema are of different versions; ``hint`` says which of them to change."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Refused(Exception):
    """The database refuses; ``retry_after`` are seconds after which it may not (None: it always will)."""

    def __init__(self, message: str, hint: str | None, retry_after: float | None) -> None:
        super().__init__(message)
        self.hint = hint
        self.retry_after = retry_after


@dataclass(frozen=True)
class Image:
    """An image to tag and where it is: a Storage bucket and path, or a URL; neither when it is gone, or when it is
    ``refused``: ``foreign_file`` (its row names a file of somebody else) or ``hidden_file`` (whoever asked may not see
    it)."""

    task: int
    asset_id: str
    bucket: str | None
    path: str | None
    url: str | None
    cap: int = 0  # tokens that its answer may have
    attempt: int = 0
    job: str | None = None
    traceparent: str | None = None  # of the request that made the job
    waited: float = 0.0  # seconds from the upload to the claim
    refused: str | None = None


@dataclass(frozen=True)
class Claim:
    """Images for single calls, seconds until it is worth asking again (None: when notified), what kept the
    database from releasing more (None: there is no more), and what to ask about these images."""

    images: list[Image]
    wait: float | None
    bound: str | None
    question: Question


@dataclass(frozen=True)
class Settled:
    """How many reports were accepted, and sentences for the operator's log."""

    accepted: int
    notices: list[dict[str, str]]  # {event, notice}


@dataclass(frozen=True)
class Batch:
    """A batch in hand; ``state`` says where to go on (see the diagram in the batches migration)."""

    batch: str
    attempt: int
    state: str
    image_count: int
    since: float  # epoch seconds; what belongs to it at OpenAI is not older
    cancelled: bool
    openai_batch_id: str | None
    input_file_id: str | None
    output_file_id: str | None
    error_file_id: str | None
    keep_files: int | None = None  # seconds after which the provider is to delete its files; None: it takes no expiry


@dataclass(frozen=True)
class BatchClaim:
    """Batches to work on, and seconds until it is worth asking again; what to do at OpenAI now.

    ``poll`` are OpenAI ids to look at with the moment (epoch seconds) before which they were not created,
    ``cancel`` those to cancel first, ``files`` the files nobody needs any more. ``question`` is what to ask about these
    batches; ``look_up`` the model that the provider is to be asked about now.
    """

    batches: list[Batch]
    wait: float | None
    question: Question
    poll: dict[str, float] = field(default_factory=dict)
    cancel: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    look_up: str | None = None


class Database:
    """The calls, over a small pool of connections, in the name of one worker."""

    def __init__(self, url: str, worker: uuid.UUID, *, prepare: bool = True) -> None:
        """Args:
        url: connection URL.
        worker: the worker's id.
        prepare: use prepared statements (impossible behind a transaction pooler).
        """
        self.worker = worker
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

    def _asked(self, known: Question | None, changed: dict[str, Any] | None) -> Question:
        """What to ask about what a claim released: what the database says, or what was known when the claim was sent.
        The other lane may have learned of a newer question meanwhile."""
        if changed is None and known is not None:
            return known
        question = _make(Question, changed or {})
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
            wait=wait_random_exponential(0.1, max=RETRY_MOST),
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

    async def register(
        self, host: str, version: str, listening: bool, base_url: str, fingerprint: str
    ) -> dict[str, Any]:
        """What the worker needs of the settings; ``base_url`` and ``fingerprint`` (`provider.fingerprint`) say whom it
        asks.

        Raises:
            VersionsDiffer: worker and schema do not fit.
        """
        row = await self._call(
            "select autotag.register_worker(%s, %s, %s, %s, %s, %s) as settings",
            self.worker, host, version, listening, base_url, fingerprint,
        )  # fmt: skip
        return cast("dict[str, Any]", row["settings"])

    async def heartbeat(self) -> bool:
        """False when the lease had run out: the worker has to register again. Not tried again by itself.

        Raises:
            VersionsDiffer: the schema has been upgraded.
        """
        return bool((await self._once("select autotag.heartbeat(%s) as alive", self.worker))["alive"])

    async def release(self) -> int:
        return int((await self._call("select autotag.release_worker(%s) as n", self.worker))["n"])

    async def release_unheld(self, *, tasks: Sequence[int] | None = None, batches: Sequence[str] | None = None) -> None:
        """Gives back what this worker holds besides these tasks or these batches; None leaves that kind alone."""
        await self._call("select autotag.release_unheld(%s, %s::bigint[], %s::uuid[])", self.worker, tasks, batches)

    async def claim(self, slots: int) -> Claim:
        """Not tried again by itself: after an error call `release_unheld`."""
        known = self._question
        row = await self._once(
            "select tasks, wait, bound, question from autotag.claim(%s, %s, %s)", self.worker, slots, _version(known)
        )
        images = [_make(Image, task) for task in row["tasks"]]
        return Claim(images, row["wait"], row["bound"], self._asked(known, row["question"]))

    async def report_stages(self, stages: list[dict[str, Any]], sent: dict[str, Any] | None) -> None:
        await self._call(
            "select autotag.report_stages(%s, %s, %s)", self.worker, Jsonb(stages), Jsonb(sent) if sent else None
        )

    async def settle(self, reports: list[dict[str, Any]], seen: dict[str, Any] | None) -> Settled:
        row = await self._call(
            "select autotag.settle(%s, %s, %s) as told", self.worker, Jsonb(reports), Jsonb(seen) if seen else None
        )
        return Settled(**row["told"])

    async def claim_batches(self, slots: int) -> BatchClaim:
        """Not tried again by itself: after an error call `release_unheld`."""
        known = self._question
        row = await self._once(
            "select c.* from autotag.claim_batches(%s, %s, %s) c", self.worker, slots, _version(known)
        )
        return BatchClaim(
            batches=[_make(Batch, batch) for batch in row["batches"]],
            wait=row["wait"],
            poll={batch["id"]: batch["since"] for batch in row["poll"] or []},
            cancel=row["cancel"] or [],
            files=row["files"],
            question=self._asked(known, row["question"]),
            look_up=row["look_up"],
        )

    async def batch_images(self, batch: Batch, after: int, limit: int) -> list[Image]:
        row = await self._call(
            "select autotag.batch_images(%s, %s, %s, %s, %s) as page",
            self.worker, batch.batch, batch.attempt, after, limit,
        )  # fmt: skip
        return [_make(Image, image) for image in row["page"]]

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

    async def batch_trouble(self, batch: Batch, error: dict[str, Any]) -> None:
        await self._call(
            "select autotag.batch_trouble(%s, %s, %s, %s)", self.worker, batch.batch, batch.attempt, Jsonb(error)
        )

    async def batches_seen(self, seen: list[dict[str, Any]]) -> None:
        await self._call("select autotag.batches_seen(%s, %s)", self.worker, Jsonb(seen))

    async def batch_answers(self, batch: Batch, answers: list[dict[str, Any]]) -> Settled:
        """How many images have ended by that; the others are noted or were known."""
        row = await self._call(
            "select autotag.batch_answers(%s, %s, %s, %s) as told",
            self.worker, batch.batch, batch.attempt, Jsonb(answers),
        )  # fmt: skip
        return Settled(**row["told"])

    async def provider_checked(self, facts: dict[str, Any]) -> str | None:
        """Tells what the provider said of the model: ``{model, shutdown_date, batches}``, each optional; a sentence for
        the log when the model's end is near."""
        row = await self._call("select autotag.provider_checked(%s, %s) as notice", self.worker, Jsonb(facts))
        return cast("str | None", row["notice"])

    async def poll_trouble(self, error: dict[str, Any]) -> None:
        await self._call("select autotag.poll_trouble(%s, %s)", self.worker, Jsonb(error))

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

    async def metrics(self) -> dict[str, Any]:
        """Counts and ages of the whole system; see ``autotag.metrics`` in the migrations. Not tried again."""
        return cast("dict[str, Any]", (await self._once("select autotag.metrics() as m"))["m"])

    async def take_outbox(self, limit: int) -> list[dict[str, Any]]:
        return cast("list[dict[str, Any]]", (await self._call("select autotag.take_outbox(%s) as m", limit))["m"])


def _version(question: Question | None) -> int | None:
    return question.version if question else None


def _make(kind: type[T], described: dict[str, Any]) -> T:
    """A message of the database. What a newer schema says besides is left out: a patch release fits."""
    names = {field.name for field in fields(cast("Any", kind))}
    return kind(**{name: value for name, value in described.items() if name in names})


async def can_listen(url: str) -> bool:
    """Whether a notification reaches a connection that listens; behind a transaction pooler none does.

    The notification comes from a second connection: on a pooler the first one would find itself told by the
    server connection that both statements happened to share.

    Raises:
        psycopg.OperationalError: the database could not be reached for half a minute.
    """
    async for attempt in AsyncRetrying(
        retry=retry_if_exception_type(psycopg.OperationalError),
        wait=wait_random_exponential(0.1, max=RETRY_MOST), stop=stop_after_delay(CONNECT_MOST), reraise=True,
    ):  # fmt: skip
        with attempt:
            return await _prove_listening(url)
    raise AssertionError("unreachable: it returns or raises")


async def _prove_listening(url: str) -> bool:
    async with await _connect(url) as listener, await _connect(url) as other:
        await listener.execute(f"listen {CHANNEL}")
        proof = f"hello {uuid.uuid4()}"
        await other.execute("select pg_notify(%s, %s)", (CHANNEL, proof))
        async for note in listener.notifies(timeout=LISTEN_PROOF):
            if note.payload == proof:
                return True
    return False


async def _connect(url: str) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(
        url, autocommit=True, application_name="autotag listen", prepare_threshold=None, **KEEPALIVES
    )


async def listen(url: str, on_wake: Callable[[str], None]) -> None:
    """Hands every notification to ``on_wake`` until cancelled; reconnects when the connection breaks.

    After each (re)connect one wake of everything follows, because what was notified meanwhile is lost.
    """
    delay = 0.1
    while True:
        try:
            async with await _connect(url) as connection:
                await connection.execute(f"listen {CHANNEL}")
                on_wake("")
                delay = 0.1
                async for note in connection.notifies():
                    on_wake(note.payload)
        except psycopg.OperationalError as error:
            log.warning("listen_lost", error=said(error), retry_in=delay)
            await asyncio.sleep(delay)
            delay = min(delay * 2, 5.0)


class Operator:
    """The calls of the operator's commands (doctor, status, enqueue, usage, compare), on one connection."""

    def __init__(self, connection: psycopg.AsyncConnection[Any]) -> None:
        self._connection = connection
        self.server_version = connection.info.parameter_status("server_version")

    @classmethod
    async def connect(cls, url: str, seconds: int = 10) -> Operator:
        """Raises:
        psycopg.OperationalError: no connection within so many seconds.
        """
        return cls(
            await psycopg.AsyncConnection.connect(
                url,
                autocommit=True,
                application_name="autotag operator",
                prepare_threshold=None,
                connect_timeout=seconds,
            )
        )

    async def __aenter__(self) -> Operator:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._connection.close()

    async def _value(self, statement: str, *arguments: object) -> Any:
        """Raises:
        Refused: with what the database says, and when to try again.
        """
        try:
            row = await (await self._connection.execute(statement, arguments)).fetchone()
        except psycopg.DatabaseError as error:
            if not (error.sqlstate or "").startswith("PT"):
                raise
            detail = json.loads(error.diag.message_detail or "{}")
            raise Refused(str(error.diag.message_primary), error.diag.message_hint, detail.get("retry_after")) from None
        return row[0] if row else None

    async def schema_version(self) -> str:
        return str(await self._value("select autotag.schema_version()"))

    async def diagnose(self) -> dict[str, Any]:
        """``{findings: [{check, level, message, fix}], now (epoch seconds), model, sample: {bucket, path}}``."""
        return cast("dict[str, Any]", await self._value("select autotag.diagnose()"))

    async def send_probe(self, nonce: str) -> None:
        await self._value("select autotag.send_probe(%s)", nonce)

    async def status(self) -> dict[str, Any]:
        """Everything that is going on; see ``autotag.status`` in the migrations."""
        return cast("dict[str, Any]", await self._value("select autotag.status()"))

    async def preview_backfill(self, workspace: str, untagged: bool, after: str | None, limit: int) -> dict[str, Any]:
        """``{images, seconds, cost, model}`` of bringing in existing images; cost None: the model has no price."""
        return cast("dict[str, Any]", await self._value(
            "select autotag.preview_backfill(%s, %s, %s, %s)", workspace, untagged, after, limit))  # fmt: skip

    async def backfill(self, workspace: str, untagged: bool, after: str | None, limit: int) -> dict[str, Any]:
        """``{job_id, images, last}`` of the next slice; ``last`` None: there are no more.

        Raises:
            Refused: with what the database says, and when to try again.
        """
        return cast("dict[str, Any]", await self._value(
            "select autotag.backfill(%s, %s, %s, %s)", workspace, untagged, after, limit))  # fmt: skip

    async def preview_comparison(self, workspace: str, model: str, effort: str | None, sample: int) -> dict[str, Any]:
        """What asking another model about tagged images would mean; see ``autotag.preview_comparison``.

        Raises:
            Refused: no such effort, no tagged image, or a quota does not allow it.
        """
        return cast("dict[str, Any]", await self._value(
            "select autotag.preview_comparison(%s, %s, %s, %s)", workspace, model, effort, sample))  # fmt: skip

    async def comparison_sample(self, workspace: str, sample: int) -> list[dict[str, Any]]:
        """The images to compare: asset_id, bucket, path, url, and the stored tags, caption, confidence and model."""
        return cast("list[dict[str, Any]]", await self._value(
            "select autotag.comparison_sample(%s, %s)", workspace, sample))  # fmt: skip

    async def admit_comparison(self, workspace: str, question: dict[str, Any], cap: int | None) -> dict[str, Any]:
        """A place for one call under all limits, or how long to wait for it.

        Raises:
            Refused: a quota does not allow it any more, or no limit can ever hold it.
        """
        return cast("dict[str, Any]", await self._value(
            "select autotag.admit_comparison(%s, %s, %s)", workspace, Jsonb(question), cap))  # fmt: skip

    async def settle_comparison(
        self, workspace: str, question: dict[str, Any], report: dict[str, Any], seen: dict[str, Any] | None
    ) -> dict[str, Any]:
        """Reports what came of one call, and learns what to do next about its image."""
        return cast("dict[str, Any]", await self._value(
            "select autotag.settle_comparison(%s, %s, %s, %s)",
            workspace, Jsonb(question), Jsonb(report), Jsonb(seen) if seen else None,
        ))  # fmt: skip

    async def usage(self, workspace: str, since: date, until: date) -> list[dict[str, Any]]:
        """Rows per user, day, model and service tier; cost None: the model has no price."""
        async with self._connection.cursor(row_factory=dict_row) as cursor:
            await cursor.execute("select * from autotag.list_usage(%s, %s, %s)", (workspace, since, until))
            return await cursor.fetchall()
