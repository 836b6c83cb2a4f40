"""The provider's batches, files, models and webhook deliveries, as types of this package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from openai.types import Batch

from autotag.db.messages import Kind, Limits
from autotag.openai.classify import MESSAGE_LENGTH, classify_status
from autotag.openai.errors import no_answer
from autotag.redact import redact
from autotag.texts import clean_text

_NAME = re.compile(r"[\w.-]{1,100}", re.ASCII)  # an event's type, or a batch's id


@dataclass(frozen=True)
class Completion:
    """The answer to a single call. limits: the provider's rate limits from its headers (`headers.read_limits`)."""

    body: dict[str, Any]
    limits: Limits


@dataclass(frozen=True)
class BatchFault:
    """Why a whole batch failed. kind: its error kind (`autotag.errors.KINDS`)."""

    code: str | None
    message: str | None
    kind: Kind


@dataclass(frozen=True)
class ProviderBatch:
    """A batch at the provider.

    created_at: epoch seconds, by the provider's clock. total: lines of its input file. done: lines that have an answer
    or an error.
    """

    id: str
    status: str
    created_at: float
    metadata: Mapping[str, str]
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    total: int
    done: int
    fault: BatchFault | None


@dataclass(frozen=True)
class ProviderFile:
    """A file at the provider. created_at: epoch seconds, by the provider's clock."""

    id: str
    name: str
    created_at: float


@dataclass(frozen=True)
class ProviderModel:
    """A model of the provider. shutdown_date: ISO; None: unknown. date: the time of the answer by the provider's clock,
    in epoch seconds; None: the answer has none."""

    shutdown_date: str | None
    date: float | None


@dataclass(frozen=True)
class ModelList:
    """The names of the provider's models. date: as in `ProviderModel`."""

    names: list[str]
    date: float | None


@dataclass(frozen=True)
class Delivery:
    """A verified delivery of the webhook. kind: the event's type. batch: the provider's id of the batch, or empty."""

    id: str
    kind: str
    batch: str


def read_batch(batch: Batch) -> ProviderBatch:
    """Converts a batch of the SDK, which does not validate it. An invalid count becomes 0.

    Raises:
        TaggingError: this is not a batch.
    """
    try:
        return _read_batch(batch)
    except (AttributeError, TypeError, ValueError, LookupError):
        raise no_answer() from None


def _read_batch(batch: Batch) -> ProviderBatch:
    counts = batch.request_counts
    errors = (batch.errors.data or []) if batch.errors else []
    first = errors[0] if errors else None
    return ProviderBatch(
        id=batch.id, status=batch.status, created_at=float(batch.created_at),
        metadata=batch.metadata if isinstance(batch.metadata, Mapping) else {},
        input_file_id=batch.input_file_id, output_file_id=batch.output_file_id, error_file_id=batch.error_file_id,
        total=_count(counts, "total"), done=_count(counts, "completed") + _count(counts, "failed"),
        # classified like other errors: for example, missing credit is an error of the account, not of the batch
        fault=None if first is None else BatchFault(
            _clean(first.code), _clean(first.message), classify_status(400, {"error": first.model_dump()}, {}).kind),
    )  # fmt: skip


def _count(counts: object, name: str) -> int:
    count = getattr(counts, name, 0)
    return count if type(count) is int else 0


def read_date(headers: Mapping[str, str]) -> float | None:
    """The header ``date`` in epoch seconds; None if it is missing or invalid."""
    with suppress(ValueError, TypeError):
        return parsedate_to_datetime(headers.get("date", "")).timestamp()
    return None


def read_name(value: object) -> str:
    """The type of an event, or an id; empty if the value is not valid. The SDK does not validate an event's fields."""
    return value if isinstance(value, str) and _NAME.fullmatch(value) else ""


def _clean(text: str | None) -> str | None:
    """A text of the provider, safe to store and cut to `MESSAGE_LENGTH`."""
    return clean_text(redact(text))[:MESSAGE_LENGTH] if isinstance(text, str) else None
