"""The findings of ``autotag doctor``."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeVar

from autotag.errors import TaggingError

Level = Literal["ok", "skipped", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "skipped", "warning", "error")

PROBE_AGAIN_AFTER = 1.0  # seconds
MAX_SKEW_OK = 5.0  # seconds
MAX_SKEW_WARNING = 240.0  # seconds; a webhook whose time differs by more than 300 is refused


T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: the name of the check.
        level: ok, skipped (not tried), warning or error.
        message: one sentence.
        fix: a command or a sentence; None: the level is ok.
    """

    check: str
    level: Level
    message: str
    fix: str | None = None


def worst_level(findings: list[Finding]) -> Level:
    """The level of the worst finding."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def compare_clocks(check: str, other: str, other_time: float) -> Finding:
    """Checks whether this machine's clock agrees with another one.

    Args:
        check: the name of the check.
        other: whose clock it is, for the message.
        other_time: what that clock shows, in epoch seconds.
    """
    skew = time.time() - other_time
    if abs(skew) < MAX_SKEW_OK:
        return Finding(check, "ok", f"This machine's clock agrees with {other}'s.")
    level: Level = "error" if abs(skew) > MAX_SKEW_WARNING else "warning"
    direction = "ahead of" if skew > 0 else "behind"
    return Finding(
        check, level, f"This machine's clock is {abs(skew):.0f} s {direction} {other}'s.", "timedatectl set-ntp on"
    )


async def try_twice(probe: Callable[[], Awaitable[T]]) -> T:
    """Runs a probe, and runs it again after a transient error: a single lost packet is not worth a finding.

    Raises:
        TaggingError: both tries failed, or the error is not transient.
    """
    try:
        return await probe()
    except TaggingError as error:
        if error.kind != "transient":
            raise
    await asyncio.sleep(PROBE_AGAIN_AFTER)
    return await probe()
