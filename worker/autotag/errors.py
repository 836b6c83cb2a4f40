"""Errors of tagging an image, and the consequences of each error kind.

The worker classifies an error (kind, code, origin). The database decides what follows (``autotag.error_kinds``,
``autotag.apply_answers``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:  # decoding processes import this module, and must not import the database's client
    from autotag.db.messages import ErrorReport, Kind, Limits, Origin


class Consequence(NamedTuple):
    """Consequences of an error kind: the same as its row in ``autotag.error_kinds`` (a test compares them).

    Attributes:
        counts: the error counts as a failure of its image.
        delays: the image waits before its next try.
        pauses: tagging is paused until one image succeeds.
        ends: the image fails, unless ``retry`` is set.
        suspects: codes that may be caused by the image itself, so they also count as failures of the image.
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
        kind: ``transient`` (temporary or unknown: retried later), ``rate_limit`` (retried when the provider allows
            it), ``account`` (key, credit, model, address or unsupported request: tagging is paused until an image
            succeeds), ``image`` (only this image is affected).
        code: stable name of the error, for programs.
        message: a sentence for the user who uploaded the image; for the kind ``account``, a sentence for the operator.
        retry: for kind ``image``: another answer may be usable.
        retry_after: seconds to wait, if the provider sent them.
        limits: the provider's rate limits from the answer's headers (`headers.read_limits`).
        origin: where the error comes from.
        parameter: the part of the request that the provider does not support: ``token_cap``, ``reasoning_effort``,
            ``response_format``, ``detail``, ``service_tier`` or ``expires_after``.
        about_request: the provider refuses something about this request (its length, its schema, a parameter), so it
            may accept other requests. False: the error is about key, credit, model or address.
        status: HTTP status of the answer; None without an answer.
    """

    def __init__(
        self, kind: Kind, code: str, message: str, *, retry: bool = False, retry_after: float | None = None,
        limits: Limits | None = None, origin: Origin = "worker", parameter: str | None = None,
        about_request: bool = False, status: int | None = None,
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
        self.about_request = about_request
        self.status = status

    def as_json(self) -> ErrorReport:
        """The error in the form that ``autotag.clean_error`` expects."""
        return {
            "kind": self.kind, "code": self.code, "message": self.message, "retry": self.retry,
            "retry_after": self.retry_after, "origin": self.origin, "parameter": self.parameter,
            "about_request": self.about_request,
        }  # fmt: skip


def image_error(code: str, message: str, *, retry: bool = False, parameter: str | None = None) -> TaggingError:
    """An error of kind ``image``."""
    return TaggingError("image", code, message, retry=retry, parameter=parameter)
