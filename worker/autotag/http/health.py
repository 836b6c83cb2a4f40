"""A worker's port for operators: health and metrics.

``/healthz`` returns 503 if this process is stuck, so that only a restart helps. ``/readyz`` also returns 503 if the
database is unreachable or tagging is paused (the AI provider or Storage refuses the account); a restart does not help.
"""

from __future__ import annotations

import time

import psycopg
import psycopg_pool
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from autotag.observability.metrics import SystemMetrics

MAX_MISSED_BEATS = 3  # missed heartbeats (no result, not even an error) until the process counts as stuck


class Health:
    """Detects a process whose heartbeats have stopped."""

    def __init__(self, interval: float) -> None:
        """``interval``: seconds between heartbeats."""
        self._max_silence = interval * MAX_MISSED_BEATS
        self._beat_at = time.monotonic()

    def beat(self, interval: float) -> None:
        """Notes that a heartbeat has ended, with or without an error. ``interval``: seconds until the next
        heartbeat."""
        self._max_silence = interval * MAX_MISSED_BEATS
        self._beat_at = time.monotonic()

    def problem(self) -> str | None:
        """Why the process must be restarted; None if it is healthy."""
        silence = time.monotonic() - self._beat_at
        return f"No heartbeat has ended for {silence:.0f} s." if silence > self._max_silence else None


def make_app(health: Health, metrics: SystemMetrics) -> Starlette:
    """The application: ``GET /healthz``, ``/readyz`` and ``/metrics``."""

    async def healthz(_: Request) -> Response:
        return _respond(health.problem())

    async def readyz(_: Request) -> Response:
        try:
            paused = await metrics.is_paused()
        except (psycopg.Error, psycopg_pool.PoolTimeout, TimeoutError) as error:
            return _respond(f"The database did not answer: {type(error).__name__}.")
        return _respond(health.problem() or ("Tagging is paused; see autotag status." if paused else None))

    async def scrape(_: Request) -> Response:
        try:
            return Response(await metrics.scrape(), media_type=CONTENT_TYPE_LATEST)
        except (psycopg.Error, psycopg_pool.PoolTimeout, TimeoutError) as error:
            return _respond(f"The database did not answer: {type(error).__name__}.")

    app = Starlette(routes=[Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", scrape)])
    app.router.redirect_slashes = False  # redirects would contain the client's Host header, which is not trusted
    return app


def _respond(problem: str | None) -> Response:
    return JSONResponse({"ok": problem is None, "reason": problem}, 503 if problem else 200)
