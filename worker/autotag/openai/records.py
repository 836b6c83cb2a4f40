"""What the provider says of batches, files, models and webhooks, as types of our own."""

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
from autotag.redact import redact
from autotag.texts import clean_text

_NAME = re.compile(r"[\w.-]{1,100}", re.ASCII)  # of an event's type, or a batch's id


@dataclass(frozen=True)
class Completion:
    """An answer to a single call. limits: what its headers say of the provider's bucket (`headers.read_limits`)."""

    body: dict[str, Any]
    limits: Limits


@dataclass(frozen=True)
class BatchFault:
    """Why a batch as a whole failed. kind: what follows from it (`autotag.errors.KINDS`)."""

    code: str | None
    message: str | None
    kind: Kind


@dataclass(frozen=True)
class ProviderBatch:
    """A batch at the provider.

    created_at: epoch seconds, by the provider's clock. total, done: lines of its input file, and those that have an
    answer or an error.
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
    """A model that the provider has. shutdown_date: ISO, if it says so. date: when it answered, in epoch seconds by its
    own clock; None: it does not say."""

    shutdown_date: str | None
    date: float | None


@dataclass(frozen=True)
class ModelList:
    """The names of the models that the provider lists; date: as in `ProviderModel`."""

    names: list[str]
    date: float | None


@dataclass(frozen=True)
class Delivery:
    """A delivery of the webhook, signed by the provider. kind: the event's type. batch: the id it names, or empty."""

    id: str
    kind: str
    batch: str


def read_batch(found: Batch) -> ProviderBatch:
    """A batch as the SDK has it."""
    counts = found.request_counts
    errors = (found.errors.data or []) if found.errors else []
    first = errors[0] if errors else None
    return ProviderBatch(
        id=found.id, status=found.status, created_at=found.created_at, metadata=found.metadata or {},
        input_file_id=found.input_file_id, output_file_id=found.output_file_id, error_file_id=found.error_file_id,
        total=counts.total if counts else 0, done=counts.completed + counts.failed if counts else 0,
        # no credit, for example, is nothing that the batch could help
        fault=None if first is None else BatchFault(
            _words(first.code), _words(first.message), classify_status(400, {"error": first.model_dump()}, {}).kind),
    )  # fmt: skip


def read_date(headers: Mapping[str, str]) -> float | None:
    """Epoch seconds of the header ``date``."""
    with suppress(ValueError, TypeError):
        return parsedate_to_datetime(headers.get("date", "")).timestamp()
    return None


def read_name(value: object) -> str:
    """The type of an event, or an id; empty for what is neither. The SDK reads an event without a look at its types."""
    return value if isinstance(value, str) and _NAME.fullmatch(value) else ""


def _words(text: str | None) -> str | None:
    """The provider's words, fit to be stored."""
    return clean_text(redact(text))[:MESSAGE_LENGTH] if isinstance(text, str) else None
