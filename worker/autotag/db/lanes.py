"""Messages from the database to the store lane and to automatic mode's lane."""

from __future__ import annotations

from dataclasses import dataclass

from autotag.db.messages import Notice


@dataclass(frozen=True)
class Unstored:
    """Workspaces with due outcomes that wait for the host's rows, and seconds until the next ones are due (None: no
    more wait)."""

    workspaces: list[str]
    wait: float | None


@dataclass(frozen=True)
class Stored:
    """The number of outcomes that were stored, whether more are due, and notices for the worker's log."""

    stored: int
    more: bool
    notices: list[Notice]


@dataclass(frozen=True)
class Sealed:
    """What `autotag.seal_uploads` did.

    Attributes:
        sealed: the number of jobs that were made, 0 or 1.
        more: another upload is due.
        wait: seconds until the next call; None: automatic mode is off.
        notices: for the worker's log.
    """

    sealed: int
    more: bool
    wait: float | None
    notices: list[Notice]
