"""The errors of database calls that callers handle."""

from __future__ import annotations

import json
from typing import TypedDict, cast

import psycopg


class NotHeld(Exception):
    """Another worker holds the batch now, so this worker must stop working on it."""


class Busy(Exception):
    """Another transaction has locked something that the call needs. Nothing was done; call again later."""


class TooSlow(TimeoutError):
    """The call took too long and was cancelled. Nothing was done, unless it committed just before."""


class Lost(TooSlow):
    """The call lost its connection each time, although the server was reachable just before. So the call is probably
    the cause: a trigger ends its session, or a damaged row crashes the server process."""


class VersionsDiffer(Exception):
    """The versions of this worker and of the schema differ. ``hint`` says which one to upgrade."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Refusal(TypedDict, total=False):
    """The detail of a refused call (``autotag.refuse``), as far as the product uses it.

    retry_after: seconds. entry: number of the entry of a vocabulary that is wrong, from 1. name: what is wrong in it.
    """

    code: str
    retry_after: float | None
    entry: int
    name: str


class Refused(Exception):
    """The database refuses a call. retry_after: seconds until a retry can succeed; None: a retry does not help. detail:
    the error's detail (`refusal`)."""

    def __init__(
        self, message: str, hint: str | None, retry_after: float | None, detail: Refusal | None = None
    ) -> None:
        super().__init__(message)
        self.detail = detail or Refusal()
        self.hint = hint
        self.retry_after = retry_after


#: Exceptions of a call that the database, the host's rows or the arguments can cause.
CALL_ERRORS = (psycopg.Error, Busy, TooSlow)


def refusal(error: psycopg.Error) -> Refusal | None:
    """The detail of an error that `autotag.refuse` raised, with its ``code``; None: something else raised it. A trigger
    of the host's may raise the same SQLSTATE."""
    if "autotag.refuse(" not in (error.diag.context or "").partition("\n")[0]:
        return None
    return cast("Refusal", json.loads(error.diag.message_detail or "{}"))
