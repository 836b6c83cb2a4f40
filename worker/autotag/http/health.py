"""What a worker serves to those who run it: health and metrics.

``/healthz`` is 503 when this process is stuck and only a restart helps; ``/readyz`` when the database is out of reach
or tagging stands still (the AI provider or Storage refuses everything), which a restart does not mend.
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

MISSED_BEATS = 3  # heartbeats that do not even fail: then the process is stuck


class Health:
    """Whether the heart beats."""

    def __init__(self, interval: float) -> None:
        """``interval``: seconds between heartbeats."""
        self._patience = interval * MISSED_BEATS
        self._beat_at = time.monotonic()

    def beat(self) -> None:
        """A heartbeat has come back, whether it worked or not."""
        self._beat_at = time.monotonic()

    def trouble(self) -> str | None:
        """Why the process has to be restarted, if it has to."""
        silent = time.monotonic() - self._beat_at
        return f"No heartbeat has come back for {silent:.0f} s." if silent > self._patience else None


def make_app(health: Health, metrics: SystemMetrics) -> Starlette:
    """The application: ``GET /healthz``, ``/readyz`` and ``/metrics``."""

    async def healthz(_: Request) -> Response:
        return _answer(health.trouble())

    async def readyz(_: Request) -> Response:
        try:
            stopped = await metrics.is_stopped()
        except (psycopg.Error, psycopg_pool.PoolTimeout, TimeoutError) as error:
            return _answer(f"The database did not answer: {type(error).__name__}.")
        return _answer(health.trouble() or ("Tagging stands still; see autotag status." if stopped else None))

    async def scrape(_: Request) -> Response:
        try:
            return Response(await metrics.scrape(), media_type=CONTENT_TYPE_LATEST)
        except (psycopg.Error, psycopg_pool.PoolTimeout, TimeoutError) as error:
            return _answer(f"The database did not answer: {type(error).__name__}.")

    app = Starlette(routes=[Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", scrape)])
    app.router.redirect_slashes = False  # it builds a URL from the client's Host header, whatever that holds
    return app


def _answer(trouble: str | None) -> Response:
    return JSONResponse({"ok": trouble is None, "reason": trouble}, 503 if trouble else 200)
