"""Logs the sentences for the operator that the database returns with its results."""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from autotag.db.messages import Notice

log = structlog.get_logger(__name__)


def log_notices(notices: Iterable[Notice]) -> None:
    """Logs each notice as a warning, under the name of its event."""
    for notice in notices:
        log.warning(notice["event"], notice=notice["notice"])
