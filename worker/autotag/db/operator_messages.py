"""The messages between the operator's commands and the database: see `autotag.db.messages`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Literal, NotRequired, TypedDict

from autotag.db.messages import ErrorReport, Image, Usage

#: The strategies of an upload (``autotag.strategy``).
Strategy = Literal["realtime", "realtime-chunked", "batch", "batch-parallel"]


class FindingRow(TypedDict):
    """One finding of ``autotag.diagnose``. fix: None if the check is ok."""

    check: str
    level: Literal["ok", "skipped", "warning", "error"]
    message: str
    fix: str | None


class StoredFile(TypedDict):
    """The location of an image in Storage."""

    bucket: str
    path: str


class Shutdown(TypedDict):
    """A model's shutdown that is near (``autotag.describe_shutdown``): days until then, and the ISO date."""

    level: Literal["warning", "error"]
    days: int
    date: str
    successor: str | None
    message: str
    fix: str


class ProviderStatus(TypedDict):
    """The provider in use, and its detected features (None: unknown). keep_files: seconds until it deletes files; None:
    it supports no expiry."""

    base_url: str | None
    batches: bool | None
    rate_headers: bool | None
    keep_files: int | None


class ModelStatus(TypedDict):
    """The model in use (``model`` of ``autotag.status``).

    prompt_tokens, output_tokens: averages per image. cap, reserved: tokens per call. cost_per_1000: dollars per 1,000
    images; None: the model has no price. proven: the current question has had a usable answer.
    """

    name: str
    image_detail: Literal["low", "high"]
    reasoning_effort: str | None
    service_tier: str | None
    cap_parameter: Literal["max_completion_tokens", "max_tokens", "none"]
    answer_format: Literal["json_schema", "json_object", "text"]
    sends_detail: bool
    image_side: int | None
    prompt_tokens: int
    output_tokens: int
    cap: int
    reserved: int
    priced: bool
    cost_per_1000: float | None
    proven: bool
    shutdown: Shutdown | None
    provider: ProviderStatus


class QueueStatus(TypedDict):
    """Numbers of images: being tagged (``live``), queued (and in how many workspaces), and waiting for a retry
    (``delayed``)."""

    workspaces: int
    queued: int
    delayed: int
    live: int


class JobStatus(TypedDict):
    """An unfinished upload. progress: percent. Times: ISO. fallback: why its images are not sent in the way that its
    size implies, as a sentence for users."""

    job_id: str
    workspace_id: str
    strategy: Strategy
    image_count: int
    completed: int
    failed: int
    progress: int
    created_at: str
    eta: str | None
    eta_p90: str | None
    fallback: str | None


class BatchStatus(TypedDict):
    """A batch that has not ended. images: lines of its file. done: lines that have an answer. state: see
    tables/batches.sql."""

    batch: str
    job_id: str
    ordinal: int
    openai_batch_id: str | None
    state: str
    openai_status: str | None
    images: int
    done: int
    created_at: str
    submitted_at: str | None
    eta: str
    eta_p90: str
    failures: int
    error: str | None


class LimitsStatus(TypedDict):
    """The provider's limits, and how much of them is left. requests_per_day: None: no daily limit is known.
    blocked_until: all calls wait until then. account_error: why tagging is paused; None: it is not."""

    requests_per_minute: int
    requests_left: float
    tokens_per_minute: int
    tokens_left: float
    requests_per_day: int | None
    requests_left_today: float | None
    queued_batch_tokens: int
    queued_batch_tokens_used: int
    blocked_until: str | None
    account_error: str | None
    account_error_from: str | None
    account_error_at: str | None


class WorkerStatus(TypedDict):
    """A worker. alive: it has its lease. held: images that it holds as single calls."""

    worker: str
    host: str
    version: str
    listening: bool
    started_at: str
    last_heartbeat_at: str
    alive: bool
    held: int


class FailedImages(TypedDict):
    """Images that failed with the same error within a day. message: for users. last_at: when the last one failed."""

    code: str | None
    message: str | None
    images: int
    last_at: str


class TodayStatus(TypedDict):
    """Usage of the current day (UTC) in all workspaces. cost: dollars, without the requests to models that have no
    price."""

    images: int
    requests: int
    input_tokens: int
    output_tokens: int
    cost: float
    unpriced_requests: int
    unpriced_models: list[str]


class Waiting(TypedDict):
    """Something that waits, and why. kind: ``batch``, ``workspace``, ``upload`` or ``outcomes``; until: ISO; None: no
    known time."""

    kind: str
    workspace_id: str
    id: str | None
    images: int
    reason: str
    until: str | None


class SystemStatus(TypedDict):
    """The current state of the whole system (``autotag.status``). at: ISO."""

    at: str
    queue: QueueStatus
    jobs: list[JobStatus]
    batches: list[BatchStatus]
    limits: LimitsStatus
    model: ModelStatus
    workers: list[WorkerStatus]
    errors: list[FailedImages]
    waiting: list[Waiting]
    today: TodayStatus


class UsageRow(TypedDict):
    """The usage of one user, day, model and service tier (``autotag.list_usage``). cost: dollars; None: the model has
    no price."""

    user_id: str | None
    day: date
    model: str
    service_tier: str
    images: int
    requests: int
    input_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    output_tokens: int
    reasoning_tokens: int
    cost: Decimal | None


class Diagnosis(TypedDict):
    """The database's findings (``autotag.diagnose``). now: epoch seconds. model: the model in the settings. sample: the
    newest image in Storage. storage_hosts: of the adapter; URLs of their Storage are files."""

    findings: list[FindingRow]
    now: float
    model: str
    sample: StoredFile | None
    storage_hosts: list[str]


class BackfillPreview(TypedDict):
    """The prediction of a backfill (``autotag.preview_backfill``). cost: dollars; None: the model has no price."""

    images: int
    seconds: float
    cost: float | None
    model: str


class BackfillPart(TypedDict):
    """One part of a backfill (``autotag.backfill``). last: ``after`` of the next part; None: no more images."""

    job_id: str | None
    images: int
    last: str | None


class ModelQuestion(TypedDict):
    """An `autotag.db.Question` without its version (``autotag.question_for``)."""

    model: str
    image_detail: Literal["low", "high"]
    max_tags: int
    tag_language: str
    reasoning_effort: str | None
    service_tier: str | None
    cap_parameter: Literal["max_completion_tokens", "max_tokens", "none"]
    answer_format: Literal["json_schema", "json_object", "text"]
    sends_detail: bool
    image_side: int | None


class ComparisonPreview(TypedDict):
    """The prediction of a comparison (``autotag.preview_comparison``).

    cost: dollars for the sample; None: the model has no price. reserved: tokens per call. shutdown_date: ISO.
    brief: of the workspace, for `make` (`Brief`); None: it has no profile.
    current_…: the model in use. current_answers: answers that it has given so far.
    """

    images: int
    cost: float | None
    reserved: int
    question: ModelQuestion
    brief: Mapping[str, object] | None
    shutdown_date: str | None
    current_model: str
    current_effort: str | None
    current_cost_per_1000: float | None
    current_answers: int


@dataclass(frozen=True)
class ComparedImage:
    """An image of the host, and what is stored about it (``autotag.comparison_sample``).

    Attributes:
        asset_id: the row's id.
        bucket, path, url: where the image is.
        tags, caption, confidence, model: the stored answer. ``confidence`` maps a tag to a number from 0 to 1.
    """

    asset_id: str
    bucket: str | None
    path: str | None
    url: str | None
    tags: list[str]
    caption: str | None
    confidence: dict[str, float] | None
    model: str | None

    @property
    def image(self) -> Image:
        """Where the image is, as `Images.load` takes it."""
        return Image(0, self.asset_id, self.bucket, self.path, self.url)


class Admission(TypedDict):
    """Whether one call is admitted (``autotag.admit_comparison``).

    If admitted: the reserved tokens, when they were reserved, and the cap. Otherwise: the reason, and seconds until the
    next useful try.
    """

    admitted: bool
    reserved: NotRequired[int]
    reserved_at: NotRequired[str]
    cap: NotRequired[int]
    reason: NotRequired[str]
    wait: NotRequired[float]
    message: NotRequired[str]


class ComparisonReport(TypedDict):
    """The outcome of one call, in the form that ``autotag.settle_comparison`` expects.

    failures: failures of this image so far. cut_off: whether an answer for this image was cut off. proven: whether any
    answer of the comparison was usable. reserved, reserved_at, cap: as in `Admission`.
    """

    called: bool
    failures: int
    cut_off: bool
    proven: bool
    reserved: NotRequired[int]
    reserved_at: NotRequired[str]
    cap: NotRequired[int]
    usage: NotRequired[Usage | None]
    error: NotRequired[ErrorReport]


class ComparisonStep(TypedDict):
    """What to do next with an image.

    next: ``done``; ``again``: call again, with ``question``, with at least ``cap``, or after ``wait`` seconds, if they
    are set; ``failed``; ``stop``: end the comparison, for the reason in ``message``. cost: dollars of the call; None:
    the model has no price.
    """

    next: Literal["done", "again", "failed", "stop"]
    cost: float | None
    question: NotRequired[ModelQuestion]
    cap: NotRequired[int]
    wait: NotRequired[float]
    message: NotRequired[str]


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
    account_error: int  # 1: tagging is paused
    workers: int
    outbox: int
    oldest_message: float | None
    unstored: int
    oldest_unstored: float | None
    images_today: int
    cost_today: float
    unpriced_today: int
    shutdown_days: int | None
