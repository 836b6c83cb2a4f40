"""Automatic mode: makes jobs of complete uploads."""

from __future__ import annotations

import psycopg
import structlog

from autotag.db import Database
from autotag.redact import safe_message
from autotag.worker.wake import Wake

SEAL_RETRY = 1.0  # seconds to wait after a failed call
IDLE = 60.0  # seconds between two calls while automatic mode is off; a notification says when it is turned on

log = structlog.get_logger(__name__)


async def run(db: Database, wake: Wake) -> None:
    """Seals uploads until the worker stops.

    The database says when to call again. While automatic mode is on, that is at most ``upload_quiet`` later, so no
    insert has to notify a worker.
    """
    while not wake.stop.is_set():
        try:
            sealed = await db.seal_uploads()
        except psycopg.Error as error:
            log.error("seal_failed", error=safe_message(error))
            await wake.pause(SEAL_RETRY)
            continue
        for notice in sealed.notices:
            log.warning(notice["event"], notice=notice["notice"])
        if not sealed.more:
            await wake.wait("uploads", IDLE if sealed.wait is None else sealed.wait)
