"""One worker process: connects, registers, runs the lanes and the heartbeat, and shuts down."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from typing import Any

import psycopg
import structlog

import autotag
from autotag.config import Settings
from autotag.db import CALL_ERRORS, Database, VersionsDiffer, can_listen, listen
from autotag.http import webhook
from autotag.http.health import Health, make_app
from autotag.http.serve import serve
from autotag.images.children import hide_from_children
from autotag.images.load import Images
from autotag.observability.metrics import SystemMetrics
from autotag.openai.provider import Provider, fingerprint
from autotag.redact import safe_message
from autotag.worker import realtime, uploads
from autotag.worker.batch import BatchLane
from autotag.worker.broadcast import deliver_outbox
from autotag.worker.claims import Claims
from autotag.worker.observations import Observations
from autotag.worker.outcomes import Outcomes
from autotag.worker.slow import SlowWorkspaces
from autotag.worker.stages import Stages
from autotag.worker.store import StoreLane
from autotag.worker.tag import Tagger
from autotag.worker.wake import Wake

HEARTBEATS_PER_LEASE = 3  # two heartbeats can fail before the lease ends
HEARTBEAT_RETRY = 1.0  # seconds to wait after a failed heartbeat
TICK_PAUSE = 0.5  # seconds between ticks; each tick releases the work of one dead worker
RESTART_DELAY = 1.0  # seconds until a background task that raised an exception is restarted
SHUTDOWN_GRACE = 10.0  # seconds at shutdown for the last reports to the database
RELEASE_GRACE = 3.0  # seconds after that for releasing the other work
OUTBOX_RETRY = 60.0  # seconds between checks of the outbox where LISTEN is impossible
CANCEL_RETRY = 1.0  # seconds to wait after a cancellation that had no effect

log = structlog.get_logger(__name__)


async def run_worker(settings: Settings) -> None:
    """Runs a worker until SIGTERM or SIGINT, then finishes or releases its work.

    Raises:
        psycopg.OperationalError, psycopg_pool.PoolTimeout: the database cannot be reached at the start.
        OSError: a port cannot be opened.
        VersionsDiffer: the schema has another version.
    """
    hide_from_children()
    wake = Wake()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, wake.request_stop)
    await Worker(settings, wake).run()


class Worker:
    """One worker process."""

    def __init__(self, settings: Settings, wake: Wake) -> None:
        self._settings = settings
        self._wake = wake
        self._id = uuid.uuid4()
        self._url = str(settings.database_url)

    async def run(self) -> None:
        """Runs until the worker is asked to stop.

        Raises:
            psycopg.OperationalError, psycopg_pool.PoolTimeout: the database cannot be reached.
            OSError: a port cannot be opened.
            VersionsDiffer: the schema has another version, or was upgraded; all work has been released.
        """
        listening = await self._detect_listen()
        # Behind a transaction pooler, both LISTEN and prepared statements are impossible.
        db = Database(self._url, self._id, prepare=listening)
        await db.open()
        try:
            await _ConnectedWorker(self._settings, self._wake, db).run()
        finally:
            await db.close()

    async def _detect_listen(self) -> bool:
        if await can_listen(self._url):
            return True
        self._wake.poll_every = self._settings.poll_interval
        log.warning(
            "listen_refused",
            worker=str(self._id),
            hint="This looks like a transaction pooler (port 6543). The worker polls instead; use a direct or "
            "session-mode connection (port 5432) to be woken at once.",
            poll_interval=self._settings.poll_interval,
        )
        return False


class _ConnectedWorker:
    """A worker with its database: registers, keeps its lease, runs the lanes, and releases its work at the end."""

    def __init__(self, settings: Settings, wake: Wake, db: Database) -> None:
        self._settings = settings
        self._wake = wake
        self._url = str(settings.database_url)
        self._db = db
        self._log = log.bind(worker=str(db.worker))
        self._version_error: VersionsDiffer | None = None
        self._claims, self._batch_claims = Claims(), Claims()
        self._tick_due = asyncio.Event()
        self._pause = 0.0  # seconds between heartbeats; follows from the lease in the database's last reply

    async def run(self) -> None:
        """See `Worker.run`."""
        await self._register()
        await self._work()
        if self._version_error:
            raise self._version_error

    async def _register(self) -> None:
        """Registers the worker. The question to the model is not included: it comes with every claim."""
        settings = self._settings
        key = fingerprint(settings.openai_api_key.get_secret_value(), settings.openai_base_url)
        registered = await self._db.register(
            socket.gethostname(), autotag.__version__, self._wake.poll_every is None, settings.openai_base_url, key
        )
        self._pause = registered.lease_seconds / HEARTBEATS_PER_LEASE

    async def _work(self) -> None:
        """Runs all lanes and the background tasks."""
        settings, wake, db = self._settings, self._wake, self._db
        observations, slow = Observations(), SlowWorkspaces()
        stages = Stages(db, observations, slow)
        outcomes = Outcomes(db, stages, observations, self._claims, slow)
        health = Health(self._pause)
        async with (
            Provider(
                settings.openai_api_key.get_secret_value(), settings.openai_base_url, settings.call_timeout
            ) as provider,
            Images(
                supabase_url=settings.supabase_url,
                supabase_key=settings.secret_key(),
                hosts=settings.image_hosts,
                max_bytes=settings.image_max_bytes,
                memory=settings.memory_bytes(),
                transform=settings.storage_transform,
            ) as images,
            self._web(provider, health),
            asyncio.TaskGroup() as background,
        ):
            tagger = Tagger(images, provider, outcomes, stages, observations, self._db.briefs)
            batches = BatchLane(
                db, wake, self._batch_claims, images, provider, slots=settings.batch_slots, fetches=settings.fetches,
                follow_up=stages.follow_up,
            )  # fmt: skip
            helper_tasks = [
                background.create_task(_keep_running(work))
                for work in (
                    *([self._listen] if wake.poll_every is None else []),
                    lambda: self._heartbeat(health),
                    self._tick,
                    self._deliver_outbox,
                    StoreLane(db, wake, slow, stages.follow_up).run,
                    lambda: uploads.run(db, wake),
                    outcomes.run,
                    stages.run,
                )
            ]
            self._log.info("worker_started", slots=settings.slots)
            async with asyncio.TaskGroup() as lanes:
                lanes.create_task(
                    realtime.run(db, wake, self._claims, stages, settings.slots, tagger.tag, settings.stop_deadline)
                )
                lanes.create_task(batches.run(settings.stop_deadline))
            await self._release_work(outcomes)
            await _cancel_all(helper_tasks)
        self._log.info("worker_stopped")

    async def _release_work(self, outcomes: Outcomes) -> None:
        """Waits until all outcomes are settled, and releases the other work. If the database is unreachable, it
        releases the work when the lease ends."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHUTDOWN_GRACE):
                await outcomes.idle.wait()
        try:
            async with asyncio.timeout(RELEASE_GRACE):
                released = await self._db.release()
                self._log.info("work_released", released=released)
        except (TimeoutError, psycopg.Error):
            hint = "The database did not answer. The work is released when the lease ends."
            self._log.error("release_failed", hint=hint)

    @contextlib.asynccontextmanager
    async def _web(self, provider: Provider, health: Health) -> AsyncIterator[None]:
        """Serves health and metrics, and OpenAI's webhook, each on its own port if its address is set.

        The ports are separate so that requests from the Internet to the webhook cannot delay health checks.
        """
        settings = self._settings

        async def receive(webhook_id: str, kind: str, batch: str) -> str:
            result = await self._db.receive_webhook(webhook_id, kind, batch)
            self._wake.notify("batch")  # a poll, even if LISTEN is impossible
            return result

        apps = []
        if settings.http:
            apps.append((settings.http, make_app(health, SystemMetrics(self._db.metrics))))
        if settings.webhook and settings.openai_webhook_secret:
            secret = settings.openai_webhook_secret.get_secret_value()
            apps.append((settings.webhook, webhook.make_app(provider, secret, receive)))
        async with contextlib.AsyncExitStack() as open_ports:
            for address, app in apps:
                host, _, port = address.rpartition(":")
                await open_ports.enter_async_context(serve(app, host.strip("[]"), int(port), guarded=True))
                self._log.info("port_opened", address=address)
            yield

    async def _listen(self) -> None:
        await listen(self._url, self._wake.notify)

    async def _heartbeat(self, health: Health) -> None:
        pause = self._pause
        while True:
            await self._wake.sleep("version", pause)  # without a delay after an upgrade of the schema
            try:
                await self._beat()
                pause = self._pause
            except VersionsDiffer as error:
                self._log.error("version_refused", error=str(error), hint=error.hint)
                self._version_error = error
                self._wake.request_stop()
                return
            except CALL_ERRORS as error:
                self._log.error("heartbeat_failed", error=safe_message(error))
                pause = min(HEARTBEAT_RETRY, self._pause)
            health.beat(self._pause)

    async def _beat(self) -> None:
        beat = await self._db.heartbeat(self._claims.listed(), self._batch_claims.listed())
        self._pause = beat.settings.lease_seconds / HEARTBEATS_PER_LEASE
        if not beat.alive and not self._wake.stop.is_set():  # a stopping worker has released its lease itself
            self._log.error("lease_lost", hint="The database was unreachable for longer than the lease.")
            await self._register()
        elif beat.lost:
            released = await self._db.release_lost(self._claims.listed(), self._batch_claims.listed())
            if released:
                self._log.warning("claims_lost", released=released)
        if beat.tick_due:
            self._tick_due.set()

    async def _tick(self) -> None:
        """Runs the database's periodic work when a heartbeat says that it is due. It takes many locks and may wait, so
        heartbeats continue meanwhile."""
        while True:
            await self._tick_due.wait()
            self._tick_due.clear()
            more = True
            while more:  # one call for each worker whose lease has ended
                more = await self._db.tick_if_due()
                await asyncio.sleep(TICK_PAUSE if more else 0)

    async def _deliver_outbox(self) -> None:
        key = self._settings.secret_key()
        while not self._wake.stop.is_set():
            await self._wake.wait("outbox", OUTBOX_RETRY if self._wake.poll_every else None)
            await deliver_outbox(self._db, self._settings.supabase_url, key)


async def _keep_running(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Runs a background task until it ends. After an error, it is restarted, because no data may end a worker."""
    while True:
        try:
            await work()
            return
        except Exception:
            log.exception("task_failed")
            await asyncio.sleep(RESTART_DELAY)


async def _cancel_all(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels tasks, repeatedly, until they have ended.

    Before Python 3.12, one cancellation is not enough: the pool waits for a connection with `asyncio.wait_for`, which
    loses a cancellation that arrives at the same time as the result.
    """
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_RETRY)
