"""One worker process: wake, claim, run, settle; heartbeat; stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import uuid
from collections.abc import AsyncIterator, Iterable

import psycopg
import structlog

import autotag
from autotag.config import Settings
from autotag.db import Database, Registered, VersionsDiffer, can_listen, listen
from autotag.http import webhook
from autotag.http.health import Health, make_app
from autotag.http.serve import serve
from autotag.images.load import Images
from autotag.observability.metrics import SystemMetrics
from autotag.openai.provider import Provider, fingerprint
from autotag.redact import safe_message
from autotag.worker import realtime
from autotag.worker.batch import BatchLane
from autotag.worker.broadcast import deliver_outbox
from autotag.worker.observations import Observations
from autotag.worker.outcomes import Outcomes
from autotag.worker.stages import Stages
from autotag.worker.tag import Tagger
from autotag.worker.wake import Wake

HEARTBEATS_PER_LEASE = 3  # two may get lost before a lease runs out
HEARTBEAT_RETRY = 1.0  # seconds after one that failed
SHUTDOWN_GRACE = 10.0  # seconds that the database may take for the last reports
OUTBOX_RETRY = 60.0  # seconds between looks where nothing notifies
CANCEL_AGAIN = 1.0  # seconds after a cancellation that had no effect

log = structlog.get_logger(__name__)


async def run_worker(settings: Settings) -> None:
    """Works until SIGTERM or SIGINT, then finishes or gives back what is in hand.

    Raises:
        psycopg.OperationalError, psycopg_pool.PoolTimeout: the database cannot be reached at the start.
        OSError: the address to serve on cannot be had.
    """
    wake = Wake()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, wake.request_stop)
    await Worker(settings, wake).run()


class Worker:
    """One worker, made from its settings."""

    def __init__(self, settings: Settings, wake: Wake) -> None:
        self._settings = settings
        self._wake = wake
        self._id = uuid.uuid4()
        self._url = str(settings.database_url)

    async def run(self) -> None:
        """Until the worker is asked to stop.

        Raises:
            psycopg.OperationalError, psycopg_pool.PoolTimeout: the database cannot be reached.
            OSError: the address to serve on cannot be had.
            VersionsDiffer: the schema is of another version, or has become so; what was in hand is handed back.
        """
        listening = await self._find_out_whether_listening()
        # What cannot LISTEN is a transaction pooler, and that cannot keep prepared statements either.
        db = Database(self._url, self._id, prepare=listening)
        await db.open()
        try:
            await _Shift(self._settings, self._wake, db).run()
        finally:
            await db.close()

    async def _find_out_whether_listening(self) -> bool:
        if await can_listen(self._url):
            return True
        self._wake.poll_every = self._settings.poll_interval
        log.warning(
            "listen_impossible",
            worker=str(self._id),
            hint="This looks like a transaction pooler (port 6543). The worker polls instead; use a direct or "
            "session-mode connection (port 5432) to be woken at once.",
            poll_interval=self._settings.poll_interval,
        )
        return False


class _Shift:
    """What a worker does while it is connected: registers, keeps its lease, runs both lanes, and hands over."""

    def __init__(self, settings: Settings, wake: Wake, db: Database) -> None:
        self._settings = settings
        self._wake = wake
        self._db = db
        self._log = log.bind(worker=str(db.worker))
        self._differs: VersionsDiffer | None = None

    async def run(self) -> None:
        """As `Worker.run`."""
        registered = await self._register()
        await self._work(registered.lease_seconds / HEARTBEATS_PER_LEASE)
        if self._differs:
            raise self._differs

    async def _register(self) -> Registered:
        """Introduces the worker. What to ask of the model comes with every claim."""
        settings = self._settings
        key = fingerprint(settings.openai_api_key.get_secret_value(), settings.openai_base_url)
        return await self._db.register(
            socket.gethostname(), autotag.__version__, self._wake.poll_every is None, settings.openai_base_url, key
        )

    async def _work(self, beat: float) -> None:
        """Both lanes and what helps them; ``beat`` seconds are between heartbeats."""
        settings, wake, db = self._settings, self._wake, self._db
        observations = Observations()
        stages = Stages(db, observations)
        outcomes = Outcomes(db, stages, observations)
        health = Health(beat)
        async with (
            Provider(
                settings.openai_api_key.get_secret_value(), settings.openai_base_url, settings.call_timeout
            ) as provider,
            Images(
                supabase_url=settings.supabase_url,
                supabase_key=settings.secret_key(),
                hosts=settings.image_hosts,
                max_bytes=settings.image_max_bytes,
                max_pixels=settings.image_max_pixels,
            ) as images,
            self._web(provider, health),
            asyncio.TaskGroup() as background,
        ):
            tagger = Tagger(images, provider, outcomes, stages, observations)
            batches = BatchLane(db, wake, images, provider, slots=settings.batch_slots, fetches=settings.fetches)
            helpers = [
                background.create_task(work)
                for work in (
                    *([listen(str(settings.database_url), wake.notify)] if wake.poll_every is None else []),
                    self._heartbeat(beat, health),
                    self._deliver(settings.secret_key()),
                    outcomes.settle_forever(),
                    stages.report_forever(),
                )
            ]
            self._log.info("worker_started", slots=settings.slots)
            async with asyncio.TaskGroup() as lanes:
                lanes.create_task(realtime.run(db, wake, settings.slots, tagger.tag, settings.stop_deadline))
                lanes.create_task(batches.run(settings.stop_deadline))
            await self._hand_over(outcomes)
            await _end(helpers)
        self._log.info("worker_stopped")

    async def _hand_over(self, outcomes: Outcomes) -> None:
        """Settles what is done and gives back the rest; without a database the lease does the latter."""
        try:
            async with asyncio.timeout(SHUTDOWN_GRACE):
                await outcomes.idle.wait()
                given_back = await self._db.release()
                self._log.info("handed_over", given_back=given_back)
        except (TimeoutError, psycopg.Error):
            self._log.error("hand_over_failed", hint="The database did not answer; what was in hand goes back later.")

    @contextlib.asynccontextmanager
    async def _web(self, provider: Provider, health: Health) -> AsyncIterator[None]:
        """Serves health and metrics, and OpenAI's webhook, each where an address is set.

        The webhook has a port of its own: who can reach that must not be able to keep health checks waiting.
        """
        settings = self._settings

        async def receive(webhook_id: str, kind: str, batch: str) -> str:
            result = await self._db.receive_webhook(webhook_id, kind, batch)
            self._wake.notify("batch")  # also where no notification can come
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
                self._log.info("serving", address=address)
            yield

    async def _heartbeat(self, seconds: float, health: Health) -> None:
        pause = seconds
        while True:
            await self._wake.sleep("version", pause)  # at once when the schema has changed
            pause = seconds
            try:
                alive = await self._db.heartbeat()
                if not alive and not self._wake.stop.is_set():  # a worker that stops has handed over already
                    self._log.error("lease_lost", hint="The database was out of reach for longer than the lease.")
                    await self._register()
            except VersionsDiffer as error:
                self._log.error("version_differs", error=str(error), hint=error.hint)
                self._differs = error
                self._wake.request_stop()
                return
            except psycopg.Error as error:
                self._log.error("heartbeat_failed", error=safe_message(error))
                pause = HEARTBEAT_RETRY
            health.beat()

    async def _deliver(self, key: str | None) -> None:
        while not self._wake.stop.is_set():
            await self._wake.wait("outbox", OUTBOX_RETRY if self._wake.poll_every else None)
            await deliver_outbox(self._db, self._settings.supabase_url, key)


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancels tasks until they have ended: `asyncio.wait_for`, by which the pool waits for a connection, loses a
    cancellation that comes together with what it waits for (before Python 3.12)."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=CANCEL_AGAIN)
