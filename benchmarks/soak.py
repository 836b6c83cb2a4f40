"""A long run with restarts and faults: growth of memory and tables, and lost images (see `lab.chaos.soak`)."""

from __future__ import annotations

from rich.console import Console

from benchmarks.report import Figure, Result
from lab.chaos.soak import Least, Soak, growth
from lab.postgres import install_autotag, local_postgres, machine_binaries
from lab.stack import local_stack


async def measure(
    console: Console, *, minutes: float, seed: int, pause: float = 0.1, pace: float = 1.0, least: Least | None = None
) -> Result:
    """Runs for ``minutes`` and until ``least`` has happened.

    Args:
        console: prints the progress twice a minute.
        minutes: how long, at least.
        seed: of the uploads and faults.
        pause: seconds between two rounds of uploads.
        pace: how many times faster than usual everything else is.
        least: the minimum that must have happened.
    """
    # Rows are created and deleted far faster than in production, so autovacuum runs more often too.
    with local_postgres(machine_binaries(), {"autovacuum_naptime": "2s"}) as server:
        install_autotag(server)
        async with local_stack(server) as stack:
            soak = await Soak(stack, server, seed=seed).live(60 * minutes, console.print, pause, pace, least)
    figures = {
        "lost": Figure(len(soak.lost), 0, "lower"),
        "memory_growth": Figure(growth(soak.memory), 1.1, "lower"),
        "table_growth": Figure(growth(soak.tables), 1.25, "lower"),
    }
    details = {
        "minutes": minutes, "images": soak.images, "restarts": soak.restarts, "faults": soak.faults,
        "worker, MB": [round(soak.memory[0]), round(soak.memory[-1])],
        "tables, MB": [round(soak.tables[0], 1), round(soak.tables[-1], 1)], "lost": soak.lost[:20],
    }  # fmt: skip
    return Result("soak", figures, details)
