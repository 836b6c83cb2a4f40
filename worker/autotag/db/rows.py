"""Rows of functions, from which `Database` makes messages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict


class ClaimRow(TypedDict):
    """The row of ``autotag.claim``; the worker makes a `Claim` of it. question: None: it has not changed."""

    tasks: list[int]
    wait: float | None
    bound: str | None
    question: Mapping[str, object] | None


class BeatRow(TypedDict):
    """The row of ``autotag.heartbeat``; the worker makes a `Beat` of it."""

    alive: bool
    lost: bool
    tick_due: bool
    settings: Mapping[str, object]


class BatchClaimRow(TypedDict):
    """The row of ``autotag.claim_batches``; the worker makes a `BatchClaim` of it. poll, cancel, unrecorded: None:
    nothing is due."""

    batches: list[Mapping[str, object]]
    poll: list[Mapping[str, object]] | None
    cancel: list[str] | None
    files: list[str]
    wait: float | None
    question: Mapping[str, object] | None
    look_up: str | None
    unrecorded: list[Mapping[str, object]] | None
