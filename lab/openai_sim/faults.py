"""Faults that a test orders: the next matching requests fail, or get a different answer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lab.openai_sim.protocol import ApiError

#: How a model's answer can differ: unusable, or in a form that the request did not specify.
AnswerVariant = Literal[
    # unusable
    "refusal", "length", "bad_schema", "no_json", "no_tags", "content_filter", "null_content", "empty_choices",
    "safety",  # Gemini: a choice without a message
    "error_in_200",  # OpenRouter: an error with status 200, which is not billed
    # extra text around the JSON
    "fence", "text_around", "bom", "thinking",
    # a different form of the JSON
    "extra_key", "word_confidence", "percent", "string_tags",
]  # fmt: skip


class Fault(BaseModel):
    """Applies to the next ``times`` requests whose ``METHOD /path`` starts with ``where``, after ``skip`` others.

    The request gets one of these: an error ``status`` with ``body`` (text is sent as HTML; without a body the error
    object is built from ``code`` and ``message``); a cut connection (``cut``; with ``after``, once the request has
    taken effect); a body sent over ``slow`` seconds; or a different answer from the model (``answer``). ``delay``
    seconds pass first.

    Three values of ``where`` apply to batches: ``VALIDATE`` makes the next batch fail validation with ``code``,
    ``RUN`` makes the next batch expire after the share ``expire_at`` of its lines, and ``OUTPUT`` mangles the next
    output file (``mangle``).
    """

    model_config = ConfigDict(extra="forbid")

    where: str = "POST /v1/chat/completions"
    times: int = Field(default=1, ge=1)
    skip: int = Field(default=0, ge=0)
    status: int | None = None
    code: str = "server_error"
    message: str = "The server had an error while processing your request."
    body: Any = None
    headers: dict[str, str] = Field(default_factory=dict)
    delay: float = Field(default=0, ge=0)
    cut: bool = False
    after: bool = False
    slow: float = Field(default=0, ge=0)  # seconds over which the body is spread
    expire_at: float | None = Field(default=None, ge=0, le=1)
    mangle: Literal["truncate", "duplicate", "unknown", "missing", "status_0", "error_only", "garbage"] | None = None
    answer: AnswerVariant | None = None
    #: applies only to requests whose picture has all these tags
    tags: list[str] = Field(default_factory=list)

    def error(self) -> ApiError | None:
        """The error that the request gets instead of an answer, if any."""
        if self.status is None:
            return None
        error = ApiError(self.status, self.code, self.message, self.headers)
        if self.body is not None:
            error.body = self.body
        return error


class Faults:
    """The faults that are still open, in the order in which they were added."""

    def __init__(self) -> None:
        self._open: list[Fault] = []

    def add(self, fault: Fault) -> None:
        self._open.append(fault)

    def clear(self) -> None:
        self._open.clear()

    @property
    def waiting(self) -> bool:
        """Whether any fault is open."""
        return bool(self._open)

    def take(self, where: str, tags: tuple[str, ...] = ()) -> Fault | None:
        """The fault that applies to this request, if any; counts it as used."""
        for fault in self._open:
            if not where.startswith(fault.where) or not set(fault.tags) <= set(tags):
                continue
            if fault.skip:
                fault.skip -= 1
                continue
            fault.times -= 1
            if not fault.times:
                self._open.remove(fault)
            return fault
        return None
