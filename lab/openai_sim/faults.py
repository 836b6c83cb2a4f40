"""Failures to order: what the next requests meet instead of an answer."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from lab.openai_sim.protocol import ApiError

#: Ways in which a model's answer is of no use, or has another form than was asked for.
Answer = Literal[
    # of no use
    "refusal", "length", "bad_schema", "no_json", "no_tags", "content_filter", "null_content", "empty_choices",
    "safety",  # Gemini: a choice without a message
    "error_in_200",  # OpenRouter: an error with status 200, which is not billed
    # around the JSON
    "fence", "words_around", "bom", "thinking",
    # within the JSON
    "extra_key", "word_confidence", "percent", "string_tags",
]  # fmt: skip


class Fault(BaseModel):
    """Hits the next ``times`` requests whose ``METHOD /path`` starts with ``where``.

    Either the request gets ``status`` with ``body`` (a text is sent as HTML; an OpenAI error object is made of
    ``code`` when there is no body), or the connection is cut (``after``: when it has taken effect), or the body
    comes slowly, or the model answers in another way than it was asked to (``answer``).

    Some faults hit batches and not requests: ``where="VALIDATE"`` the next batch that is looked through (it fails
    with ``code``), ``where="RUN"`` the next that runs (it expires when a share of its lines is done),
    ``where="OUTPUT"`` the next output file (its lines are mangled).
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
    answer: Answer | None = None
    #: only requests whose picture has all these tags
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
    """The orders still open, in the order they were given."""

    def __init__(self) -> None:
        self._open: list[Fault] = []

    def add(self, fault: Fault) -> None:
        self._open.append(fault)

    def clear(self) -> None:
        self._open.clear()

    @property
    def waiting(self) -> bool:
        """Whether any order is open."""
        return bool(self._open)

    def take(self, where: str, tags: tuple[str, ...] = ()) -> Fault | None:
        """The fault that this request meets, if any."""
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
