"""What the database says to a worker and to an operator."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, cast

from autotag.openai.prompt import Question

T = TypeVar("T")


class NotHeld(Exception):
    """The batch belongs to somebody else by now; the worker lets go of it."""


class VersionsDiffer(Exception):
    """This worker and the database's schema are of different versions; ``hint`` says which of them to change."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class Refused(Exception):
    """The database refuses; ``retry_after`` are seconds after which it may not (None: it always will)."""

    def __init__(self, message: str, hint: str | None, retry_after: float | None) -> None:
        super().__init__(message)
        self.hint = hint
        self.retry_after = retry_after


@dataclass(frozen=True)
class Image:
    """An image to tag and where it is: a Storage bucket and path, or a URL; neither when it is gone, or when it is
    ``refused``: ``foreign_file`` (its row names a file of somebody else), ``location_too_long`` or ``hidden_file``
    (whoever asked may not see it)."""

    task: int
    asset_id: str
    bucket: str | None
    path: str | None
    url: str | None
    cap: int = 0  # tokens that its answer may have
    attempt: int = 0
    job: str | None = None
    traceparent: str | None = None  # of the request that made the job
    waited: float = 0.0  # seconds from the upload to the claim
    refused: str | None = None


@dataclass(frozen=True)
class Claim:
    """Images for single calls, seconds until it is worth asking again (None: when notified), what kept the
    database from releasing more (None: there is no more), and what to ask about these images."""

    images: list[Image]
    wait: float | None
    bound: str | None
    question: Question


@dataclass(frozen=True)
class Settled:
    """How many reports were accepted, and sentences for the operator's log."""

    accepted: int
    notices: list[dict[str, str]]  # {event, notice}


@dataclass(frozen=True)
class Batch:
    """A batch in hand; ``state`` says where to go on (see the diagram in the batches migration)."""

    batch: str
    attempt: int
    state: str
    image_count: int
    since: float  # epoch seconds; what belongs to it at OpenAI is not older
    cancelled: bool
    openai_batch_id: str | None
    input_file_id: str | None
    output_file_id: str | None
    error_file_id: str | None
    keep_files: int | None = None  # seconds after which the provider is to delete its files; None: it takes no expiry


@dataclass(frozen=True)
class BatchClaim:
    """Batches to work on, and seconds until it is worth asking again; what to do at OpenAI now.

    ``poll`` are OpenAI ids to look at with the moment (epoch seconds) before which they were not created,
    ``cancel`` those to cancel first, ``files`` the files nobody needs any more. ``question`` is what to ask about these
    batches; ``look_up`` the model that the provider is to be asked about now.
    """

    batches: list[Batch]
    wait: float | None
    question: Question
    poll: dict[str, float] = field(default_factory=dict)
    cancel: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    look_up: str | None = None


def make(kind: type[T], described: dict[str, Any]) -> T:
    """A message of the database. What a newer schema says besides is left out: a patch release fits."""
    names = {field.name for field in fields(cast("Any", kind))}
    return kind(**{name: value for name, value in described.items() if name in names})
