"""What the checks of ``autotag doctor`` come to."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "error"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "error")

SKEW_WARNING = 5.0  # seconds
SKEW_ERROR = 240.0  # seconds; OpenAI's webhooks are refused when they look older than 300


@dataclass(frozen=True)
class Finding:
    """What one check came to; ``fix`` is a command or a sentence, None when all is well."""

    check: str
    level: Level
    message: str
    fix: str | None = None


def worst_level(findings: list[Finding]) -> Level:
    """The level of the worst finding."""
    return max((finding.level for finding in findings), key=LEVELS.index, default="ok")


def compare_clocks(check: str, whose: str, their_time: float) -> Finding:
    """Whether this machine's clock agrees with another's; ``their_time`` in epoch seconds."""
    skew = time.time() - their_time
    if abs(skew) < SKEW_WARNING:
        return Finding(check, "ok", f"This machine's clock agrees with {whose}'s.")
    level: Level = "error" if abs(skew) > SKEW_ERROR else "warning"
    ahead = "ahead of" if skew > 0 else "behind"
    return Finding(
        check, level, f"This machine's clock is {abs(skew):.0f} s {ahead} {whose}'s.", "timedatectl set-ntp on"
    )
