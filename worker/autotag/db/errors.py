"""The errors of database calls that callers handle."""

from __future__ import annotations

import json
from typing import Any

import psycopg


class NotHeld(Exception):
    """Another worker holds the batch now, so this worker must stop working on it."""


class Busy(Exception):
    """Another transaction holds what the call needs. Nothing was done; call again later."""


class TooSlow(TimeoutError):
    """The call took too long and was cancelled. Nothing was done, unless it had just been committed."""


class Lost(TooSlow):
    """The call lost its connection each time while it ran, although the server could be reached before. So the call is
    probably the cause: a trigger ends its session, or a damaged row crashes the server process."""


class VersionsDiffer(Exception):
    """The versions of this worker and of the schema differ. ``hint`` says which one to upgrade."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Refused(Exception):
    """The database refuses a call. retry_after: seconds until a retry can succeed; None: a retry does not help. detail:
    what else it says (`refusal`)."""

    def __init__(
        self, message: str, hint: str | None, retry_after: float | None, detail: dict[str, Any] | None = None
    ) -> None:
        super().__init__(message)
        self.detail = detail or {}
        self.hint = hint
        self.retry_after = retry_after


#: What a call raises if the database, the host's rows or the arguments are the cause.
CALL_ERRORS = (psycopg.Error, Busy, TooSlow)


def refusal(error: psycopg.Error) -> dict[str, Any] | None:
    """The detail of an error that `autotag.refuse` raised, with its ``code``; None: something else raised it. A trigger
    of the host's may raise the same SQLSTATE."""
    if "autotag.refuse(" not in (error.diag.context or "").partition("\n")[0]:
        return None
    detail: dict[str, Any] = json.loads(error.diag.message_detail or "{}")
    return detail
