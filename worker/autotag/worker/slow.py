"""Workspaces whose rows in the host's tables are slow to write."""

from __future__ import annotations

import time

SLOW_FOR = 30.0  # seconds that a workspace counts as slow after a call took too long; doubles if it is slow again soon
MAX_SLOW_FOR = 600.0  # seconds


class SlowWorkspaces:
    """Remembers which workspaces are slow, so that they do not occupy the connections again and again."""

    def __init__(self) -> None:
        self._slow: dict[str, tuple[float, float]] = {}  # until when (`time.monotonic`), and for how many seconds

    def mark(self, workspace: str) -> None:
        """Notes that a call for this workspace has just taken too long."""
        now = time.monotonic()
        until, seconds = self._slow.get(workspace, (0.0, 0.0))
        if now < until:  # another call for it was already running
            return
        # forget workspaces that were not slow again
        self._slow = {w: s for w, s in self._slow.items() if now < s[0] + s[1]}
        seconds = min(2 * seconds, MAX_SLOW_FOR) if workspace in self._slow else SLOW_FOR
        self._slow[workspace] = (now + seconds, seconds)

    def __contains__(self, workspace: str) -> bool:
        if not self._slow:
            return False
        until, _ = self._slow.get(workspace, (0.0, 0.0))
        return time.monotonic() < until
