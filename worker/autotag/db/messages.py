"""The messages between a worker (or an operator's command) and the database.

What a worker acts on is a frozen dataclass, made by `make`, which leaves out what a newer schema adds. What it reports,
and rows that are only shown or handed on, are TypedDicts. tests/integration/test_messages.py compares all with the SQL.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NotRequired, Required, TypedDict, TypeVar, cast

T = TypeVar("T")

#: What follows from an error (``autotag.error_kinds``).
Kind = Literal["transient", "rate_limit", "account", "image"]
#: Who complained: the AI provider, Storage, the host of an image's URL, or this worker.
Origin = Literal["provider", "storage", "host", "worker"]
#: Where an image is, as far as a worker says so.
Stage = Literal["preparing", "submitted", "processing", "completing"]


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


# -- what a worker gets


@dataclass(frozen=True)
class Question:
    """What the database wants asked of the model (``autotag.question_for``), the same for all images of a claim.

    version: changes with anything else. reasoning_effort, service_tier: None: not sent. cap_parameter: the name that
    the provider has for the cap of an answer. answer_format: how it is told of the schema; without ``json_schema`` the
    schema stands in the instructions. sends_detail: whether it takes ``detail``.
    """

    version: int
    model: str
    image_detail: Literal["low", "high"]
    max_tags: int
    tag_language: str
    reasoning_effort: str | None = None
    service_tier: str | None = None
    cap_parameter: Literal["max_completion_tokens", "max_tokens", "none"] = "max_completion_tokens"
    answer_format: Literal["json_schema", "json_object", "text"] = "json_schema"
    sends_detail: bool = True


@dataclass(frozen=True)
class Registered:
    """What a worker learns when it registers (``autotag.worker_settings``): seconds of its lease, and bytes that a
    batch's input file may have."""

    lease_seconds: float
    batch_max_bytes: int


@dataclass(frozen=True)
class DatabaseSettings:
    """What the database's settings are for what was claimed: the question is that of the claim, the rest as of the
    worker's last registration (`Registered`)."""

    question: Question
    lease_seconds: float
    batch_max_bytes: int


@dataclass(frozen=True)
class Image:
    """An image to tag and where it is: a Storage bucket and path, or a URL; neither when it is gone, or when it is
    ``refused``: ``foreign_file`` (its row names a file of somebody else) or ``hidden_file`` (whoever asked may not see
    it)."""

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
    database from releasing more (None: there is no more), and the settings for these images."""

    images: list[Image]
    wait: float | None
    bound: str | None
    settings: DatabaseSettings


class Notice(TypedDict):
    """A sentence for the operator's log, and the event's name there."""

    event: str
    notice: str


@dataclass(frozen=True)
class Settled:
    """How many reports were accepted, and sentences for the operator's log."""

    accepted: int
    notices: list[Notice]


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
class Submitted:
    """A batch to look at: OpenAI's id, and the moment (epoch seconds) before which it was not created."""

    id: str
    since: float


@dataclass(frozen=True)
class BatchClaim:
    """Batches to work on, and seconds until it is worth asking again; what to do at OpenAI now.

    ``poll`` are batches to look at, ``cancel`` the OpenAI ids of those to cancel first, ``files`` the files nobody
    needs any more. ``settings`` are those for these batches; ``look_up`` is the model that the provider is to be asked
    about now.
    """

    batches: list[Batch]
    wait: float | None
    settings: DatabaseSettings
    poll: list[Submitted] = field(default_factory=list)
    cancel: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    look_up: str | None = None


class Broadcast(TypedDict):
    """A message that waits in ``autotag.outbox``, as Realtime's HTTP endpoint takes it."""

    topic: str
    event: str
    payload: dict[str, Any]
    private: bool


class Metrics(TypedDict):
    """Counts and ages (seconds) of the whole system (``autotag.metrics``)."""

    queued: int
    queued_workspaces: int
    oldest_queued: float | None
    delayed: int
    live: int
    work: int
    batches: dict[str, int]  # by state
    oldest_batch: float | None
    requests_left: float
    requests_per_minute: int
    tokens_left: float
    tokens_per_minute: int
    blocked_seconds: float
    account_error: int  # 1: tagging stands still
    workers: int
    outbox: int
    oldest_message: float | None
    images_today: int
    cost_today: float
    unpriced_today: int
    shutdown_days: int | None


# -- what a worker reports


class ErrorReport(TypedDict, total=False):
    """What went wrong, as ``autotag.clean_error`` takes it; `autotag.errors.TaggingError` says what the fields mean."""

    kind: Required[Kind]
    code: str
    message: str
    retry: bool
    retry_after: float | None
    origin: Origin
    parameter: str | None


class Usage(TypedDict):
    """The provider's own figures of one answer, in tokens (``autotag.clean_usage``); ``model`` answered, ``tier`` is
    what it was billed in (None: the provider does not say)."""

    input: int
    cached: int
    cache_write: int
    output: int
    reasoning: int
    model: str | None
    tier: str | None


class TagResult(TypedDict):
    """What is stored of an answer (``autotag.clean_result``): tags, the surest first; from 0 to 1 how sure the model is
    of each, where it said so; a sentence; and the model that answered."""

    tags: list[str]
    confidence: dict[str, float]
    caption: str
    model: str


class Outcome(TypedDict):
    """What came of one single call: a result or an error. usage: whenever the provider answered. called: whether it was
    asked at all."""

    called: bool
    usage: NotRequired[Usage | None]
    result: NotRequired[TagResult]
    error: NotRequired[ErrorReport]


class Report(Outcome):
    """An `Outcome` with its task, as ``autotag.settle`` takes it."""

    task: int
    attempt: int


class BatchAnswer(TypedDict):
    """A line of a batch's output as ``autotag.batch_answers`` takes it: a result or an error."""

    task: int
    usage: NotRequired[Usage | None]
    result: NotRequired[TagResult]
    error: NotRequired[ErrorReport]


class StageReport(TypedDict):
    """Where an image is, as ``autotag.report_stages`` takes it."""

    task: int
    attempt: int
    stage: Stage


class Limits(TypedDict, total=False):
    """What an answer's headers say of the provider's bucket: requests and tokens a minute, what is left of them, and
    seconds that it asks to wait."""

    requests_limit: int
    requests_left: int
    tokens_limit: int
    tokens_left: int
    retry_after: float | None


class Sent(TypedDict):
    """Released calls that were sent (or never will be), and seconds since the first of them was (``record_sent``)."""

    sent: int
    sent_age: float


class ObservedLimits(Limits, total=False):
    """`Limits` as ``autotag.update_provider_limits`` takes them, with their age in seconds, and `Sent`."""

    age: float
    sent: int
    sent_age: float


class PolledBatch(TypedDict):
    """What OpenAI says of a batch, as ``autotag.record_poll`` takes it; status ``gone``: it does not know it.
    total, done: lines of its input file, and those that have an answer."""

    id: str
    status: str
    output_file_id: NotRequired[str | None]
    error_file_id: NotRequired[str | None]
    total: NotRequired[int]
    done: NotRequired[int]
    error_code: NotRequired[str | None]
    error: NotRequired[str | None]
    error_kind: NotRequired[Kind | None]


class ProviderFacts(TypedDict):
    """What the provider says of a model and of itself, as ``autotag.provider_checked`` takes it. shutdown_date: ISO.
    batches: whether it has a Batch API."""

    model: str
    shutdown_date: NotRequired[str | None]
    batches: NotRequired[bool]


def make(kind: type[T], described: Mapping[str, Any]) -> T:
    """A message of the database. What a newer schema says besides is left out: a patch release fits."""
    names = {field.name for field in fields(cast("Any", kind))}
    return kind(**{name: value for name, value in described.items() if name in names})
