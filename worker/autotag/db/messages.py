"""The messages between a worker (or an operator's command) and the database.

Messages that a worker acts on are frozen dataclasses, made by `readers.make`, which ignores fields that a newer schema
adds.
Reports, and rows that are only shown or passed on, are TypedDicts. tests/integration/test_messages.py compares all of
them with the SQL.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NotRequired, Required, TypedDict

from autotag.images.sent import ImageNotes

#: The error kinds (``autotag.error_kinds``).
Kind = Literal["transient", "rate_limit", "account", "image"]
#: Where an error comes from: the AI provider, Storage, the host of an image's URL, or this worker.
Origin = Literal["provider", "storage", "host", "worker"]
#: The value of a field.
Value = bool | int | str | None
#: The stages that a worker reports.
Stage = Literal["preparing", "submitted", "processing", "completing"]


# -- from the database to a worker


@dataclass(frozen=True)
class Question:
    """The question to the model (``autotag.question_for``), the same for all images of a claim.

    Attributes:
        version: increases with every change of the question.
        reasoning_effort, service_tier: None: the parameter is not sent.
        cap_parameter: the provider's parameter for the cap of an answer.
        answer_format: the type of ``response_format``. Without ``json_schema``, the instructions contain the schema.
        sends_detail: whether the parameter ``detail`` is sent.
        image_side: max pixels of an image's longer side; None: by ``image_detail``.
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
    image_side: int | None = None


class Field(TypedDict):
    """A field: something that the model says about an image in addition to tags and caption. ``values``: of an enum."""

    name: str
    kind: Literal["enum", "boolean", "integer", "text"]
    values: NotRequired[list[str]]
    description: NotRequired[str]


@dataclass(frozen=True)
class Brief:
    """What an upload is asked in addition to the question (``autotag.describe_brief``). It never changes.

    Attributes:
        version: of the profile.
        instructions: the owner's words.
        language: of tags and caption; None: tags as the question says.
        tag_count: None: the question's ``max_tags``.
        vocabulary: the entries for the prompt, in their order: a tag, or a tag and its description.
    """

    id: int
    version: int
    instructions: str
    vocabulary_mode: Literal["open", "prefer", "only"]
    language: str | None = None
    tag_count: int | None = None
    vocabulary: list[str | list[str]] = field(default_factory=list)
    fields: list[Field] = field(default_factory=list)


@dataclass(frozen=True)
class Registered:
    """The settings that a worker gets when it registers and with each heartbeat (``autotag.worker_settings``).

    lease_seconds: seconds of its lease. batch_max_bytes: max bytes of a batch's input file.
    """

    lease_seconds: float
    batch_max_bytes: int


@dataclass(frozen=True)
class DatabaseSettings:
    """The settings for the images of a claim: its question, and the settings of the last heartbeat (`Registered`)."""

    question: Question
    batch_max_bytes: int


@dataclass(frozen=True)
class Image:
    """An image to tag, and its location: a Storage bucket and path, or a URL.

    It has no location if the asset was deleted, or if its file is ``refused``: ``foreign_file`` (the file belongs to
    another workspace), ``location_too_long``, ``filtered`` (the project's row filter leaves it out), ``hidden_file``
    (the caller may not see the file), ``unreadable_row`` (reading the asset raises an error), ``unreadable_now`` (the
    same, but the error may pass) or ``unchecked`` (the policies on the other files took too long; describe it again).
    """

    task: int
    asset_id: str
    bucket: str | None
    path: str | None
    url: str | None
    cap: int = 0  # max output tokens of its answer
    attempt: int = 0
    workspace: str = ""
    job: str | None = None
    traceparent: str | None = None  # of the HTTP request that made the job
    waited: float = 0.0  # seconds from the upload to the claim
    refused: str | None = None
    brief: int | None = None  # what its upload is asked in addition to the question (`Brief.id`)
    mark: str | None = None  # of this picture; the outcome contains it, because the row may get another picture
    claim: int = 0  # number of the claim that released it; the worker adds it


@dataclass(frozen=True)
class Beat:
    """The reply to a heartbeat.

    Attributes:
        alive: the worker has its lease; if not, it must register again.
        lost: the worker holds work unknown to it (a reply was lost); it calls `Database.release_lost` next.
        tick_due: `Database.tick_if_due` has something to do.
        settings: as they are now.
    """

    alive: bool
    lost: bool
    tick_due: bool
    settings: Registered


@dataclass(frozen=True)
class Claim:
    """Images for single calls.

    Attributes:
        tasks: the images' tasks; `Database.describe_tasks` describes them.
        wait: seconds until the next useful claim; None: until a notification.
        bound: the limit that kept the database from releasing more; None: there are no more images.
        settings: for these images.
    """

    tasks: list[int]
    wait: float | None
    bound: str | None
    settings: DatabaseSettings


class Notice(TypedDict):
    """A sentence for the worker's log, and the name of its log event."""

    event: str
    notice: str


@dataclass(frozen=True)
class Settled:
    """The number of accepted reports, and notices for the worker's log. busy: another call of this worker for the
    workspace still runs, so nothing was done. held: some changed rows are not broadcast yet (`Stages.follow_up`)."""

    accepted: int
    notices: list[Notice]
    busy: bool = False
    held: bool = False


@dataclass(frozen=True)
class Batch:
    """A batch that the worker holds. ``state`` is the step to start with (see the diagram in tables/batches.sql)."""

    batch: str
    attempt: int
    state: str
    image_count: int
    since: float  # epoch seconds; the earliest time at which its files and its batch at OpenAI were created
    cancelled: bool
    openai_batch_id: str | None
    input_file_id: str | None
    output_file_id: str | None
    error_file_id: str | None
    keep_files: int | None = None  # seconds after which the provider deletes its files; None: no expiry
    brief: int | None = None  # as in `Image`


@dataclass(frozen=True)
class Sought:
    """A batch to look for at the provider: its id, and the earliest time of its creation (epoch seconds)."""

    id: str
    since: float


@dataclass(frozen=True)
class BatchClaim:
    """Batches to submit or harvest, and what to do at the provider now.

    Attributes:
        wait: seconds until the next useful claim; None: until a notification.
        settings: for these batches.
        poll: batches to poll, by OpenAI's ids.
        cancel: OpenAI's ids of batches to cancel.
        files: files to delete.
        unrecorded: batches that are over and may have input files that nobody recorded.
        look_up: the model to check at the provider; None: no check is due.
    """

    batches: list[Batch]
    wait: float | None
    settings: DatabaseSettings
    poll: list[Sought] = field(default_factory=list)
    cancel: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    unrecorded: list[Sought] = field(default_factory=list)
    look_up: str | None = None


class Broadcast(TypedDict):
    """A message of ``autotag.outbox``, in the form that Realtime's HTTP endpoint expects."""

    topic: str
    event: str
    payload: object  # passed on unchanged
    private: bool


# -- from a worker to the database


class ErrorReport(TypedDict, total=False):
    """An error in the form that ``autotag.clean_error`` expects. See `autotag.errors.TaggingError` for the fields."""

    kind: Required[Kind]
    code: str
    message: str
    retry: bool
    retry_after: float | None
    origin: Origin
    parameter: str | None
    about_request: bool


class Usage(TypedDict):
    """The provider's usage figures of one answer, in tokens (``autotag.clean_usage``).

    model: the model that answered. tier: the service tier that was billed. None: the answer does not contain it.
    """

    input: int
    cached: int
    cache_write: int
    output: int
    reasoning: int
    model: str | None
    tier: str | None


class TagResult(TypedDict):
    """The result of an answer (``autotag.clean_result``).

    tags: ordered by confidence. confidence: 0 to 1, by tag; missing for tags without one. caption: one sentence. model:
    the model that answered. fields: by name, if the brief has some (``autotag.clean_fields``); None: unknown. image:
    unusual properties of the image, for its user (``autotag.clean_image_notes``).
    """

    tags: list[str]
    confidence: dict[str, float]
    caption: str
    model: str
    fields: NotRequired[dict[str, Value]]
    image: NotRequired[ImageNotes]


class Outcome(TypedDict):
    """The outcome of one single call: a result or an error. called: whether the provider was called. usage: set if the
    provider answered."""

    called: bool
    usage: NotRequired[Usage | None]
    result: NotRequired[TagResult]
    error: NotRequired[ErrorReport]


class Report(Outcome):
    """An `Outcome` with its task, in the form that ``autotag.settle`` expects."""

    task: int
    attempt: int
    mark: NotRequired[str | None]  # of the picture that the model saw


class BatchAnswer(TypedDict):
    """A line of a batch's output, in the form that ``autotag.batch_answers`` expects: a result or an error.

    mark: of the picture that the model saw.
    """

    task: int
    mark: NotRequired[str]
    usage: NotRequired[Usage | None]
    result: NotRequired[TagResult]
    error: NotRequired[ErrorReport]


class BatchNote(TypedDict):
    """What is unusual about an image of a batch's file, in the form that ``autotag.note_images`` expects."""

    task: int
    image: ImageNotes


class StageReport(TypedDict):
    """The stage of an image, in the form that ``autotag.report_stages`` expects."""

    task: int
    attempt: int
    stage: Stage


class Limits(TypedDict, total=False):
    """The provider's limits from an answer's headers, how much of them is left, and the seconds to wait.

    requests, tokens: per minute. day: requests per day. unclear: requests of a period that the headers do not name.
    """

    requests_limit: int
    requests_left: int
    day_limit: int
    day_left: int
    unclear_limit: int
    unclear_left: int
    tokens_limit: int
    tokens_left: int
    retry_after: float | None


class Sent(TypedDict):
    """Released calls that were sent (or will not be), and seconds since the first of them (``record_sent``)."""

    sent: int
    sent_age: float


class ObservedLimits(Limits, total=False):
    """`Limits` with their age in seconds, and `Sent`, in the form that ``autotag.update_provider_limits`` expects."""

    age: float
    sent: int
    sent_age: float


class PolledBatch(TypedDict):
    """The state of a batch at OpenAI, in the form that ``autotag.record_poll`` expects.

    status: OpenAI's, ``gone`` if OpenAI does not find the batch, or ``unread`` if its state cannot be read. total:
    lines of its input file. done: lines that have an answer.
    """

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
    """Facts about a model and the provider, in the form that ``autotag.provider_checked`` expects.

    shutdown_date: ISO. batches: whether the provider has a Batch API. Missing: unknown.
    """

    model: str
    shutdown_date: NotRequired[str | None]
    batches: NotRequired[bool]
