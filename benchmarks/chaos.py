"""Rounds of kills, faults and restarts, and the violations that the auditor finds (see `lab.chaos`)."""

from __future__ import annotations

import time

from rich.console import Console

from benchmarks.report import Figure, Result
from lab.chaos.run import Chaos
from lab.postgres import install_autotag, local_postgres, machine_binaries
from lab.stack import local_stack

KILLS = 60


async def measure(console: Console, *, minutes: float, seed: int, workers: int) -> Result:
    """Runs for ``minutes``, and until there were `KILLS` kills, but stops after the first round with a violation."""
    with local_postgres(machine_binaries()) as server:
        install_autotag(server)
        async with local_stack(server) as stack:
            until = time.monotonic() + 60 * minutes
            chaos = Chaos(stack, server, seed=seed, workers=workers)
            report = await chaos.run(kills=KILLS, until=until, on_progress=console.print)
    figures = {
        "violations": Figure(len(report.violations), 0, "lower"),
        "kills": Figure(report.kills, KILLS, "higher"),
    }
    return Result(
        "chaos", figures,
        {
            "rounds": report.rounds, "points": len(report.points), "restarts": report.restarts, "faults": report.faults,
            "hostilities": sorted(report.hostilities), "images": report.images, "violations": report.violations[:20],
        },
    )  # fmt: skip
