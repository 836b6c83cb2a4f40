"""Automatic mode: makes jobs of complete uploads."""

from __future__ import annotations

import structlog

from autotag.db import CALL_ERRORS, Database, TooSlow
from autotag.redact import safe_message
from autotag.worker.notices import log_notices
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
        except CALL_ERRORS as error:
            event = "seal_slow" if isinstance(error, TooSlow) else "seal_failed"
            log.error(event, error=safe_message(error))
            await wake.pause(SEAL_RETRY)
            continue
        log_notices(sealed.notices)
        if not sealed.more:
            await wake.wait("uploads", IDLE if sealed.wait is None else sealed.wait)
