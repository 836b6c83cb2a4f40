"""A long run with restarts and faults: whether memory and tables stay flat, and nothing is lost (see `chaos.soak`)."""

from __future__ import annotations

from rich.console import Console

from benchmarks.report import Figure, Result
from lab.chaos.soak import Soak, growth
from lab.postgres import install_autotag, local_postgres, machine_binaries
from lab.stack import local_stack


async def measure(console: Console, *, minutes: float, seed: int) -> Result:
    """So many minutes of it."""
    # Autovacuum looks as often as it would at a month's speed of everything else.
    with local_postgres(machine_binaries(), {"autovacuum_naptime": "2s"}) as server:
        install_autotag(server)
        async with local_stack(server) as stack:
            lived = await Soak(stack, server, seed=seed).live(60 * minutes, console.print)
    figures = {
        "lost": Figure(len(lived.lost), 0, "lower"),
        "memory_growth": Figure(growth(lived.memory), 1.1, "lower"),
        "table_growth": Figure(growth(lived.tables), 1.25, "lower"),
    }
    details = {
        "minutes": minutes, "images": lived.images, "restarts": lived.restarts, "faults": lived.faults,
        "worker, MB": [round(lived.memory[0]), round(lived.memory[-1])],
        "tables, MB": [round(lived.tables[0], 1), round(lived.tables[-1], 1)], "lost": lived.lost[:20],
    }  # fmt: skip
    return Result("soak", figures, details)
