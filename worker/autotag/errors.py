"""What can go wrong with an image, and what follows from it.

The database decides what happens (``autotag.error_kinds``, ``autotag.apply_answers``); the worker only says of which
kind an error is, and where it comes from.
"""

from __future__ import annotations

from typing import NamedTuple

from autotag.db.messages import ErrorReport, Kind, Limits, Origin


class Consequence(NamedTuple):
    """What follows from an error of a kind; the same table as ``autotag.error_kinds`` (a test compares them).

    counts: each one counts as a failure of its image. delays: the image waits before its next try. pauses: nothing is
    tagged until one image that tries succeeds. ends: the image fails, unless ``retry`` is set. suspects: codes with
    which it may be the image's after all, so that these count, too.
    """

    counts: bool
    delays: bool
    pauses: bool
    ends: bool
    suspects: tuple[str, ...] = ()


KINDS: dict[Kind, Consequence] = {
    "transient": Consequence(counts=True, delays=True, pauses=False, ends=False),
    "rate_limit": Consequence(counts=False, delays=False, pauses=False, ends=False),
    "account": Consequence(
        counts=False, delays=True, pauses=True, ends=False, suspects=("http_413", "context_too_small")
    ),
    "image": Consequence(counts=True, delays=False, pauses=False, ends=True),
}


class TaggingError(Exception):
    """An image was not tagged this time.

    Args:
        kind: ``transient`` (nobody's fault: again later), ``rate_limit`` (again when the provider says so),
            ``account`` (key, credit, model, address, unsupported request: the lanes pause until it works), ``image``
            (this image only).
        code: stable, for programs.
        message: a sentence that the user who uploaded the image understands; of kind account, for the operator.
        retry: for ``image``: another answer may help.
        retry_after: seconds, where the provider named them.
        limits: what the answer's headers said of the provider's bucket (`headers.read_limits`).
        origin: who complained.
        parameter: the part of our request that the provider does not take: ``token_cap``, ``reasoning_effort``,
            ``response_format``, ``detail``, ``service_tier`` or ``expires_after``.
        status: of HTTP, where the provider answered.
    """

    def __init__(
        self, kind: Kind, code: str, message: str, *, retry: bool = False, retry_after: float | None = None,
        limits: Limits | None = None, origin: Origin = "worker", parameter: str | None = None,
        status: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.kind: Kind = kind
        self.code = code
        self.message = message
        self.retry = retry
        self.retry_after = retry_after
        self.limits: Limits = limits or {}
        self.origin: Origin = origin
        self.parameter = parameter
        self.status = status

    def as_json(self) -> ErrorReport:
        """The error as the database takes it."""
        return {
            "kind": self.kind, "code": self.code, "message": self.message, "retry": self.retry,
            "retry_after": self.retry_after, "origin": self.origin, "parameter": self.parameter,
        }  # fmt: skip


def image_error(code: str, message: str, *, retry: bool = False, parameter: str | None = None) -> TaggingError:
    """An error of this image alone."""
    return TaggingError("image", code, message, retry=retry, parameter=parameter)
