"""Automatic mode: makes jobs of complete uploads."""

from __future__ import annotations

import psycopg
import structlog
from psycopg_pool import PoolTimeout

from autotag.db import CALL_ERRORS, Database, TooSlow
from autotag.redact import safe_message
from autotag.worker.notices import log_notices
from autotag.worker.wake import Wake

SEAL_RETRY = 1.0  # seconds to wait after a failed call
QUIET_AFTER = 3  # after this many calls that lost their connection, stages are not shown on the rows
IDLE = 60.0  # seconds between two calls while automatic mode is off; a notification announces that it is turned on

log = structlog.get_logger(__name__)


async def run(db: Database, wake: Wake) -> None:
    """Seals uploads until the worker stops.

    The database returns when to call again. While automatic mode is on, that is at most ``upload_quiet`` later, so no
    insert has to notify a worker. If several calls lose their connection, writing a row probably ends the session. Then
    the upload is sealed without showing the stage on its rows.
    """
    losses = 0  # in a row
    while not wake.stop.is_set():
        try:
            sealed = await db.seal_uploads(quiet=losses >= QUIET_AFTER)
            losses = 0
        except CALL_ERRORS as error:
            event = "seal_postponed" if isinstance(error, TooSlow) else "seal_failed"
            log.error(event, error=safe_message(error))
            losses = losses + 1 if _is_loss(error) else 0
            await wake.pause(SEAL_RETRY)
            continue
        log_notices(sealed.notices)
        if not sealed.more:
            await wake.wait("uploads", IDLE if sealed.wait is None else sealed.wait)


def _is_loss(error: BaseException) -> bool:
    """Whether an existing connection was lost."""
    return isinstance(error, psycopg.OperationalError) and not isinstance(error, PoolTimeout)
