"""What can go wrong with an image, and what follows from it.

The database decides what happens (``autotag.apply_answers``); the worker only says of which kind an error is.
"""

from __future__ import annotations

from typing import Any, Literal

Kind = Literal["transient", "rate_limit", "account", "image"]


class TaggingError(Exception):
    """An image was not tagged this time.

    Args:
        kind: ``transient`` (nobody's fault: again later), ``rate_limit`` (again when the provider says so),
            ``account`` (key, quota or model: the lane stops until it works), ``image`` (this image only).
        code: stable, for programs.
        message: a sentence that the user who uploaded the image understands.
        retry: for ``image``: another try may help.
        retry_after: seconds, where the provider named them.
        limits: what the answer's headers said of the provider's bucket (`provider.read_limits`).
    """

    def __init__(
        self, kind: Kind, code: str, message: str, *, retry: bool = False, retry_after: float | None = None,
        limits: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.kind: Kind = kind
        self.code = code
        self.message = message
        self.retry = retry
        self.retry_after = retry_after
        self.limits = limits or {}

    def as_json(self) -> dict[str, Any]:
        """The error as ``autotag.settle`` takes it."""
        return {
            "kind": self.kind, "code": self.code, "message": self.message,
            "retry": self.retry, "retry_after": self.retry_after,
        }  # fmt: skip


def image_error(code: str, message: str, *, retry: bool = False) -> TaggingError:
    """An error of this image alone."""
    return TaggingError("image", code, message, retry=retry)
