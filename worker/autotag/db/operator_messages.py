"""The messages between the operator's commands and the database: see `autotag.db.messages`."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

from autotag.db.messages import ErrorReport, Usage


class FindingRow(TypedDict):
    """One line of ``autotag.diagnose``; ``fix`` None: all is well."""

    check: str
    level: Literal["ok", "warning", "error"]
    message: str
    fix: str | None


class StoredFile(TypedDict):
    """Where an image lies in Storage."""

    bucket: str
    path: str


class Shutdown(TypedDict):
    """The end of a model that is near (``autotag.describe_shutdown``): in so many days, on an ISO date."""

    level: Literal["warning", "error"]
    days: int
    date: str
    successor: str | None
    message: str
    fix: str


class ProviderStatus(TypedDict):
    """Whom the workers ask, and what it was found to have (None: not known). keep_files: seconds that it keeps files at
    most; None: it takes no expiry."""

    base_url: str | None
    batches: bool | None
    rate_headers: bool | None
    keep_files: int | None


class ModelStatus(TypedDict):
    """The model in use (``model`` of ``autotag.status``).

    prompt_tokens, output_tokens: of an image, on average. cap, reserved: tokens of a call. cost_per_1000: dollars for
    1,000 images; None: it has no price. proven: an answer to the present question was of use.
    """

    name: str
    image_detail: Literal["low", "high"]
    reasoning_effort: str | None
    service_tier: str | None
    cap_parameter: Literal["max_completion_tokens", "max_tokens", "none"]
    answer_format: Literal["json_schema", "json_object", "text"]
    sends_detail: bool
    prompt_tokens: int
    output_tokens: int
    cap: int
    reserved: int
    priced: bool
    cost_per_1000: float | None
    proven: bool
    shutdown: Shutdown | None
    provider: ProviderStatus


class Diagnosis(TypedDict):
    """What the database can tell of itself (``autotag.diagnose``). now: epoch seconds. model: that the settings name.
    sample: the newest image that lies in Storage."""

    findings: list[FindingRow]
    now: float
    model: str
    sample: StoredFile | None


class BackfillPreview(TypedDict):
    """What bringing in existing images would mean (``autotag.preview_backfill``); cost, in dollars, None: the model has
    no price."""

    images: int
    seconds: float
    cost: float | None
    model: str


class BackfillPart(TypedDict):
    """One slice of existing images (``autotag.backfill``). last: where to go on; None: there are no more."""

    job_id: str | None
    images: int
    last: str | None


class ModelQuestion(TypedDict):
    """A `autotag.db.Question` without a version (``autotag.question_for``)."""

    model: str
    image_detail: Literal["low", "high"]
    max_tags: int
    tag_language: str
    reasoning_effort: str | None
    service_tier: str | None
    cap_parameter: Literal["max_completion_tokens", "max_tokens", "none"]
    answer_format: Literal["json_schema", "json_object", "text"]
    sends_detail: bool


class ComparisonPreview(TypedDict):
    """What asking another model would mean (``autotag.preview_comparison``).

    cost: dollars of the sample; None: the model has no price. reserved: tokens of one call. shutdown_date: ISO.
    current_…: of the model in use, which gave ``current_answers`` so far.
    """

    images: int
    cost: float | None
    reserved: int
    question: ModelQuestion
    shutdown_date: str | None
    current_model: str
    current_effort: str | None
    current_cost_per_1000: float | None
    current_answers: int


class ComparedImage(TypedDict):
    """An image of the host, and what is stored about it (``autotag.comparison_sample``)."""

    asset_id: str
    bucket: str | None
    path: str | None
    url: str | None
    tags: list[str]
    caption: str | None
    confidence: dict[str, float] | None
    model: str | None


class Admission(TypedDict):
    """Whether one call may be made (``autotag.admit_comparison``): if so, tokens reserved, since when, and the cap of
    its answer; else why not, and seconds until it is worth asking again."""

    admitted: bool
    reserved: NotRequired[int]
    reserved_at: NotRequired[str]
    cap: NotRequired[int]
    reason: NotRequired[str]
    wait: NotRequired[float]
    message: NotRequired[str]


class ComparisonReport(TypedDict):
    """What came of one call, as ``autotag.settle_comparison`` takes it.

    failures: of this image so far. cut_off: whether an answer about it was. proven: whether any answer was of use.
    reserved, reserved_at, cap: as in `Admission`.
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
    """What to do next about an image. cost: dollars of the call; None: the model has no price. again: with another
    question, another least cap, or after ``wait`` seconds, where it names them. stop: ``message`` says why."""

    next: Literal["done", "again", "failed", "stop"]
    cost: float | None
    question: NotRequired[ModelQuestion]
    cap: NotRequired[int]
    wait: NotRequired[float]
    message: NotRequired[str]
