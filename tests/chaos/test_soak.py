"""Runs for half a minute what `./scripts/bench soak` runs for an hour."""

from __future__ import annotations

import pytest
from rich.console import Console

from benchmarks import soak
from lab.chaos.soak import Least

MINUTES = 0.6
PACE = 2.0
PAUSE = 1.5  # seconds between rounds of uploads, which would keep a machine busy for as long as it lasts
LEAST = Least(restarts=5, faults=10, images=100)  # so much that this shows something, on a busy machine too


@pytest.mark.long
async def test_restarts_and_faults_leave_nothing_behind() -> None:
    """Nothing is lost. The worker that is never restarted and the tables do not grow any more after a while."""
    result = await soak.measure(Console(stderr=True), minutes=MINUTES, seed=1, pause=PAUSE, pace=PACE, least=LEAST)
    figures = {name: figure.value for name, figure in result.figures.items() if not figure.ok}
    # the tables have hardly begun to fill their pages; in an hour, the figure's bar is 1.25
    assert figures.pop("table_growth", 0) <= 1.6, result.details
    assert figures == {}, result.details
